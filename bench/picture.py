# SPDX-License-Identifier: Apache-2.0
"""The comparison's picture: how long answers take and the guest stands still, as SVG.  Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from typing import Final

from bench.samples import IDLE, KEMARI, ONE, REMUS, TIMER, UNPROTECTED, Table
from vagrant.demolib.picture import FONT

WIDTH: Final = 860
LEFT, RIGHT, TOP, ROW, GAP = 170, 110, 40, 26, 66
#: Of a way whose name begins so.
COLOURS: Final = {
    UNPROTECTED: "#666666",
    REMUS: "#c0262d",
    TIMER: "#1f5fbf",
    KEMARI: "#2f7040",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One way: its quantiles in milliseconds, from the lowest on."""

    way: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """Ways beside each other.

    :ivar title: with what the quantiles are
    """

    title: str
    rows: tuple[Row, ...]


def panels(table: Table) -> list[Panel]:
    """What there is to be seen, as far as it was measured."""
    answers, stalls = [], []
    for (case, way), sample in table.items():
        if case == ONE and (row := _row(way, [sample.latency(s) for s in (0.5, 0.9, 0.99)])):
            answers.append(row)
        if case == IDLE and (row := _row(way, [sample.stall(s) for s in (0.5, 0.99)])):
            stalls.append(row)
    found = [
        Panel("An answer on one connection: 50, 90 and 99 of 100 come within", tuple(answers)),
        Panel(
            "The guest stands still for a checkpoint, seen from inside: 50 and 99 of 100",
            tuple(stalls),
        ),
    ]
    return [panel for panel in found if panel.rows]


def _row(way: str, values: Sequence[float | None]) -> Row | None:
    known = tuple(value for value in values if value is not None)
    return Row(way, known) if len(known) == len(values) else None


class Axis:
    """Places for milliseconds, in pixels, on a logarithmic scale of whole decades."""

    def __init__(self, rows: Sequence[Row]) -> None:
        values = [value for row in rows for value in row.values]
        self.low = floor(log10(min(values)))
        self.high = max(self.low + 1, ceil(log10(max(values))))

    def x(self, milliseconds: float) -> float:
        """Pixels from the left."""
        share = (log10(milliseconds) - self.low) / (self.high - self.low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)


def draw(found: Sequence[Panel]) -> str:
    """The picture; one line from the lowest quantile to the highest, and a dot at each."""
    height = TOP + sum(GAP + ROW * len(panel.rows) for panel in found)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" {FONT} font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    top = TOP
    for panel in found:
        parts += _panel(panel, top)
        top += GAP + ROW * len(panel.rows)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, top: int) -> Iterator[str]:
    axis = Axis(panel.rows)
    bottom = top + ROW * len(panel.rows)
    yield f'<text x="{LEFT}" y="{top - 14}" font-weight="bold">{escape(panel.title)}</text>'
    for decade in range(axis.low, axis.high + 1):
        x = axis.x(10.0**decade)
        yield f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="#dddddd"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{10.0**decade:g} ms</text>'
    for number, row in enumerate(panel.rows):
        y = top + ROW * (number + 0.5)
        colour = _colour(row.way)
        places = [axis.x(value) for value in row.values]
        yield f'<text x="{LEFT - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(row.way)}</text>'
        yield (
            f'<line x1="{places[0]:.1f}" y1="{y:.1f}" x2="{places[-1]:.1f}" y2="{y:.1f}" '
            f'stroke="{colour}" stroke-width="3"/>'
        )
        for x in places:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>'
        text = " / ".join(f"{value:.3g}" for value in row.values)
        yield f'<text x="{places[-1] + 10:.1f}" y="{y + 4:.1f}" fill="{colour}">{text}</text>'


def _colour(way: str) -> str:
    return next(colour for begin, colour in COLOURS.items() if way.startswith(begin))
