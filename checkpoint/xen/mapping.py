# SPDX-License-Identifier: Apache-2.0
"""Foreign mappings: a domain's memory as a buffer in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from checkpoint.driver import PAGE_SIZE
from checkpoint.errors import HypervisorError
from checkpoint.guest.memory import PAGE_SHIFT, GuestMemoryError, RamView
from checkpoint.xen.libs import Libraries, ffi, libraries

_PROT_READ, _PROT_WRITE = 1, 2
#: mmap(2): MAP_FIXED; MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
_MAP_FIXED, _MAP_RESERVE = 0x10, 0x02 | 0x20 | 0x4000

#: frames mapped by one call
_PIECE = 512

#: XENMEM_resource_grant_table and its id for shared frames (xen/include/public/memory.h)
_RESOURCE_GRANT_TABLE, _GRANT_SHARED = 1, 0


#: Frames below 4 GiB that are no RAM of a PVH guest: ACPI tables, local APIC, special pages.  What
#: does not fit below goes on behind it (``libxl__build_hvm`` in ``libxl_dom.c``).
MMIO_HOLE: Final = range(0xFC000, 0x100000)


def end_of_ram(pages: int) -> int:
    """The frame behind the RAM of a PVH guest of so many pages."""
    return pages if pages <= MMIO_HOLE.start else pages + len(MMIO_HOLE)


def map_ram(domid: int, end: int, *, writable: bool = False) -> Mapping:
    """All of a guest's RAM, below frame ``end``, each page at its own place.

    What is no RAM in between is memory of nobody: whoever writes there harms nobody.
    """
    return Mapping(domid, range(end), writable=writable, allow_holes=True, left_out=MMIO_HOLE)


class Mapping:
    """Guest frames mapped side by side.

    :ivar view: the memory, ``len(gfns) * PAGE_SIZE`` bytes; it changes while the domain runs
    :ivar holes: indices of frames that the domain does not have; touching them faults
    """

    def __init__(
        self,
        domid: int,
        gfns: Sequence[int],
        *,
        writable: bool = False,
        allow_holes: bool = False,
        left_out: range = range(0),
        libs: Libraries | None = None,
    ) -> None:
        """Map ``gfns`` of domain ``domid``.

        :param left_out: counts as holes, whatever is there; whole pieces of 512 of ``gfns``
        :raise HypervisorError: when Xen refuses, or a frame is missing without ``allow_holes``
        """
        self._libs = libs or libraries()
        self._count = len(gfns)
        self._prot = _PROT_READ | (_PROT_WRITE if writable else 0)
        errors = ffi.new("int[]", _PIECE)
        self.holes: list[int] = []
        self._address: Any = self._reserve()
        # In pieces: mapping a page costs the kernel so much that one call for a whole guest would
        # keep a processor from everything else, heartbeats included, for a second or more.
        for start in range(0, self._count, _PIECE):
            frames = gfns[start : start + _PIECE]
            if frames[0] in left_out:
                self.holes += range(start, start + len(frames))
                continue
            piece = ffi.new("xen_pfn_t[]", list(frames))
            result = self._libs.fmem.xenforeignmemory_map2(
                self._libs.fmemh, domid, self._at(start), self._prot, _MAP_FIXED,
                len(piece), piece, errors,
            )  # fmt: skip
            if result == ffi.NULL:
                error = ffi.errno
                self.close()
                raise HypervisorError(
                    "xenforeignmemory_map2", error, f"{self._count} frames of domain {domid}"
                )
            missing = [i for i, error in enumerate(errors[0 : len(piece)]) if error]
            if missing and not allow_holes:
                error = -errors[missing[0]]
                self.close()
                raise HypervisorError(
                    "xenforeignmemory_map2", error, f"guest frame {frames[missing[0]]:#x}"
                )
            self.holes += [start + i for i in missing]
        self.view = memoryview(ffi.buffer(self._address, self._count * PAGE_SIZE)).cast("B")
        if not writable:
            self.view = self.view.toreadonly()

    def _reserve(self) -> Any:
        """Address space for all the frames."""
        size = self._count * PAGE_SIZE
        address = self._libs.libc.mmap(ffi.NULL, size, self._prot, _MAP_RESERVE, -1, 0)
        if int(ffi.cast("intptr_t", address)) == -1:
            raise HypervisorError("mmap", ffi.errno, f"{self._count} pages of address space")
        return address

    def _at(self, index: int) -> Any:
        return ffi.cast("char *", self._address) + index * PAGE_SIZE

    def page(self, index: int) -> memoryview:
        """The ``index``-th mapped frame."""
        return self.view[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]

    def close(self) -> None:
        """Unmap (idempotent).  The view must not be used afterwards."""
        if self._address is not None:
            self._libs.fmem.xenforeignmemory_unmap(self._libs.fmemh, self._address, self._count)
            self._address = None


class PresentRam:
    """:class:`checkpoint.guest.memory.PhysicalMemory` over a mapping of guest RAM with holes.

    What is read there leads to where the guest says, so that a hole must be no more than an error.

    :param mapping: the guest's frames from 0 on
    """

    def __init__(self, mapping: Mapping) -> None:
        self._ram = RamView(mapping.view)
        self._holes = frozenset(mapping.holes)
        self._end = len(mapping.view)

    def read(self, pa: int, length: int) -> bytes:
        """See :class:`checkpoint.guest.memory.PhysicalMemory`."""
        self._check(pa, length)
        return self._ram.read(pa, length)

    def write(self, pa: int, data: bytes) -> None:
        """See :class:`checkpoint.guest.memory.PhysicalMemory`."""
        self._check(pa, len(data))
        self._ram.write(pa, data)

    def _check(self, pa: int, length: int) -> None:
        if not self._holes or pa < 0 or pa + length > self._end:
            return
        first, last = pa >> PAGE_SHIFT, pa + length - 1 >> PAGE_SHIFT
        # Within one page, as nearly all are: asked for while the guest is paused.
        touches = (
            first in self._holes
            if first == last
            else not self._holes.isdisjoint(range(first, last + 1))
        )
        if touches:
            raise GuestMemoryError(
                f"{length} bytes at guest physical address {pa:#x} are in a hole of guest RAM"
            )


class GrantFrames:
    """The shared frames of a domain's grant table, mapped as a resource.

    :ivar view: ``frames * PAGE_SIZE`` bytes of grant entries
    """

    def __init__(
        self, domid: int, frames: int, *, writable: bool = False, libs: Libraries | None = None
    ) -> None:
        self._libs = libs or libraries()
        address = ffi.new("void **")
        prot = _PROT_READ | (_PROT_WRITE if writable else 0)
        self._handle: Any = self._libs.fmem.xenforeignmemory_map_resource(
            self._libs.fmemh, domid, _RESOURCE_GRANT_TABLE, _GRANT_SHARED, 0, frames,
            address, prot, 0,
        )  # fmt: skip
        if self._handle == ffi.NULL:
            raise HypervisorError(
                "xenforeignmemory_map_resource", ffi.errno, f"grant table of domain {domid}"
            )
        self.frames = frames
        self.view = memoryview(ffi.buffer(address[0], frames * PAGE_SIZE)).cast("B")
        if not writable:
            self.view = self.view.toreadonly()

    def close(self) -> None:
        """Unmap (idempotent)."""
        if self._handle is not None:
            self._libs.fmem.xenforeignmemory_unmap_resource(self._libs.fmemh, self._handle)
            self._handle = None
