# SPDX-License-Identifier: Apache-2.0
"""A shell's first vCPU, borrowed to make hypercalls that only the guest itself may make."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from checkpoint.driver import PAGE_SIZE
from checkpoint.errors import ReviveError
from checkpoint.xen import stub
from checkpoint.xen.context import Context
from checkpoint.xen.control import Domain

#: Guest frames that the stub borrows: low RAM that every PVH guest has.
_GFN: Final = 0x20
#: Seconds that the stub may take.
_BOUND: Final = 10.0
#: Seconds between two looks whether the shell is still there.
_LOOK: Final = 0.1


class Borrowed:
    """The vCPU while it is borrowed; see :func:`borrowed`."""

    def __init__(self, domain: Domain, context: Context, area: memoryview, *, intel: bool) -> None:
        self._domain = domain
        self._area = area
        self._base = _GFN * PAGE_SIZE
        self._intel = intel
        started = Context(context.only_boot_vcpu())
        started.start_flat(0, self._base)
        self._started = started.to_bytes()

    def make(self, calls: Sequence[stub.Call]) -> None:
        """Make these hypercalls, :data:`stub.MOST_CALLS` of them at most.

        :raise ReviveError: one of them failed, or the vCPU did not come to their end
        """
        self._area[:] = stub.assemble(calls, self._base, intel=self._intel)
        self._domain.set_context(self._started)
        self._domain.unpause()
        try:
            self._await_end()
        finally:
            if self._exists():
                self._domain.pause()
        stub.check_results(self._area, calls)

    def _await_end(self) -> None:
        began = looked = time.monotonic()
        while not stub.finished(self._area):
            now = time.monotonic()
            if now - began > _BOUND:
                raise ReviveError(f"the revive stub did not end within {_BOUND} s")
            if now - looked > _LOOK:
                looked = now
                if not self._exists():
                    raise ReviveError("the shell did not survive the revive stub")
            os.sched_yield()

    def _exists(self) -> bool:
        info = self._domain.info()
        return info is not None and not info.dying and not info.shutdown


@contextmanager
def borrowed(
    domain: Domain, context: Context, memory: memoryview, *, intel: bool
) -> Iterator[Borrowed]:
    """Borrow vCPU 0 of a paused shell; memory is as before after it, the vCPU's state is not.

    :param context: a state of the vCPU that its processor can have
    :param memory: all of the shell's RAM
    :param intel: whether this host's processors are Intel's
    """
    area = memory[_GFN * PAGE_SIZE : (_GFN + stub.STUB_PAGES) * PAGE_SIZE]
    saved = bytes(area)
    try:
        yield Borrowed(domain, context, area, intel=intel)
    finally:
        area[:] = saved


def rehearse(domain: Domain, memory: memoryview, port: int) -> None:
    """Have a shell make one call that changes nothing.

    What it needs of this host's Xen is found missing while the guest still runs elsewhere.  And the
    first steps of a domain take longer than all later ones, in the lab by 0.1 s, which is better
    spent now than when the world waits.

    :param port: an event channel that the shell has
    :raise ReviveError: it could not; the shell is of no use
    """
    before = domain.get_context()
    with borrowed(domain, Context(before), memory, intel=vendor_is_intel()) as vcpu:
        vcpu.make([stub.status(port)])
    domain.set_context(before)


def vendor_is_intel(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this host's processors are Intel's; takes the kernel a while to tell."""
    return "GenuineIntel" in cpuinfo.read_text()
