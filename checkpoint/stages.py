# SPDX-License-Identifier: Apache-2.0
"""How long the stages of an epoch take, and the steps of a takeover: to find the slow one.

Cheap: one tuple an epoch, and sums only when somebody asks.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Final

KEEP: Final = 2048
"""Epochs remembered."""


class Stages:
    """Durations of named stages, of the last :data:`KEEP` epochs.

    :param names: the stages, in the order in which they happen
    """

    __slots__ = ("_rows", "names")

    def __init__(self, *names: str) -> None:
        self.names = names
        self._rows: deque[tuple[int, ...]] = deque(maxlen=KEEP)

    def add(self, *durations_ns: int) -> None:
        """Take one epoch into account: nanoseconds, in the order of the names."""
        self._rows.append(durations_ns)

    def as_json(self) -> dict[str, dict[str, float]]:
        """Milliseconds at the median and at the 99th of a hundred, by stage; empty without epochs.

        :raise ValueError: an epoch was added that has not one duration for each name
        """
        rows = list(self._rows)
        if not rows:
            return {}
        return {
            name: {"p50": _milliseconds(column, 0.5), "p99": _milliseconds(column, 0.99)}
            for name, *column in zip(self.names, *rows, strict=True)
        }


class Laps:
    """Durations of the steps of something that happens once."""

    __slots__ = ("_began", "_laps", "_last")

    def __init__(self) -> None:
        self._began = self._last = time.monotonic_ns()
        self._laps: list[str] = []

    def lap(self, name: str) -> None:
        """The step of that name is over."""
        now = time.monotonic_ns()
        self._laps.append(f"{name} {(now - self._last) // 10**6}")
        self._last = now

    @property
    def elapsed_ns(self) -> int:
        """Nanoseconds since the first step began."""
        return time.monotonic_ns() - self._began

    def __str__(self) -> str:
        """All of it, and each step: milliseconds."""
        whole = (self._last - self._began) // 10**6
        return f"{whole} ms ({', '.join(self._laps)})"


def _milliseconds(durations: list[int], share: float) -> float:
    ordered = sorted(durations)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1e6, 3)
