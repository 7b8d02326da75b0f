# SPDX-License-Identifier: Apache-2.0
"""How long a guest may go on while an epoch is in flight.  Pure.

What it changes in that time is the next epoch.  Where it changes more than link and standby take in
the same time, each epoch would be larger than the one before.  So it has to wait for an ack that
takes long, and the longer an epoch took, the shorter it may go on during the next, until epochs
take about as long as they may.  Each wait is then of that size, too.
"""

from __future__ import annotations

from typing import Final

#: Share of the standby's heartbeat time that an epoch may take, from its sending to its ack.
LATE: Final = 0.5
#: Least time that a guest may go on, as a share of that.
LEAST: Final = 0.02
#: At most so many times less from one epoch to the next, and so many times more: one epoch may have
#: been slow for another reason.
STEP: Final = 4.0


class Throttle:
    """See the module's text.

    :param heartbeat: of the standby, seconds
    :ivar patience: seconds from sending an epoch on, after which the guest waits for its ack
    """

    def __init__(self, heartbeat: float) -> None:
        self._most = heartbeat * LATE
        self.patience = self._most

    def acked(self, took: float) -> None:
        """An epoch was acknowledged.

        :param took: seconds since it was sent
        """
        better = self.patience * self._most / max(took, self._most / STEP)
        self.patience = max(self._most * LEAST, self.patience / STEP, min(better, self._most))
