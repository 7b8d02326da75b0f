# SPDX-License-Identifier: Apache-2.0
"""The demonstration's picture: latency of each request over time, as SVG.  Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from typing import Final

from vagrant.demolib.history import History

WIDTH, HEIGHT = 960, 480
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 92, 62
#: One for each connection: dark enough on white, and apart also for those who see few colours.
COLOURS: Final = ("#1f5fbf", "#d9731a", "#3a8a4d", "#8e44ad")
#: About the width of a letter of the usual size, in pixels.
_LETTER: Final = 7.4
FONT: Final = "font-family=\"'DejaVu Sans', 'Segoe UI', Helvetica, Arial, sans-serif\""


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment worth a line.

    :ivar at: when
    :ivar text: what happened
    :ivar colour: of the line and the text
    """

    at: float
    text: str
    colour: str = "#c0262d"


@dataclass(frozen=True, slots=True)
class Band:
    """A stretch of time worth a background.

    :ivar begin: when it began
    :ivar end: when it ended
    :ivar text: what it was
    :ivar colour: of the background
    :ivar ink: of the text
    """

    begin: float
    end: float
    text: str
    colour: str = "#e3f2e6"
    ink: str = "#2f7040"


class Axes:
    """Places on the picture, in pixels, for times and latencies.

    :param history: gives the range of both
    :ivar origin: the time that is called 0
    """

    def __init__(self, history: History) -> None:
        sent = [a.sent for a in history.answers if a.sent is not None]
        values = [a.latency for a in history.answers if a.latency > 0]
        self.origin = history.began
        self.span = max([history.until - self.origin, *(s - self.origin for s in sent), 1.0])
        # Whole decades, and at least two of them, so that the scale can be read.
        self.low = floor(log10(min(values, default=0.001)))
        self.high = max(self.low + 2, ceil(log10(max(values, default=0.1))))

    def x(self, time: float) -> float:
        """Pixels from the left for a time."""
        return LEFT + (time - self.origin) / self.span * (WIDTH - LEFT - RIGHT)

    def y(self, latency: float) -> float:
        """Pixels from the top for a latency in seconds."""
        share = (log10(max(latency, 10**self.low)) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def draw(
    history: History,
    *,
    title: str,
    subtitle: str,
    names: Sequence[str],
    bands: Sequence[Band] = (),
    marks: Sequence[Mark] = (),
) -> str:
    """The picture as the text of an SVG file.

    :param names: of the connections, for the legend
    """
    axes = Axes(history)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" {FONT}>',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        _text(LEFT, 30, title, size=18, weight="600"),
        _text(LEFT, 52, subtitle, size=13, colour="#555555"),
        *_bands(axes, bands),
        *_latency_axis(axes),
        *_time_axis(axes),
        *_points(axes, history),
        *_marks(axes, marks),
        *_legend(names),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    colour: str = "#222222",
    anchor: str = "start",
    weight: str = "400",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" '
        f'text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
    )


def _bands(axes: Axes, bands: Sequence[Band]) -> Iterator[str]:
    for band in bands:
        begin, end = axes.x(band.begin), axes.x(band.end)
        yield (
            f'<rect class="band" x="{begin:.1f}" y="{TOP}" width="{max(0.0, end - begin):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}" fill="{band.colour}"/>'
        )
        yield _text(
            (begin + end) / 2, HEIGHT - BOTTOM - 8, band.text, colour=band.ink, anchor="middle"
        )


def _latency_axis(axes: Axes) -> Iterator[str]:
    for decade in range(axes.low, axes.high + 1):
        for factor in range(1, 10):
            if decade == axes.high and factor > 1:
                break
            value = factor * 10.0**decade
            y = axes.y(value)
            colour = "#bbbbbb" if factor == 1 else "#eeeeee"
            yield (
                f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" '
                f'stroke="{colour}" stroke-width="1"/>'
            )
            if factor == 1:
                yield _text(LEFT - 8, y + 4, _duration(value), anchor="end", colour="#444444")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield (
        f'<text transform="translate(20 {middle:.1f}) rotate(-90)" font-size="13" fill="#444444" '
        f'text-anchor="middle">latency of a request</text>'
    )


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale * 0.999:
            return f"{seconds / scale:g} {unit}"
    return f"{seconds / 1e-6:g} µs"


def _time_axis(axes: Axes) -> Iterator[str]:
    bottom = HEIGHT - BOTTOM
    steps = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600)
    step = next((s for s in steps if axes.span / s <= 12), steps[-1])
    for number in range(int(axes.span // step) + 1):
        x = axes.x(axes.origin + number * step)
        yield f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}" stroke="#888888"/>'
        yield _text(x, bottom + 20, f"{number * step}", anchor="middle", colour="#444444")
    yield f'<line x1="{LEFT}" y1="{bottom}" x2="{WIDTH - RIGHT}" y2="{bottom}" stroke="#888888"/>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield _text(
        middle, bottom + 42, "time of the request in seconds", size=13, anchor="middle",
        colour="#444444",
    )  # fmt: skip


def _points(axes: Axes, history: History) -> Iterator[str]:
    """Each answer as a dot: a stroke of no length with a round end, the shortest way to say it."""
    for index in range(len(history.addresses)):
        dots = {
            (f"{axes.x(a.sent):.1f}", f"{axes.y(a.latency):.1f}")
            for a in history.of(index)
            if a.sent is not None
        }
        path = "".join(f"M{x} {y}h0" for x, y in sorted(dots, key=lambda dot: float(dot[0])))
        yield (
            f'<path class="answers" d="{path}" fill="none" stroke="{_colour(index)}" '
            f'stroke-width="2.6" stroke-linecap="round" stroke-opacity="0.75"/>'
        )


def _marks(axes: Axes, marks: Sequence[Mark]) -> Iterator[str]:
    for number, mark in enumerate(marks):
        x = axes.x(mark.at)
        # Neighbours on different sides and heights, so that their texts do not cover each other.
        room = _LETTER * len(mark.text) + 12
        left = x - room > LEFT if number % 2 == 0 else x + room > WIDTH - RIGHT
        y = TOP + 16 + 18 * (number % 2)
        yield (
            f'<line class="mark" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" '
            f'stroke="{mark.colour}" stroke-width="1.6" stroke-dasharray="5 3"/>'
        )
        text = _text(
            x + (-6 if left else 6), y, mark.text, colour=mark.colour, weight="600",
            anchor="end" if left else "start",
        )  # fmt: skip
        # A white rim keeps it legible above dots and lines.
        rim = '<text paint-order="stroke" stroke="#ffffff" stroke-width="4" '
        yield text.replace("<text ", rim, 1)


def _legend(names: Sequence[str]) -> Iterator[str]:
    x = float(LEFT)
    for index, name in enumerate(names):
        yield f'<circle cx="{x + 5:.1f}" cy="72" r="4.5" fill="{_colour(index)}"/>'
        yield _text(x + 16, 76, name, size=12)
        x += 34 + _LETTER * len(name)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
