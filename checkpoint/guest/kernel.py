# SPDX-License-Identifier: Apache-2.0
"""A running kernel: its symbols together with its own page tables."""

from __future__ import annotations

from checkpoint.errors import UnsupportedGuest
from checkpoint.guest.kallsyms import Symbols
from checkpoint.guest.memory import PAGE_MASK, PAGE_SIZE, PhysicalMemory
from checkpoint.guest.paging import AddressSpace

_WORD = (1 << 64) - 1
_LARGEST = 1 << 20


class Kernel:
    """Looks up what is behind a kernel's symbols, whatever process its CPUs run.

    :ivar symbols: the symbol table
    :ivar space: the kernel's own virtual addresses (``init_top_pgt``, arch/x86/kernel/head_64.S)
    """

    __slots__ = ("memory", "space", "symbols")

    def __init__(self, symbols: Symbols, memory: PhysicalMemory, *, la57: bool) -> None:
        """:raise UnsupportedGuest: the kernel's page table does not map the kernel"""
        self.symbols = symbols
        self.memory = memory
        root = symbols.image.physical(symbols["init_top_pgt"])
        self.space = AddressSpace(memory, root, la57=la57)
        entry = symbols.image.lstar
        if self.space.translate(entry) != symbols.image.physical(entry):
            raise UnsupportedGuest(
                f"the guest kernel's page table at {root:#x} does not lead to the kernel that its "
                "virtual CPUs run; expected the same image"
            )

    def va(self, name: str, purpose: str) -> int:
        """Virtual address of a symbol; ``purpose`` says what is impossible without it.

        :raise UnsupportedGuest: there is none, or several
        """
        try:
            return self.symbols[name]
        except UnsupportedGuest as error:
            raise UnsupportedGuest(f"{error}, and so {purpose}") from None

    def percpu(self, name: str, cpu: int, purpose: str) -> int:
        """Virtual address of a per-CPU symbol's instance for Linux's CPU ``cpu``."""
        offsets = self.va("__per_cpu_offset", purpose)
        return (self.va(name, purpose) + self.space.u64(offsets + 8 * cpu)) & _WORD

    def place(self, va: int, size: int) -> int:
        """Physical address of ``size`` bytes at ``va``.

        :raise UnsupportedGuest: they are not mapped, or not in one piece
        """
        if size > _LARGEST:
            raise UnsupportedGuest(
                f"the guest's kernel has {size} bytes of data at virtual address {va:#x}; expected "
                f"at most {_LARGEST}"
            )
        pa = self.space.translate(va)
        page = va & ~PAGE_MASK
        while (page := page + PAGE_SIZE) < va + size:
            if self.space.translate(page) != pa + page - va:
                raise UnsupportedGuest(
                    f"the {size} bytes at the guest's virtual address {va:#x} are not in one piece "
                    "in its memory, as is expected of kernel data"
                )
        return pa

    def at(self, name: str, size: int, purpose: str) -> int:
        """Physical address of the ``size`` bytes that a symbol stands for."""
        return self.place(self.va(name, purpose), size)

    def word(self, name: str, purpose: str) -> int:
        """The u32 that a symbol stands for."""
        return self.space.u32(self.va(name, purpose))

    def pointer(self, name: str, purpose: str) -> int:
        """The u64 that a symbol stands for."""
        return self.space.u64(self.va(name, purpose))
