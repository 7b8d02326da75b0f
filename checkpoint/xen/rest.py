# SPDX-License-Identifier: Apache-2.0
"""Whether a paused guest is at a point from which it can go on elsewhere.

What is looked at is written down before the guest is paused; it waits while we look.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterable

from checkpoint import native
from checkpoint.errors import NotQuiescent
from checkpoint.guest.clock import timekeeping_rests
from checkpoint.guest.conditions import equals, words
from checkpoint.guest.layout import LinuxLayout
from checkpoint.guest.memory import PhysicalMemory
from checkpoint.guest.xenstore import xenstore_rests
from checkpoint.xen import rings
from checkpoint.xen.context import Context

_POINTER = struct.Struct("<Q")
#: words of one condition (:func:`checkpoint.native.first_unmet`)
_WORDS = 3


class Rest:
    """Judge of one guest's pause points.

    :param ram: its memory from frame 0 on, mapped
    :param memory: the same
    :ivar conditions: what must hold, for :func:`checkpoint.native.first_unmet`
    :ivar clock_code: the :func:`borders` of the code that reads the clock
    :ivar rereads: addresses there at which a pause does no harm
    :ivar context_size: bytes of the last context
    :ivar pointers_at: where in it the instruction pointers are
    """

    def __init__(self, ram: memoryview, memory: PhysicalMemory, layout: LinuxLayout) -> None:
        self._ram = ram
        self._memory = memory
        self._layout = layout
        self.conditions = array("Q")
        self._reasons: list[str] = []
        self.clock_code = borders(layout.clock.code)
        self.rereads = layout.clock.rereads
        self.context_size = 0
        self.pointers_at: list[int] = []

    def prepare(self, fifo_pages: int) -> None:
        """Write down what must hold.

        :param fifo_pages: pages of FIFO event words that are to be copied; 0 without FIFO events
        :raise GuestMemoryError: the guest has no memory where its kernel should have a variable
        """
        layout = self._layout
        groups = {
            "while it updated its clock": timekeeping_rests(layout),
            "in a conversation with xenstore": xenstore_rests(layout),
        }
        if layout.fifo is not None:
            groups["when it had just added a page of event channels"] = [
                equals(layout.fifo.pages, 4, fifo_pages)
            ]
        self.conditions, self._reasons = array("Q"), []
        for reason, conditions in groups.items():
            compiled = words(conditions, self._memory)
            self.conditions += compiled
            self._reasons += [reason] * (len(compiled) // _WORDS)

    def check(self, context: bytes, store_page: bytes) -> None:
        """Look whether this pause point will do.

        :param context: of the paused guest
        :param store_page: the copy of the xenstore ring that goes with the checkpoint: xenstored
            may put an event into the live one at any time
        :raise NotQuiescent: the guest itself is in the middle of something that cannot move
        """
        if len(context) != self.context_size:  # a vCPU came up or went down
            self.pointers_at = Context(context).instruction_pointers_at()
            self.context_size = len(context)
        for at in self.pointers_at:
            (pointer,) = _POINTER.unpack_from(context, at)
            if bisect_right(self.clock_code, pointer) & 1 and pointer not in self.rereads:
                raise NotQuiescent("the guest was paused while it read its clock")
        unmet = native.first_unmet(self._ram, self.conditions)
        if unmet >= 0:
            raise NotQuiescent(f"the guest was paused {self._reasons[unmet]}")
        if not rings.xenstore_empty(store_page):
            raise NotQuiescent("the guest was paused in a conversation with xenstore")


def borders(ranges: Iterable[tuple[int, int]]) -> list[int]:
    """First and end of each range, ascending, ranges that touch joined: a number lies in one of
    them when an odd number of borders is at or below it.
    """
    out: list[int] = []
    for first, end in sorted(ranges):
        if first >= end:
            continue
        if out and first <= out[-1]:
            out[-1] = max(out[-1], end)
        else:
            out += [first, end]
    return out
