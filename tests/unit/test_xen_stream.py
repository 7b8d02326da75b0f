# SPDX-License-Identifier: Apache-2.0
"""The shell's restore stream, taken apart again by a reader of its own."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.xen.stream import shell_stream

#: docs/specs/libxc-migration-stream.pandoc
END, PAGE_DATA, TSC_INFO, HVM_CONTEXT, HVM_PARAMS = 0, 1, 8, 9, 10
STATIC_DATA_END, CPUID_POLICY, MSR_POLICY = 0x10, 0x11, 0x12
MOST = 1024


@dataclass
class Parsed:
    """What a restoring toolstack would learn.

    :ivar kinds: types of the libxc records, in order
    :ivar batches: frames populated by each PAGE_DATA record
    """

    config: dict[str, Any] = field(default_factory=dict)
    xen: tuple[int, int] = (0, 0)
    kinds: list[int] = field(default_factory=list)
    bodies: dict[int, bytes] = field(default_factory=dict)
    batches: list[list[int]] = field(default_factory=list)
    params: dict[int, int] = field(default_factory=dict)


class Reader:
    """Reads exactly, and keeps count for the alignment."""

    def __init__(self, raw: bytes) -> None:
        self._file = io.BytesIO(raw)
        self._left = len(raw)

    def take(self, count: int) -> bytes:
        data = self._file.read(count)
        assert len(data) == count, "the stream is cut short"
        self._left -= count
        return data

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def record(self) -> tuple[int, bytes]:
        kind, length = self.unpack("<II")
        body = self.take(length)
        assert not any(self.take(-length % 8)), "padding must be zero"
        return kind, body

    def end(self) -> None:
        assert self._left == 0, "the stream goes on after its end"


def parse(pieces: Iterable[bytes]) -> Parsed:
    """Take a stream apart: xl's header, libxl's records, libxc's records in them."""
    found = Parsed()
    reader = Reader(b"".join(pieces))
    assert reader.take(32) == b"Xen saved domain, xl format\n \0 \r"
    order, mandatory, optional, length = reader.unpack("<IIII")
    assert (order, mandatory, optional) == (0x01020304, 3, 0)
    text_reader = Reader(reader.take(length))
    (size,) = text_reader.unpack("<I")
    text = text_reader.take(size)
    text_reader.end()
    assert text.endswith(b"\0")
    found.config = json.loads(text[:-1])
    assert reader.unpack(">8sII") == (b"LibxlFmt", 2, 0)
    assert reader.record() == (1, b"")  # LIBXC_CONTEXT: what follows is libxc's
    marker, ident, version, options, *reserved = reader.unpack(">QIIHHI")
    assert (marker, ident, version, options) == ((1 << 64) - 1, 0x58454E46, 3, 0)
    assert not any(reserved)
    guest, shift, zero, major, minor = reader.unpack("<IHHII")
    assert (guest, shift, zero) == (2, 12, 0)
    found.xen = (major, minor)
    kind = -1
    while kind != END:
        kind, body = reader.record()
        found.kinds.append(kind)
        if kind == PAGE_DATA:
            found.batches.append(frames(body))
        else:
            assert kind not in found.bodies
            found.bodies[kind] = body
    assert found.bodies[END] == b""
    assert reader.record() == (0, b"")  # libxl's END
    reader.end()
    count, zero = struct.unpack_from("<II", found.bodies[HVM_PARAMS])
    assert zero == 0
    assert len(found.bodies[HVM_PARAMS]) == 8 + 16 * count
    found.params = dict(struct.iter_unpack("<QQ", found.bodies[HVM_PARAMS][8:]))
    return found


def frames(body: bytes) -> list[int]:
    """Frames of a PAGE_DATA record, which brings no contents."""
    count, zero = struct.unpack_from("<II", body)
    assert zero == 0
    assert 0 < count <= MOST
    assert len(body) == 8 + 8 * count
    entries = struct.unpack_from(f"<{count}Q", body, 8)
    # XEN_DOMCTL_PFINFO_XALLOC in the type bits, nothing between them and the frame number
    assert all(entry >> 60 == 0xE and not entry >> 52 & 0xFF for entry in entries)
    return [entry & (1 << 52) - 1 for entry in entries]


def stream(**changes: Any) -> Iterable[bytes]:
    values: dict[str, Any] = {
        "config": {"c_info": {"name": "web--kemari", "domid": 7}},
        "xen": (4, 17),
        "gfns": range(3),
        "cpuid": bytes(24),
        "msrs": bytes(16),
        "params": {1: 0xFEFFC},
        "context": b"hvm records",
    }
    config = (values | changes).pop("config")
    return shell_stream(config, **{k: v for k, v in (values | changes).items() if k != "config"})


def test_all_that_was_put_in_comes_out() -> None:
    found = parse(
        stream(
            config={"name": "caf\xe9", "nested": [1, {"a": None}]},
            xen=(4, 20),
            gfns=[0, 1, 2, 0xFEFFC, 0xFEFFF],
            cpuid=bytes(range(24)) * 3,
            msrs=bytes(range(16)),
            params={17: 0xFEFFF, 1: 0xFEFFC, 36: 8},
            context=b"\x01" * 4099,
            tsc=(2, 2_400_001, (1 << 64) - 1, 3),
        )
    )
    assert found.config == {"name": "caf\xe9", "nested": [1, {"a": None}]}
    assert found.xen == (4, 20)
    assert found.batches == [[0, 1, 2, 0xFEFFC, 0xFEFFF]]
    assert found.bodies[CPUID_POLICY] == bytes(range(24)) * 3
    assert found.bodies[MSR_POLICY] == bytes(range(16))
    assert found.params == {17: 0xFEFFF, 1: 0xFEFFC, 36: 8}
    assert found.bodies[HVM_CONTEXT] == b"\x01" * 4099
    assert struct.unpack("<IIQII", found.bodies[TSC_INFO]) == (2, 2_400_001, (1 << 64) - 1, 3, 0)


def test_policies_come_first_and_memory_before_the_state_that_refers_to_it() -> None:
    found = parse(stream(tsc=(0, 1, 2, 3)))
    policies = [CPUID_POLICY, MSR_POLICY, STATIC_DATA_END]
    assert found.kinds == [*policies, PAGE_DATA, TSC_INFO, HVM_CONTEXT, HVM_PARAMS, END]


def test_what_is_not_needed_is_left_out() -> None:
    found = parse(stream(cpuid=b"", msrs=b"", params={}))
    assert found.kinds == [STATIC_DATA_END, PAGE_DATA, HVM_CONTEXT, HVM_PARAMS, END]
    assert found.params == {}


@pytest.mark.parametrize(
    ("pages", "sizes"),
    [(0, []), (1, [1]), (1023, [1023]), (1024, [1024]), (1025, [1024, 1]), (2048, [1024] * 2)],
)
def test_memory_is_populated_in_batches_of_four_mebibytes(pages: int, sizes: list[int]) -> None:
    found = parse(stream(gfns=iter(range(pages))))
    assert [len(batch) for batch in found.batches] == sizes
    assert [gfn for batch in found.batches for gfn in batch] == list(range(pages))


def test_memory_is_not_asked_for_before_it_is_written() -> None:
    asked = []

    def gfns() -> Iterable[int]:
        for gfn in range(4096):
            asked.append(gfn)
            yield gfn

    pieces = iter(stream(gfns=gfns()))
    largest = 0
    for piece in pieces:
        largest = max(largest, len(piece))
        if len(asked) > 0:
            break
    assert len(asked) == 1024
    assert largest < 2 * 8 * 1024


@given(
    gfns=st.sets(st.integers(0, (1 << 40) - 1), max_size=3000),
    context=st.binary(max_size=64),
    params=st.dictionaries(st.integers(0, 40), st.integers(0, (1 << 64) - 1)),
    config=st.dictionaries(st.text(), st.text(), max_size=3),
)
def test_any_guest(
    gfns: set[int], context: bytes, params: dict[int, int], config: dict[str, str]
) -> None:
    found = parse(stream(gfns=sorted(gfns), context=context, params=params, config=config))
    assert [gfn for batch in found.batches for gfn in batch] == sorted(gfns)
    assert (found.bodies[HVM_CONTEXT], found.params, found.config) == (context, params, config)
