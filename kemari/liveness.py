# SPDX-License-Identifier: Apache-2.0
"""Whether the other host lives, judged from several paths.  :class:`Watch` has no clock.

A *path* is one connection to the other host: the replication link, and one small connection for
each further address of it.  *Evidence of life* is anything that only a living kernel over there
can have sent: bytes, an end of stream, a reset, a refused connection.  So a daemon that dies is not
mistaken for a host that dies: its kernel closes its connections.

The verdicts:

- ``DEAD``: no evidence on any path for the time-out.
- ``LINK_DEAD``: the replication link has been silent for the time-out, and *after that* another
  path still brought evidence.  The order matters: in a power cut the paths fall silent within one
  beat of each other, and the one that fell silent last must not pass for a living host.
- ``ALIVE``: otherwise.

A process that was itself stopped or busy hears nothing either.  ``tick`` is called when it is due,
at a steady pace and at the very end of the time-out; when it comes late, the lateness is not
counted as the other host's silence.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from checkpoint.turns import next_turn, sleep_until

#: Beats per time-out: one lost or late beat does not matter.
BEATS: Final = 5

#: Beats that have not come when a death is suspected: what may be of use then is prepared.
_SUSPICIOUS: Final = 2

#: Seconds between two ticks at least: more than what is lost in arithmetic.
_SHORTEST: Final = 0.001

#: Name of the replication link among the paths.
REPLICATION: Final = "replication"


class Verdict(enum.Enum):
    """What is known about the other host; the value says it of the host."""

    ALIVE = "is alive"
    LINK_DEAD = "is silent on the replication link but alive on another path"
    DEAD = "is silent on every path"


@dataclass(slots=True)
class _Path:
    evidence: float
    open: bool = True


class Watch:
    """Evidence of life of one host.

    All times are seconds on one monotonic clock.

    :param timeout: seconds of silence that mean death
    :param now: the time at which watching begins; counts as evidence
    :ivar due: when :meth:`tick` is to be called next
    """

    def __init__(self, timeout: float, now: float) -> None:
        self.timeout = timeout
        self._paths: dict[str, _Path] = {REPLICATION: _Path(now)}
        self.due = next_turn(now, self.pace)

    @property
    def pace(self) -> float:
        """Seconds between two calls of :meth:`tick` at most, and between two beats sent."""
        return self.timeout / BEATS

    @property
    def paths(self) -> dict[str, float]:
        """Path name -> time of its last evidence."""
        return {name: path.evidence for name, path in self._paths.items()}

    def heard(self, path: str, when: float) -> None:
        """Evidence on ``path`` at ``when``; a path not known yet is added."""
        known = self._paths.setdefault(path, _Path(when))
        known.evidence = max(known.evidence, when)
        known.open = True

    def closed(self, path: str, when: float) -> None:
        """``path`` was closed by the other side: that is evidence, and the path falls silent."""
        self.heard(path, when)
        self._paths[path].open = False

    def tick(self, now: float) -> Verdict:
        """Judge.  To be called at :attr:`due`.

        Evidence that arrived must be reported before the tick that follows it.
        """
        late = now - self.due
        if late > self.pace / 2:
            # We slept: what the others sent meanwhile may still lie unread in our sockets.
            for path in self._paths.values():
                path.evidence = min(now, path.evidence + late)
        left = self.timeout - self.silence(now)
        self.due = next_turn(now, self.pace)
        if left > 0:
            self.due = min(self.due, now + max(left, _SHORTEST))
        return self._verdict(now)

    def _verdict(self, now: float) -> Verdict:
        latest = max(path.evidence for path in self._paths.values())
        if now - latest >= self.timeout:
            return Verdict.DEAD
        link = self._paths[REPLICATION]
        if link.open and latest - link.evidence >= self.timeout:
            return Verdict.LINK_DEAD
        return Verdict.ALIVE

    def silence(self, now: float) -> float:
        """Seconds since the last evidence on any path."""
        return now - max(path.evidence for path in self._paths.values())


def suspected(silence: float, timeout: float) -> bool:
    """Whether a death may be what follows.

    :param silence: seconds without a sign of life
    :param timeout: seconds of silence that mean death
    """
    return silence >= timeout * _SUSPICIOUS / BEATS


async def until_silent(
    watch: Watch, evidence: Callable[[], Mapping[str, float]], over: Callable[[], bool]
) -> Verdict | None:
    """Watch the other host until it is silent, on the replication link or on every path.

    :param evidence: asked at each tick: path name -> time of its last evidence
    :param over: asked at each tick: nobody wants to know any more
    :return: what is known then; None if it is over
    """
    while not over():
        await sleep_until(watch.due)
        for path, when in evidence().items():
            watch.heard(path, when)
        verdict = watch.tick(time.monotonic())
        if verdict is not Verdict.ALIVE:
            return None if over() else verdict
    return None
