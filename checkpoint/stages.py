# SPDX-License-Identifier: Apache-2.0
"""How long the stages of an epoch take, for whoever looks for the slow one.  Cheap: one tuple an
epoch, and sums only when somebody asks.
"""

from __future__ import annotations

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


def _milliseconds(durations: list[int], share: float) -> float:
    ordered = sorted(durations)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1e6, 3)
