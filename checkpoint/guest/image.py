# SPDX-License-Identifier: Apache-2.0
"""The running kernel's image: where the bytes of ``vmlinux`` are in guest memory.

On x86-64 the image lies in one piece both in physical memory and in the virtual window of
``__START_KERNEL_map`` (Documentation/arch/x86/x86_64/mm.rst), so one known pair of addresses gives
all of them.  The pair comes from MSR LSTAR, the kernel's system call entry.
"""

from __future__ import annotations

from collections.abc import Iterator

from checkpoint.errors import UnsupportedGuest
from checkpoint.guest.memory import GuestMemoryError, PhysicalMemory
from checkpoint.guest.paging import AddressSpace, Extent

KERNEL_MAP = 0xFFFF_FFFF_8000_0000
"""First address that a kernel image can have (``__START_KERNEL_map``)."""
KERNEL_MAP_END = 0xFFFF_FFFF_C000_0000
"""End of the window that the image can lie in (``KERNEL_IMAGE_SIZE`` with KASLR: 1 GiB)."""

_LARGEST = 256 << 20
_STEP = 1 << 20
_USER_TABLES = 1 << 12


class KernelImage:
    """The mapped parts of the kernel image around the system call entry.

    :ivar offset: physical minus virtual address, the same for the whole image
    :ivar parts: its mapped ranges, ascending; there may be holes (freed init memory)
    """

    __slots__ = ("_memory", "lstar", "offset", "parts")

    def __init__(self, space: AddressSpace, lstar: int) -> None:
        """Find the image through the page tables ``space``.

        :raise UnsupportedGuest: there is no kernel image around ``lstar``
        """
        if not KERNEL_MAP <= lstar < KERNEL_MAP_END:
            raise UnsupportedGuest(
                f"the guest's system call entry (LSTAR) is {lstar:#x}, which is not in a 64-bit "
                "Linux kernel's image: only guests that have booted such a kernel are supported"
            )
        self._memory = space.memory
        self.lstar = lstar
        self.offset = space.translate(lstar) - lstar
        self.parts: list[Extent] = []
        total = 0
        for part in space.extents(KERNEL_MAP, KERNEL_MAP_END):
            if part.pa - part.va == self.offset:
                self.parts.append(part)
                total += part.length
        if total > _LARGEST:
            raise UnsupportedGuest(
                f"{total >> 20} MiB are mapped as the guest kernel's image, which is expected to "
                f"have at most {_LARGEST >> 20} MiB"
            )

    def physical(self, va: int) -> int:
        """Physical address of an address in the image; mapped or not is not checked."""
        return va + self.offset

    def rest(self, va: int) -> int:
        """How many bytes from ``va`` on are mapped in one piece; 0 if it is not in the image."""
        for part in self.parts:
            if part.va <= va < part.va + part.length:
                return part.va + part.length - va
        return 0

    def read(self, va: int, length: int) -> bytes:
        """``length`` bytes of the image from ``va`` on.

        :raise GuestMemoryError: they are not all mapped as part of the image
        """
        if length < 0 or self.rest(va) < length:
            raise GuestMemoryError(
                f"{length} bytes at {va:#x} are not all within the guest kernel's image"
            )
        return self._memory.read(va + self.offset, length)

    def before(self, va: int, length: int) -> bytes:
        """The bytes that end just before ``va``: ``length``, or fewer where the part begins."""
        for part in self.parts:
            if part.va < va <= part.va + part.length:
                length = min(length, va - part.va)
                return self._memory.read(va - length + self.offset, length)
        return b""

    def find(self, pattern: bytes) -> Iterator[int]:
        """Addresses at which ``pattern`` stands, those above the system call entry first.

        Read-only data follows the text, so that this order finds it soon.
        """
        above = [part for part in self.parts if part.va + part.length > self.lstar]
        below = [part for part in self.parts if part.va + part.length <= self.lstar]
        keep = len(pattern) - 1
        for part in above + below:
            tail = b""
            for at in range(0, part.length, _STEP):
                step = min(_STEP, part.length - at)
                data = tail + self._memory.read(part.pa + at, step)
                hit = data.find(pattern)
                while hit >= 0:
                    yield part.va + at - len(tail) + hit
                    hit = data.find(pattern, hit + 1)
                tail = data[-keep:] if keep else b""


def images(memory: PhysicalMemory, cr3: int, lstar: int, *, la57: bool) -> Iterator[KernelImage]:
    """The kernel image as seen through CR3, at most two views of it.

    With page-table isolation a virtual CPU that was paused in user mode has the user's half of a
    pair of top tables in CR3 (bit 12 set, arch/x86/entry/calling.h), in which only part of the
    kernel is mapped; the kernel's half is the page before.

    :raise UnsupportedGuest: neither leads to a kernel image
    """
    roots = [cr3, cr3 & ~_USER_TABLES] if cr3 & _USER_TABLES else [cr3]
    problem: UnsupportedGuest | None = None
    found = False
    for root in roots:
        try:
            image = KernelImage(AddressSpace(memory, root, la57=la57), lstar)
        except UnsupportedGuest as error:
            problem = problem or error
            continue
        found = True
        yield image
    if not found and problem:
        raise problem
