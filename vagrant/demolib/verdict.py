# SPDX-License-Identifier: Apache-2.0
"""Whether a client noticed that the host of its server lost power.  Pure.

A request counts as answered when its answer arrived, since an answer that arrived is what the
outside world knows: each must be there once, in order, and the guest's own count of answers must
agree, on a connection that was never opened again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vagrant.demolib.history import Answer, History, longest_gap

#: Milliseconds by which a guest's clock may have changed against the client's: far below any
#: failover, so that a clock that stood still meanwhile, or was set back, is found.
CLOCK_LIMIT_MS: Final = 250.0
#: Answers on each side of a cut without which nothing can be said about clocks.
ENOUGH: Final = 10
GUEST_CLOCKS: Final = ("mono", "boot")


@dataclass(frozen=True, slots=True)
class Cut:
    """One power cut.

    :ivar protected: when protection was complete
    :ivar at: when power was cut
    :ivar settled: when answers were seen to come again, so that later silences, as while the next
        protection comes about, are not taken for the failover
    """

    protected: float
    at: float
    settled: float = float("inf")


@dataclass(frozen=True, slots=True)
class Resume:
    """When answers came again after a cut.

    :ivar first: the first answer on any connection; None if none came
    :ivar each: the first answer on each connection; None where none came
    """

    first: float | None
    each: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the requests.

    :ivar requests: sent, on all connections
    :ivar lost: requests without an answer
    :ivar duplicated: answers to requests that had been answered
    :ivar reordered: answers that came after the answer to a later request
    :ivar miscounted: answers whose count by the guest is not the request's number
    :ivar failover_s: from a cut to the first answer, the longest of all cuts; None if none came
    :ivar latency_ms_p50: median latency in protected phases before a cut
    :ivar clock_jump_ms: largest change of a guest's clock across a cut
    :ivar clock_drift_ms: largest change of a guest's clock after a cut, from begin to end
    :ivar failures: one sentence for everything that did not hold; empty if all did
    """

    requests: int
    lost: int
    duplicated: int
    reordered: int
    miscounted: int
    same_connection: bool
    failover_s: float | None
    latency_ms_p50: float | None
    latency_ms_p99: float | None
    clock_jump_ms: float | None
    clock_drift_ms: float | None
    resumes: tuple[Resume, ...]
    failures: tuple[str, ...]

    @property
    def survived(self) -> bool:
        """Whether everything held."""
        return not self.failures


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value below which ``share`` of the values lie; None without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def judge(history: History, cuts: Sequence[Cut], clock_limit_ms: float = CLOCK_LIMIT_MS) -> Verdict:
    """Judge a history.

    :param cuts: in the order of time; without any, only the answers themselves are judged
    """
    failures: list[str] = []
    order = _Order(history)
    failures += order.failures
    same = not history.closed
    failures += [
        f"the connection to {history.addresses[index]} ended: {why}"
        for index, why in sorted(history.closed.items())
    ]
    if not history.ended:
        failures.append("the client did not come to its end, so requests may be missing")

    ends = [*(cut.protected for cut in cuts[1:]), float("inf")][: len(cuts)]
    resumes = tuple(_resume(history, cut, end) for cut, end in zip(cuts, ends, strict=True))
    failovers = []
    jumps: list[float] = []
    drifts: list[float] = []
    for number, (cut, resume, end) in enumerate(zip(cuts, resumes, ends, strict=True), 1):
        where = f"cut {number}: " if len(cuts) > 1 else ""
        for address, first in zip(history.addresses, resume.each, strict=True):
            if first is None:
                failures.append(f"{where}no answer from {address} after the cut")
        if resume.first is not None:
            failovers.append(resume.first - cut.at)
            clocks = _Clocks(history, cut, resume.first, end)
            failures += [f"{where}{each}" for each in clocks.failures(clock_limit_ms)]
            jumps += clocks.jumps
            drifts += clocks.drifts

    latencies = [
        answer.latency * 1000
        for cut in cuts
        for answer in history.answers
        if answer.sent is not None and cut.protected <= answer.sent and answer.received < cut.at
    ]
    if cuts and not latencies:
        failures.append("no request was answered while the guest was protected")
    return Verdict(
        requests=order.requests,
        lost=order.lost,
        duplicated=order.duplicated,
        reordered=order.reordered,
        miscounted=order.miscounted,
        same_connection=same,
        failover_s=max(failovers) if cuts and len(failovers) == len(cuts) else None,
        latency_ms_p50=quantile(latencies, 0.5),
        latency_ms_p99=quantile(latencies, 0.99),
        clock_jump_ms=max(jumps, default=None),
        clock_drift_ms=max(drifts, default=None),
        resumes=resumes,
        failures=tuple(failures),
    )


class _Order:
    """Whether each answer is there once and in order."""

    def __init__(self, history: History) -> None:
        self.lost = len(history.unanswered)
        self.requests = self.lost
        self.duplicated = self.reordered = self.miscounted = 0
        for index in range(len(history.addresses)):
            self._look(history.of(index))
        self.failures = [
            f"{count} {what}"
            for count, what in (
                (self.lost, "requests have no answer"),
                (self.duplicated, "answers came twice"),
                (self.reordered, "answers came out of order"),
                (self.miscounted, "answers carry another count than their request's number"),
            )
            if count
        ]
        if not self.requests:
            self.failures.append("no request was sent")

    def _look(self, answers: Sequence[Answer]) -> None:
        seen: set[int] = set()
        highest = 0
        for answer in answers:
            if answer.number in seen or answer.sent is None:
                self.duplicated += 1
                continue
            seen.add(answer.number)
            self.reordered += answer.number < highest
            highest = max(highest, answer.number)
            self.miscounted += answer.count != answer.number
        self.requests += len(seen)


def _resume(history: History, cut: Cut, end: float) -> Resume:
    """When answers came again: after the longest silence since the cut.

    Not simply the first answer after the cut: that may have left the host just before.
    """
    end = min(end, cut.settled, history.until)
    each: list[float | None] = []
    for index in range(len(history.addresses)):
        times = [answer.received for answer in history.of(index)]
        each.append(_after_silence(times, cut.at, end))
    first = _after_silence([answer.received for answer in history.answers], cut.at, end)
    return Resume(first, tuple(each))


def _after_silence(times: Sequence[float], begin: float, end: float) -> float | None:
    later = [t for t in times if begin <= t <= end]
    broken = longest_gap(later, begin, end)[1]
    # A silence up to the very end was not ended by an answer.
    return broken if broken in later else None


class _Clocks:
    """How the guest's clocks went on across one cut, compared with the client's.

    The difference of guest clock and time of sending is a constant plus the time that the request
    was on its way.  Requests that were sent before the first answer after the cut were on their way
    for as long as the silence lasted, so they say nothing and are left out.

    Where all requests take long these are poor estimates.  But a guest's clock was read after its
    request was sent and before its answer came, so that each answer bounds the true difference from
    both sides: only what these bounds cannot explain is held against the guest.

    :ivar jumps: change of the difference across the cut in ms, for each clock
    :ivar drifts: change of it in ms from the first to the last third of the time after the cut
    """

    def __init__(self, history: History, cut: Cut, resumed: float, end: float) -> None:
        sent = [answer for answer in history.answers if answer.sent is not None]
        self._before = [a for a in sent if cut.protected <= _sent(a) and a.received < cut.at]
        self._after = [a for a in sent if resumed <= _sent(a) < end]
        self.jumps: list[float] = []
        self.drifts: list[float] = []
        self._proven_jumps: list[float] = []
        self._proven_drifts: list[float] = []
        if self._enough:
            third = max(1, len(self._after) // 3)
            across = (self._before, self._after)
            afterwards = (self._after[:third], self._after[-third:])
            for clock in GUEST_CLOCKS:
                self.jumps.append(_change(*across, clock) * 1000)
                self.drifts.append(_change(*afterwards, clock) * 1000)
                self._proven_jumps.append(_proven_change(*across, clock) * 1000)
                self._proven_drifts.append(_proven_change(*afterwards, clock) * 1000)

    @property
    def _enough(self) -> bool:
        return min(len(self._before), len(self._after)) >= ENOUGH

    def failures(self, limit_ms: float) -> list[str]:
        """What does not hold."""
        if not self._enough:
            return [
                f"{len(self._before)} answers before the cut and {len(self._after)} after the "
                f"silence are too few to judge the guest's clocks; expected {ENOUGH} each"
            ]
        said = []
        for index, clock in enumerate(GUEST_CLOCKS):
            if self._proven_jumps[index] > limit_ms:
                said.append(
                    f"the guest's {_NAMES[clock]} changed by {self.jumps[index]:.0f} ms "
                    "across the cut"
                )
            if self._proven_drifts[index] > limit_ms:
                said.append(
                    f"the guest's {_NAMES[clock]} stood still or ran away after the cut: "
                    f"{self.drifts[index]:.0f} ms"
                )
        for clock in GUEST_CLOCKS:
            back = _steps_back(self._after, clock)
            if back:
                said.append(f"the guest's {_NAMES[clock]} went backwards {back} times")
        return said


_NAMES: Final = {"mono": "monotonic clock", "boot": "boot time"}


def _sent(answer: Answer) -> float:
    assert answer.sent is not None
    return answer.sent


def _change(one: Sequence[Answer], other: Sequence[Answer], clock: str) -> float:
    """By how much the difference seems to have changed, in seconds."""
    return abs(_ahead(other, clock) - _ahead(one, clock))


def _proven_change(one: Sequence[Answer], other: Sequence[Answer], clock: str) -> float:
    """By how much the difference must have changed at least, in seconds."""
    least, most = _bounds(one, clock)
    other_least, other_most = _bounds(other, clock)
    return max(0.0, other_least - most, least - other_most)


def _bounds(answers: Sequence[Answer], clock: str) -> tuple[float, float]:
    """Least and greatest difference, in seconds, that one of the answers allows."""
    return (
        max(float(getattr(answer, clock)) - answer.received for answer in answers),
        min(float(getattr(answer, clock)) - _sent(answer) for answer in answers),
    )


def _ahead(answers: Sequence[Answer], clock: str) -> float:
    """Guest clock minus time of sending, in seconds, where the request was on its way shortest.

    The time on the way is never negative and has a long tail, so that the smallest differences are
    the best ones; not the very smallest, since one odd answer shall not decide.
    """
    differences = [float(getattr(answer, clock)) - _sent(answer) for answer in answers]
    best = quantile(differences, 0.05)
    assert best is not None
    return best


def _steps_back(answers: Sequence[Answer], clock: str) -> int:
    steps = 0
    last: dict[int, float] = {}
    for answer in sorted(answers, key=lambda answer: answer.count):
        value = float(getattr(answer, clock))
        steps += value < last.get(answer.connection, value)
        last[answer.connection] = value
    return steps
