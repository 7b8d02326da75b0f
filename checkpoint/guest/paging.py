# SPDX-License-Identifier: Apache-2.0
"""x86-64 page tables: from guest virtual to guest physical addresses.

Long mode only (4 levels, or 5 with CR4.LA57), as in the Intel SDM volume 3, 4.5 and the AMD APM
volume 2, 5.3.  Accessed and dirty bits are left alone; protection bits are not checked, since the
readers here look at the kernel from outside.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from checkpoint.guest.memory import PAGE_MASK, PAGE_SIZE, GuestMemoryError, PhysicalMemory

CR4_LA57 = 1 << 12

_PRESENT = 1 << 0
_LARGE = 1 << 7
_FRAME = 0x000F_FFFF_FFFF_F000
_TABLE = struct.Struct("<512Q")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class NotMappedError(GuestMemoryError):
    """The guest's page tables have no mapping for a virtual address."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A range mapped one to one: ``va + n`` is at ``pa + n`` for every ``n < length`` (bytes)."""

    va: int
    pa: int
    length: int


class AddressSpace:
    """The virtual addresses of one set of guest page tables.

    :param root: guest physical address of the top table; its low 12 bits are ignored, so CR3 will
        do as it is
    :param la57: five levels instead of four (bit 12 of CR4)
    """

    __slots__ = ("_top_shift", "la57", "memory", "root")

    def __init__(self, memory: PhysicalMemory, root: int, *, la57: bool = False) -> None:
        self.memory = memory
        self.root = root & _FRAME
        self.la57 = la57
        self._top_shift = 48 if la57 else 39

    def translate(self, va: int) -> int:
        """Guest physical address of ``va``.

        :raise NotMappedError: no page there, or the address is not canonical
        :raise GuestMemoryError: a table lies outside of guest RAM
        """
        sign = self._top_shift + 8
        if va >> sign not in (0, (1 << (64 - sign)) - 1):
            raise NotMappedError(f"virtual address {va:#x} is not canonical")
        table = self.root
        shift = self._top_shift
        while True:
            (entry,) = _U64.unpack(self.memory.read(table + ((va >> shift) & 511) * 8, 8))
            if not entry & _PRESENT:
                raise NotMappedError(f"the guest has no page at virtual address {va:#x}")
            if shift == 12 or (shift <= 30 and entry & _LARGE):
                inside = (1 << shift) - 1
                return int((entry & _FRAME & ~inside) | (va & inside))
            table = entry & _FRAME
            shift -= 9

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """What is mapped in [start, stop), ascending, neighbours joined where they continue.

        The range must not cross the canonical hole.  Time is bounded by the range: at most one
        table per 2 MiB of it is read.

        :raise GuestMemoryError: a table lies outside of guest RAM
        """
        held: Extent | None = None
        for va, pa, length in self._leaves(self.root, self._top_shift, start, stop):
            if held and held.va + held.length == va and held.pa + held.length == pa:
                held = Extent(held.va, held.pa, held.length + length)
                continue
            if held:
                yield held
            held = Extent(va, pa, length)
        if held:
            yield held

    def _leaves(
        self, table: int, shift: int, start: int, stop: int
    ) -> Iterator[tuple[int, int, int]]:
        """Single pages in [start, stop), of which all lie under ``table``, cut to that range."""
        entries = _TABLE.unpack(self.memory.read(table, PAGE_SIZE))
        size = 1 << shift
        base = start & -size
        while base < stop:
            entry = entries[(base >> shift) & 511]
            if entry & _PRESENT:
                low, high = max(base, start), min(base + size, stop)
                if shift == 12 or (shift <= 30 and entry & _LARGE):
                    yield low, (entry & _FRAME & -size) + low - base, high - low
                else:
                    yield from self._leaves(entry & _FRAME, shift - 9, low, high)
            base += size

    def read(self, va: int, length: int) -> bytes:
        """``length`` bytes from virtual address ``va``, across pages.

        :raise GuestMemoryError: part of it is not mapped or not RAM
        """
        first = min(length, PAGE_SIZE - (va & PAGE_MASK))
        data = self.memory.read(self.translate(va), first)
        if first == length:
            return data
        parts = [data]
        done = first
        while done < length:
            step = min(PAGE_SIZE, length - done)
            parts.append(self.memory.read(self.translate(va + done), step))
            done += step
        return b"".join(parts)

    def u32(self, va: int) -> int:
        """The unsigned little-endian 32-bit number at ``va``."""
        return int(_U32.unpack(self.read(va, 4))[0])

    def u64(self, va: int) -> int:
        """The unsigned little-endian 64-bit number at ``va``."""
        return int(_U64.unpack(self.read(va, 8))[0])

    def cstring(self, va: int, limit: int = 256) -> str:
        """The NUL-terminated string at ``va``, at most ``limit`` bytes, undecodable bytes escaped.

        :raise GuestMemoryError: no NUL within ``limit`` bytes, or not mapped
        """
        parts: list[bytes] = []
        done = 0
        while done < limit:
            step = min(limit - done, PAGE_SIZE - ((va + done) & PAGE_MASK), 64)
            part = self.memory.read(self.translate(va + done), step)
            end = part.find(0)
            if end >= 0:
                parts.append(part[:end])
                return b"".join(parts).decode("utf-8", "backslashreplace")
            parts.append(part)
            done += step
        raise GuestMemoryError(f"no string ends within {limit} bytes from virtual address {va:#x}")
