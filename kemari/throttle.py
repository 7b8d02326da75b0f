# SPDX-License-Identifier: Apache-2.0
"""How long a guest may go on while an epoch is in flight.  Pure.

What it changes in that time is the next epoch.  Where it changes more than link and standby take in
the same time, each epoch would be larger than the one before.  So it has to wait for an ack that
takes long, and the longer a large epoch took, the shorter it may go on during the next, until
epochs take about as long as they may.  Each wait is then of that size, too.

A small epoch takes what it takes: the way there and back, and busy hosts.  No guest would make that
shorter by standing still, so it may go on for as long, whatever that is.
"""

from __future__ import annotations

from typing import Final

#: Share of the standby's heartbeat time that an epoch may take for its size.
LATE: Final = 0.5
#: Least time that a guest may go on, as a share of that.
LEAST: Final = 0.02
#: At most so many times less from one epoch to the next, and so many times more: one epoch may have
#: been slow for another reason.
STEP: Final = 4.0
#: Bytes on the wire up to which an epoch is a small one.
SMALL: Final = 64 << 10


class Throttle:
    """See the module's text.

    :param heartbeat: of the standby, seconds
    """

    def __init__(self, heartbeat: float) -> None:
        self._most = self._share = heartbeat * LATE
        self._way = 0.0

    @property
    def patience(self) -> float:
        """Seconds from sending an epoch on, after which the guest waits for its ack."""
        return self._way + self._share

    def acked(self, took: float, size: int) -> None:
        """An epoch was acknowledged.

        :param took: seconds since it was sent
        :param size: bytes on the wire
        """
        if size <= SMALL:
            self._way = took
        limit = self._way + self._most
        better = self._share * limit / max(took, limit / STEP)
        self._share = max(self._most * LEAST, self._share / STEP, min(better, self._most))
