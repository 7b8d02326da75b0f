# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint is whole: a look at all that it leaves out, for tests on real hosts.

While the guest stands still, every page that its epoch does not have is compared with the
reference, which is what the standby has of it.  Backends go on while the guest stands still: what
they write then is in the next epoch.  A page that differs and is not in that one either was lost,
and a failover would run the guest with an older page among the others.

A look takes as long as it takes to compare all of the guest's memory; the guest waits.  None is
made unless one was asked for by :func:`arm`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

from checkpoint.codec import Encoder
from checkpoint.driver import PAGE_SIZE, Staging

log = logging.getLogger(__name__)

#: pages that are compared at once
_MOST = 256

_interval: float | None = None


def arm(interval: float | None) -> None:
    """Have the checkpoints of every protection that begins looked at.

    :param interval: seconds between the end of a look and the next one; None: no more
    """
    global _interval
    _interval = interval


def audit(guest: str, encoder: Encoder) -> Audit | None:
    """One for a protection that begins, if looks were asked for."""
    return None if _interval is None else Audit(guest, encoder, _interval)


class Audit:
    """Looks at a guest's checkpoints, and logs what it finds.

    :param guest: its name
    :param encoder: of the protection; it has encoded every epoch before the one that is looked at
    :param interval: see :func:`arm`
    :ivar looks: how many were made
    :ivar lost: pages whose change no epoch had
    """

    def __init__(self, guest: str, encoder: Encoder, interval: float) -> None:
        self.looks = 0
        self.lost = 0
        self._guest = guest
        self._encoder = encoder
        self._interval = interval
        self._looked = float("-inf")
        self._late: set[int] = set()

    def __call__(self, memory: memoryview, staging: Staging, absent: Sequence[int]) -> None:
        """Look at an epoch, if it is time.

        :param memory: all of the guest, which stands still
        :param staging: the epoch's pages
        :param absent: frames without memory, ascending
        """
        staged = set(staging.gfns[: staging.count])
        for gfn in sorted(self._late - staged):
            self.lost += 1
            log.error("%s: the change of page %#x was LOST", self._guest, gfn)
        self._late.clear()
        began = time.monotonic()
        if began - self._looked < self._interval:
            return
        for first, last in _present(len(memory) // PAGE_SIZE, absent):
            part = memory[first * PAGE_SIZE : last * PAGE_SIZE]
            self._late.update(self._encoder.unlike(first, part))
        self._late -= staged
        self.looks += 1
        self._looked = time.monotonic()
        log.info(
            "%s: look %d at an epoch of %d pages: %d others have changed meanwhile (%.0f ms)",
            self._guest, self.looks, staging.count, len(self._late), 1000 * (self._looked - began),
        )  # fmt: skip


def _present(pages: int, absent: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The frames that there are, as (first, last + 1), at most :data:`_MOST` at a time."""
    first = 0
    for gfn in (*absent, pages):
        end = min(gfn, pages)
        for start in range(first, end, _MOST):
            yield start, min(start + _MOST, end)
        first = gfn + 1
