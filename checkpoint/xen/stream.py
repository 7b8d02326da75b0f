# SPDX-License-Identifier: Apache-2.0
"""The restore stream from which the toolstack builds a shell domain.  Pure.

``xl restore -p`` of a stream that populates memory without contents gives exactly what a standby
needs: the guest's own configuration, number, CPU policy and devices, paused, with empty memory and
without its kernel file.  Formats: ``docs/specs/libxl-migration-stream.pandoc``,
``docs/specs/libxc-migration-stream.pandoc`` and ``struct save_file_header`` of ``tools/xl/xl.h``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from typing import Any

_XL_MAGIC = b"Xen saved domain, xl format\n \0 \r"
_XL_BYTEORDER = 0x01020304
_XL_JSON_CONFIG, _XL_STREAM_V2 = 1, 2

#: libxl: ident "LibxlFmt", version 2; big-endian, options 0 = little-endian records
_LIBXL_HEADER = struct.pack(">QII", 0x4C6962786C466D74, 2, 0)
_LIBXL_END, _LIBXL_LIBXC_CONTEXT = 0, 1

#: libxc: marker, id "XENF", version 3; big-endian, options 0 = little-endian records
_LIBXC_HEADER = struct.pack(">QIIHHI", (1 << 64) - 1, 0x58454E46, 3, 0, 0, 0)
_LIBXC_HVM = 2
_PAGE_SHIFT = 12

_END, _PAGE_DATA, _TSC_INFO, _HVM_CONTEXT, _HVM_PARAMS = 0x00, 0x01, 0x08, 0x09, 0x0A
_STATIC_DATA_END, _CPUID_POLICY, _MSR_POLICY = 0x10, 0x11, 0x12

#: XEN_DOMCTL_PFINFO_XALLOC in the type bits of a PAGE_DATA entry: populate, no contents follow
_ALLOCATE_ONLY = 0xE << 60

#: frames per PAGE_DATA record: 4 MiB, so that libxc can use 2 MiB superpages
_BATCH = 1024


def _record(kind: int, body: bytes = b"") -> bytes:
    return struct.pack("<II", kind, len(body)) + body + bytes(-len(body) % 8)


def _populate(gfns: Iterable[int]) -> Iterator[bytes]:
    batch: list[int] = []

    def flush() -> bytes:
        body = struct.pack(f"<II{len(batch)}Q", len(batch), 0, *(_ALLOCATE_ONLY | g for g in batch))
        batch.clear()
        return _record(_PAGE_DATA, body)

    for gfn in gfns:
        batch.append(gfn)
        if len(batch) == _BATCH:
            yield flush()
    if batch:
        yield flush()


def shell_stream(
    config: dict[str, Any],
    *,
    xen: tuple[int, int],
    gfns: Iterable[int],
    cpuid: bytes,
    msrs: bytes,
    params: dict[int, int],
    context: bytes,
    tsc: tuple[int, int, int, int] | None = None,
) -> Iterator[bytes]:
    """Yield the file that ``xl restore`` reads.

    :param config: the domain's configuration as ``xl list -l`` prints it
    :param xen: (major, minor) of the Xen that the context was saved on
    :param gfns: ascending frames to populate, special pages included
    :param cpuid: array of ``xen_cpuid_leaf_t``
    :param msrs: array of ``xen_msr_entry_t``
    :param params: HVM parameters to set; their pages must be among ``gfns``
    :param context: HVM save records
    :param tsc: (mode, khz, nsec, incarnation), or None for the host's own
    """
    text = json.dumps(config).encode() + b"\0"
    optional = struct.pack("<I", len(text)) + text
    yield _XL_MAGIC + struct.pack(
        "<IIII", _XL_BYTEORDER, _XL_JSON_CONFIG | _XL_STREAM_V2, 0, len(optional)
    )
    yield optional
    yield _LIBXL_HEADER + _record(_LIBXL_LIBXC_CONTEXT)
    yield _LIBXC_HEADER + struct.pack("<IHHII", _LIBXC_HVM, _PAGE_SHIFT, 0, *xen)
    if cpuid:
        yield _record(_CPUID_POLICY, cpuid)
    if msrs:
        yield _record(_MSR_POLICY, msrs)
    yield _record(_STATIC_DATA_END)
    yield from _populate(gfns)
    if tsc is not None:
        mode, khz, nsec, incarnation = tsc
        yield _record(_TSC_INFO, struct.pack("<IIQII", mode, khz, nsec, incarnation, 0))
    yield _record(_HVM_CONTEXT, context)
    entries = b"".join(struct.pack("<QQ", index, value) for index, value in params.items())
    yield _record(_HVM_PARAMS, struct.pack("<II", len(params), 0) + entries)
    yield _record(_END)
    yield _record(_LIBXL_END)
