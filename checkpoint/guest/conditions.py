# SPDX-License-Identifier: Apache-2.0
"""What must hold of words in a paused guest's memory, written down before it is paused.

The guest waits while they are looked at: one call of :func:`checkpoint.native.first_unmet` compares
them all, where reading each through :class:`checkpoint.guest.memory.PhysicalMemory` costs more than
copying a page.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from checkpoint.guest.memory import PhysicalMemory

_WORD = 8


@dataclass(frozen=True, slots=True)
class Condition:
    """That some bits of a number in guest memory have a value.

    :ivar pa: guest physical address of the number
    :ivar size: its bytes, 4 or 8; little-endian
    :ivar mask: the bits
    :ivar value: what they must be
    """

    pa: int
    size: int
    mask: int
    value: int

    def holds(self, memory: PhysicalMemory) -> bool:
        """Whether it does.

        :raise GuestMemoryError: there is no such address
        """
        number = int.from_bytes(memory.read(self.pa, self.size), "little")
        return number & self.mask == self.value


def is_zero(pa: int, size: int) -> Condition:
    """That a number is 0."""
    return equals(pa, size, 0)


def is_even(pa: int) -> Condition:
    """That a sequence counter of 4 bytes is even: nobody is between its two steps."""
    return Condition(pa, 4, 1, 0)


def equals(pa: int, size: int, value: int) -> Condition:
    """That a number is ``value``."""
    return Condition(pa, size, (1 << 8 * size) - 1, value)


def words(conditions: Iterable[Condition], memory: PhysicalMemory) -> array[int]:
    """The same conditions for :func:`checkpoint.native.first_unmet`: (address, mask, value) each.

    :param memory: of the guest; every number is read once, so that the addresses are good
    :raise GuestMemoryError: one of them is not
    """
    out = array("Q")
    for condition in conditions:
        memory.read(condition.pa, condition.size)
        # From whole words, so that none is read from beyond the number's page.
        end = condition.pa + condition.size
        for at in range(condition.pa // _WORD * _WORD, end, _WORD):
            shift = 8 * (condition.pa - at)
            mask, value = (_shifted(n, shift) for n in (condition.mask, condition.value))
            out.extend((at, mask, value))
    return out


def _shifted(number: int, bits: int) -> int:
    moved = number << bits if bits >= 0 else number >> -bits
    return moved & (1 << 8 * _WORD) - 1
