# SPDX-License-Identifier: Apache-2.0
"""Figures of a protection, in bounded memory."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Final

from checkpoint.stages import Stages

KEEP: Final = 4096


class Reservoir:
    """A uniform sample of all values seen (Vitter's algorithm R), for quantiles.

    :param keep: values kept; up to that many, quantiles are exact
    """

    __slots__ = ("_keep", "_random", "_values", "count", "last", "total", "worst")

    def __init__(self, keep: int = KEEP) -> None:
        self._keep = keep
        self._values: list[float] = []
        self._random = random.Random(0)
        self.count = 0
        self.total = 0.0
        self.last = 0.0
        self.worst = 0.0

    def add(self, value: float) -> None:
        """Take one more value into account."""
        self.count += 1
        self.total += value
        self.last = value
        self.worst = max(self.worst, value)
        if len(self._values) < self._keep:
            self._values.append(value)
        elif (place := self._random.randrange(self.count)) < self._keep:
            self._values[place] = value

    def quantile(self, share: float) -> float:
        """The value below which ``share`` of all values lie; 0.0 when there are none."""
        if not self._values:
            return 0.0
        ordered = sorted(self._values)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def summary(self, digits: int = 2) -> dict[str, float]:
        """p50, p99, worst, mean and last value, rounded; the mean is of all values seen."""
        return {
            "p50": round(self.quantile(0.5), digits),
            "p99": round(self.quantile(0.99), digits),
            "max": round(self.worst, digits),
            "mean": round(self.total / max(1, self.count), digits),
            "last": round(self.last, digits),
        }


@dataclass(slots=True)
class Statistics:
    """What ``kemari status`` shows of a protection.

    :ivar stalls: how often the guest had to wait, ``late`` of them for the ack of an epoch
    :ivar pause_ms: guest paused per checkpoint
    :ivar commit_ms: from the pause to the ack: how long output of that epoch waited at most
    :ivar pages: pages per checkpoint
    :ivar wire_bytes: bytes sent per checkpoint
    :ivar stages: how long each stage of a checkpoint took: from the first frame held for it to its
        begin ("wait", 0 if there was none), from there to the pause ("prepare"), the pause in three
        parts, coding, handing over to the kernel ("send"), waiting for the standby ("ack"), letting
        output go
    """

    checkpoints: int = 0
    by_output: int = 0
    by_interval: int = 0
    not_quiescent: int = 0
    staging_grown: int = 0
    stalls: int = 0
    late: int = 0
    stalled_ms: float = 0.0
    base_bytes: int = 0
    total_bytes: int = 0
    pause_ms: Reservoir = field(default_factory=Reservoir)
    commit_ms: Reservoir = field(default_factory=Reservoir)
    pages: Reservoir = field(default_factory=Reservoir)
    wire_bytes: Reservoir = field(default_factory=Reservoir)
    stages: Stages = field(
        default_factory=lambda: Stages(
            "wait", "prepare", "settle", "close", "copy", "encode", "send", "ack", "release"
        )
    )

    def as_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {
            "checkpoints": self.checkpoints,
            "by_output": self.by_output,
            "by_interval": self.by_interval,
            "not_quiescent": self.not_quiescent,
            "staging_grown": self.staging_grown,
            "stalls": self.stalls,
            "late": self.late,
            "stalled_ms": round(self.stalled_ms, 1),
            "base_bytes": self.base_bytes,
            "total_bytes": self.total_bytes,
            "pause_ms": self.pause_ms.summary(),
            "commit_ms": self.commit_ms.summary(),
            "pages": self.pages.summary(0),
            "wire_bytes": self.wire_bytes.summary(0),
            "stages_ms": self.stages.as_json(),
        }
