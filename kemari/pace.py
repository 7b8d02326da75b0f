# SPDX-License-Identifier: Apache-2.0
"""When the next checkpoint may begin.  Pure.

A checkpoint costs the same whether it carries one answer or ten.  Where processors are plenty the
next one begins as soon as the last was acknowledged.  Where guest and Dom0 want the same one,
checkpoints without a pause take it from the guest, which has to make the answers, and from the
backends, which have to carry them: everything takes longer, checkpoints included.  Then the guest
gets a share of the time: after a checkpoint that took long, because processors were short, the next
one waits, and carries what has come meanwhile.

That is the pace ``adaptive``.  An administrator who knows better what a guest is for may choose
that it never waits, or always does.  ``docs/performance.md`` has what that does to latency and
throughput.
"""

from __future__ import annotations

from typing import Final

LATENCY, ADAPTIVE, THROUGHPUT = PACES = ("latency", "adaptive", "throughput")
"""The next checkpoint begins at once; as the processors allow; once the guest has had its time."""

#: The wait for each share of its time that Dom0 has to wait for a processor, in times that a
#: checkpoint takes.  From 0.4 on, as much time is the guest's as a checkpoint takes.
GAIN: Final = 2.5
MOST: Final = 1.0
#: The wait where throughput comes first, in times that a checkpoint takes: it has a quarter.
FREE: Final = 3.0
#: Seconds that a capture is put off at most: an epoch may have taken long for another reason.
LIMIT: Final = 0.050


class Pace:
    """Tells how long to wait before a capture.

    :param pace: one of :data:`PACES`
    """

    def __init__(self, pace: str = ADAPTIVE) -> None:
        self._pace = pace
        self._earliest = 0.0

    def ended(self, now: float, took: float, stolen: float) -> None:
        """A checkpoint was acknowledged.

        :param now: seconds, of any clock that goes on steadily
        :param took: seconds from its pause to its ack
        :param stolen: of the time for which Dom0 wanted a processor, the share that it waited
        """
        match self._pace:
            case "latency":
                times = 0.0
            case "throughput":
                times = FREE
            case _:
                times = min(MOST, GAIN * stolen)
        self._earliest = now + min(took * times, LIMIT)

    def wait(self, now: float) -> float:
        """Seconds until the next capture may begin; none or less: at once."""
        return self._earliest - now
