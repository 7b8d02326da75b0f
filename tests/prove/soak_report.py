# SPDX-License-Identifier: Apache-2.0
"""What a soak came to: a row for each power cut, a table, and one line of JSON.  Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vagrant.demolib.verdict import quantile


@dataclass(slots=True)
class Row:
    """One power cut; what is not known, because something failed before, is None.

    :ivar direction: from which host to which the guest moved, "a to b"
    :ivar failover_s: from the cut to the first answer after it, on any connection
    :ivar protected_s: from the cut until the guest was protected again
    :ivar answers: requests answered since the last cut, on both talking connections
    :ivar writes: writes that the key-value store acknowledged since the last cut
    :ivar commits: transactions that were acknowledged since then
    :ivar violations: one sentence each
    """

    cut: int
    direction: str
    failover_s: float | None = None
    protected_s: float | None = None
    answers: int | None = None
    writes: int | None = None
    commits: int | None = None
    violations: list[str] = field(default_factory=list)

    def line(self) -> str:
        """As a line of JSON."""
        return json.dumps(asdict(self)) + "\n"


def read(lines: Sequence[str]) -> list[Row]:
    """The rows that :meth:`Row.line` has written."""
    return [Row(**json.loads(line)) for line in lines if line.endswith("\n")]


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Least, median, 90th percentile and greatest of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "max": 1.0}
    return {name: round(quantile(known, share) or 0.0, 2) for name, share in shares.items()}


_COLUMNS = (
    "cut",
    "direction",
    "answers again, s",
    "protected again, s",
    "answers",
    "writes",
    "transactions",
    "violations",
)


def table(rows: Sequence[Row]) -> str:
    """All rows and their spread, in Markdown."""
    lines = [
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]
    for row in rows:
        cells = (
            f"{row.cut}",
            row.direction,
            _seconds(row.failover_s),
            _seconds(row.protected_s),
            _count(row.answers),
            _count(row.writes),
            _count(row.commits),
            f"{len(row.violations)}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| seconds from the power cut | min | p50 | p90 | max |", "|---|---|---|---|---|"]
    for name, values in (
        ("to the first answer", [row.failover_s for row in rows]),
        ("until protected again", [row.protected_s for row in rows]),
    ):
        found = spread(values)
        if found:
            lines.append(f"| {name} | {' | '.join(_seconds(each) for each in found.values())} |")
    return "\n".join(lines) + "\n"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def result(
    rows: Sequence[Row], wanted: int, failures: Sequence[str], figures: dict[str, Any]
) -> dict[str, Any]:
    """The closing line's values.

    :param failures: what did not hold, or went wrong, beside the rows' violations
    :param figures: further values
    """
    violations = sum(len(row.violations) for row in rows) + len(failures)
    complete = len(rows) == wanted and all(row.protected_s is not None for row in rows)
    return {
        "result": "survived" if complete and not violations else "failed",
        "cuts": len(rows),
        "violations": violations,
        "failover_s": spread([row.failover_s for row in rows]),
        "protected_s": spread([row.protected_s for row in rows]),
        **figures,
    }
