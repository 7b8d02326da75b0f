# SPDX-License-Identifier: Apache-2.0
"""Guest physical memory, as the readers of this package see it.

Everything in a guest's memory is under the guest's control: each access is bounds-checked, and a
bad address is a :class:`GuestMemoryError`, never an ``IndexError`` or a read of something else.
"""

from __future__ import annotations

from typing import Protocol

from checkpoint.errors import UnsupportedGuest

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_MASK = PAGE_SIZE - 1


class GuestMemoryError(UnsupportedGuest):
    """An address in the guest leads to no memory that can be read or written."""


class PhysicalMemory(Protocol):
    """Random access to guest physical memory; addresses and lengths are in bytes."""

    def read(self, pa: int, length: int) -> bytes:
        """Exactly ``length`` bytes from guest physical address ``pa``.

        :raise GuestMemoryError: part of the range is not guest RAM
        """

    def write(self, pa: int, data: bytes) -> None:
        """Replace ``len(data)`` bytes from ``pa`` on; nothing is written on an error.

        :raise GuestMemoryError: part of the range is not guest RAM, or it cannot be written
        """


class RamView:
    """:class:`PhysicalMemory` over one buffer that holds guest RAM from frame 0 on.

    :param ram: bytes-like; the byte at offset ``gfn * 4096 + n`` is byte ``n`` of that frame
    """

    __slots__ = ("_ram",)

    def __init__(self, ram: memoryview | bytearray | bytes) -> None:
        view = memoryview(ram)
        self._ram = view if view.format == "B" and view.ndim == 1 else view.cast("B")

    def read(self, pa: int, length: int) -> bytes:
        if pa < 0 or length < 0 or pa + length > len(self._ram):
            raise self._outside(pa, length)
        return bytes(self._ram[pa : pa + length])

    def write(self, pa: int, data: bytes) -> None:
        if pa < 0 or pa + len(data) > len(self._ram):
            raise self._outside(pa, len(data))
        if self._ram.readonly:
            raise GuestMemoryError("guest memory is mapped read-only here and cannot be written")
        self._ram[pa : pa + len(data)] = data

    def _outside(self, pa: int, length: int) -> GuestMemoryError:
        return GuestMemoryError(
            f"{length} bytes at guest physical address {pa:#x} are outside of guest RAM, "
            f"which ends at {len(self._ram):#x}"
        )
