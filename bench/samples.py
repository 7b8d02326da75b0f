# SPDX-License-Identifier: Apache-2.0
"""What was measured of one workload under one way of protecting the guest, and what follows.  Pure.

Every ratio is taken against the interval of ``xl remus`` that is best at that very thing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.gaps import Gaps
from vagrant.demolib.verdict import quantile

UNPROTECTED: Final = "unprotected"
KEMARI: Final = "kemari"
TIMER: Final = "kemari-timer-"
REMUS: Final = "xl-remus-"

#: Keys of the closing line that come from these samples, in their order.
KEYS: Final = (
    "stall_ratio_p50",
    "stall_ratio_p99",
    "latency_ratio_p90",
    "wire_ratio_rr",
    "wire_ratio_kv",
    "wire_ratio_incompressible",
    "kv_throughput_vs_timer25",
    "dom0_cpu_ratio",
)
IDLE: Final = "idle"
ONE: Final = "rr-1"
STORE: Final = "kv"
INCOMPRESSIBLE: Final = "write-sequential"


@dataclass(frozen=True, slots=True)
class Sample:
    """One workload, under one way, for some time.

    :ivar seconds: between the readings of all meters
    :ivar worked: seconds for which the workload ran
    :ivar work: what it got done, in ``unit``
    :ivar latencies: of its requests, in milliseconds; empty if it has none
    :ivar gaps: what a process in the guest saw that read the clock; None if none did
    :ivar checkpoints: within ``seconds``; a fraction, since they are counted over a longer time
    :ivar wire: bytes on the replication link, both directions
    :ivar cpu: seconds of processor that each Dom0 used, primary first
    :ivar free: bytes of memory that each Dom0 had left at the end
    :ivar pause: milliseconds for which the guest was paused for a checkpoint on average, by the
        protection's own clock; None where there is none
    :ivar stages: milliseconds that each stage of a checkpoint took, the median by that clock since
        the protection began; empty where there is none
    """

    way: str
    case: str
    unit: str
    seconds: float
    worked: float
    work: float
    latencies: Sequence[float]
    gaps: Gaps | None
    checkpoints: float
    wire: int
    cpu: tuple[float, float]
    free: tuple[int, int]
    pause: float | None
    stages: Mapping[str, float]

    @property
    def rate(self) -> float:
        """Work done in a second."""
        return self.work / self.worked

    def latency(self, share: float) -> float | None:
        """Milliseconds below which this share of the answers came."""
        return quantile(self.latencies, share)

    def stall(self, share: float) -> float | None:
        """Milliseconds below which this share of the stalls lies, seen from inside.

        None if nobody looked, or no checkpoint was made meanwhile.
        """
        if self.gaps is None:
            return None
        return self.gaps.stall_ms(share, round(self.checkpoints * self.worked / self.seconds))

    def gaps_like(self, other: Sample, share: float) -> float | None:
        """Milliseconds below which this share lies of the longest gaps in this sample, as many for
        its time as another one had checkpoints: what would pass for stalls without any checkpoint.

        None if nobody looked, or the other one had none.
        """
        if self.gaps is None:
            return None
        return self.gaps.stall_ms(share, round(other.checkpoints / other.seconds * self.worked))

    @property
    def cpu_share(self) -> tuple[float, float]:
        """Processors that each Dom0 kept busy."""
        return self.cpu[0] / self.seconds, self.cpu[1] / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Everything but the single latencies."""
        return {
            "way": self.way,
            "case": self.case,
            "unit": self.unit,
            "seconds": round(self.seconds, 3),
            "rate": round(self.rate, 3),
            "latency_ms": [self.latency(share) for share in (0.5, 0.9, 0.99)],
            "answers": len(self.latencies),
            "stall_ms": [self.stall(share) for share in (0.5, 0.99)],
            "longest_gap_ms": self.gaps.longest / 1e6 if self.gaps else None,
            "gaps": dict(self.gaps.counts) if self.gaps else None,
            "checkpoints": round(self.checkpoints, 1),
            "wire_bytes": self.wire,
            "dom0_cpu_s": list(self.cpu),
            "dom0_free_bytes": list(self.free),
            "pause_ms": self.pause,
            "stages_ms": dict(self.stages),
        }


Table = Mapping[tuple[str, str], Sample]
"""(case, way) -> what all rounds together came to."""


def merge(samples: Iterable[Sample]) -> dict[tuple[str, str], Sample]:
    """All rounds of each workload and way as one sample each, in the order of their first."""
    found: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        found.setdefault((sample.case, sample.way), []).append(sample)
    return {key: _one(parts) for key, parts in found.items()}


def _one(parts: Sequence[Sample]) -> Sample:
    first = parts[0]
    paused = [part for part in parts if part.pause is not None]
    counted = sum(part.checkpoints for part in paused)
    gaps = [part.gaps for part in parts if part.gaps]
    staged = [part for part in parts if part.stages]
    names = staged[0].stages if staged else ()
    return Sample(
        way=first.way,
        case=first.case,
        unit=first.unit,
        seconds=sum(part.seconds for part in parts),
        worked=sum(part.worked for part in parts),
        work=sum(part.work for part in parts),
        latencies=[latency for part in parts for latency in part.latencies],
        gaps=Gaps.merge(gaps) if gaps else None,
        checkpoints=sum(part.checkpoints for part in parts),
        wire=sum(part.wire for part in parts),
        cpu=(sum(part.cpu[0] for part in parts), sum(part.cpu[1] for part in parts)),
        free=(min(part.free[0] for part in parts), min(part.free[1] for part in parts)),
        pause=sum(part.checkpoints * (part.pause or 0) for part in paused) / counted
        if counted
        else None,
        stages={name: statistics.median(part.stages[name] for part in staged) for name in names},
    )


# ---- Ratios ----

Figure = Callable[[Sample], float | None]


def _best_remus(table: Table, case: str, figure: Figure) -> float | None:
    """The lowest figure of all intervals of xl remus."""
    found = [
        value
        for (at, way), sample in table.items()
        if at == case and way.startswith(REMUS) and (value := figure(sample)) is not None
    ]
    return min(found, default=None)


def _of(table: Table, case: str, way: str, figure: Figure) -> float | None:
    sample = table.get((case, way))
    return None if sample is None else figure(sample)


def _over(above: float | None, below: float | None) -> float | None:
    """The ratio; None where one is not known, or there is nothing to divide by."""
    return above / below if above is not None and below else None


def ratios(table: Table) -> dict[str, float | None]:
    """The closing line's figures of :data:`KEYS`; None where what is needed was not measured."""

    def remus_over(case: str, figure: Figure) -> float | None:
        return _over(_best_remus(table, case, figure), _of(table, case, KEMARI, figure))

    def over_remus(case: str, figure: Figure) -> float | None:
        return _over(_of(table, case, KEMARI, figure), _best_remus(table, case, figure))

    def stall(share: float) -> Figure:
        return lambda sample: sample.stall(share)

    found = {
        "stall_ratio_p50": remus_over(IDLE, stall(0.5)),
        "stall_ratio_p99": remus_over(IDLE, stall(0.99)),
        "latency_ratio_p90": remus_over(ONE, lambda sample: sample.latency(0.9)),
        "wire_ratio_rr": over_remus(ONE, _wire_per_second),
        "wire_ratio_kv": over_remus(STORE, _wire_per_second),
        "wire_ratio_incompressible": over_remus(INCOMPRESSIBLE, _wire_per_work),
        "kv_throughput_vs_timer25": _over(
            _of(table, STORE, KEMARI, lambda sample: sample.rate),
            _of(table, STORE, f"{TIMER}25", lambda sample: sample.rate),
        ),
        "dom0_cpu_ratio": over_remus(ONE, _cpu_per_checkpoint(table.get((ONE, UNPROTECTED)))),
    }
    assert tuple(found) == KEYS
    return found


@dataclass(frozen=True, slots=True)
class Limit:
    """What one answer would take if nothing but what must be came between; milliseconds.

    :ivar unprotected: the answer of the guest alone, the median
    :ivar pause: of the guest for a checkpoint, on average
    :ivar round_trip: of the empty link
    :ivar encode: coding a checkpoint, the median
    :ivar protected: what the answer does take under Kemari, the median
    """

    unprotected: float
    pause: float
    round_trip: float
    encode: float
    protected: float

    @property
    def total(self) -> float:
        """The model's limit: half a round trip is allowed for both ends of the link."""
        return self.unprotected + self.pause + 1.5 * self.round_trip + self.encode

    @property
    def ratio(self) -> float:
        """Times the limit that the answer takes."""
        return self.protected / self.total

    def __str__(self) -> str:
        return (
            f"an answer on one connection, by the model: unprotected {self.unprotected:.1f} + "
            f"pause {self.pause:.1f} + 1.5 x round trip {self.round_trip:.1f} + "
            f"encode {self.encode:.1f} = {self.total:.1f} ms; "
            f"measured: {self.protected:.1f} ms, {self.ratio:.2f} times that\n"
        )


def limit(table: Table, round_trip: float) -> Limit | None:
    """The model's limit and what came of it; None if something for it was not measured."""
    plain, kemari = table.get((ONE, UNPROTECTED)), table.get((ONE, KEMARI))
    if plain is None or kemari is None or kemari.pause is None:
        return None
    encode = kemari.stages.get("encode")
    before, after = plain.latency(0.5), kemari.latency(0.5)
    if before is None or after is None or encode is None:
        return None
    return Limit(before, kemari.pause, round_trip, encode, after)


def _wire_per_second(sample: Sample) -> float:
    return sample.wire / sample.seconds


def _wire_per_work(sample: Sample) -> float | None:
    return sample.wire / sample.seconds / sample.rate if sample.work else None


def _cpu_per_checkpoint(unprotected: Sample | None) -> Figure:
    """Processor seconds of both Dom0s for a checkpoint, beyond what they use unprotected."""

    def figure(sample: Sample) -> float | None:
        if unprotected is None or not sample.checkpoints:
            return None
        beyond = sum(sample.cpu_share) - sum(unprotected.cpu_share)
        return beyond * sample.seconds / sample.checkpoints

    return figure
