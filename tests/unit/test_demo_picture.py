# SPDX-License-Identifier: Apache-2.0
"""The picture is a valid SVG file, and its dots and lines are where they belong."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from vagrant.demolib.history import Answer, History
from vagrant.demolib.picture import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, Band, Mark, draw

SVG = "{http://www.w3.org/2000/svg}"


def history(*latencies: float) -> History:
    found = History(["x", "y"], began=100.0, until=100.0 + len(latencies), ended=True)
    for number, latency in enumerate(latencies):
        sent = 100.0 + number
        found.answers.append(
            Answer(number % 2, number + 1, sent, sent + latency, number + 1, 0.0, 0.0, 0.0)
        )
    return found


def picture(found: History, *, marks: list[Mark] | None = None) -> ElementTree.Element:
    text = draw(
        found,
        title="A <title> & more",
        subtitle="below",
        names=["IPv4", "IPv6"],
        bands=[Band(101.0, 102.0, "protected")],
        marks=marks or [],
    )
    return ElementTree.fromstring(text)


def test_the_axes_are_linear_in_time_and_logarithmic_in_latency() -> None:
    axes = Axes(history(0.002, 0.02, 2.0, 0.01))
    assert (axes.low, axes.high) == (-3, 1)
    assert axes.x(100.0) == LEFT
    assert axes.x(104.0) == WIDTH - RIGHT
    assert axes.x(102.0) == (LEFT + WIDTH - RIGHT) / 2
    assert axes.y(10.0) == TOP
    decade = axes.y(0.01) - axes.y(0.1)
    assert decade > 0
    assert abs(axes.y(0.1) - axes.y(1.0) - decade) < 1e-9


def test_each_answer_is_a_dot_in_its_connections_colour() -> None:
    found = history(0.002, 0.02, 2.0, 0.01)
    axes = Axes(found)
    paths = [p for p in picture(found).iter(f"{SVG}path") if p.get("class") == "answers"]
    assert len(paths) == 2
    assert len({path.get("stroke") for path in paths}) == 2
    for index, path in enumerate(paths):
        dots = re.findall(r"M([\d.]+) ([\d.]+)h0", path.get("d", ""))
        answers = found.of(index)
        assert len(dots) == len(answers) == 2
        for (x, y), answer in zip(dots, answers, strict=True):
            assert answer.sent is not None
            assert abs(float(x) - axes.x(answer.sent)) < 0.1
            assert abs(float(y) - axes.y(answer.latency)) < 0.1


def test_marks_and_bands_are_where_they_belong() -> None:
    found = history(0.002, 0.02, 2.0, 0.01)
    axes = Axes(found)
    root = picture(found, marks=[Mark(101.5, "power cut"), Mark(103.0, "answers")])
    lines = [line for line in root.iter(f"{SVG}line") if line.get("class") == "mark"]
    assert [float(line.get("x1", 0)) for line in lines] == [
        round(axes.x(101.5), 1),
        round(axes.x(103.0), 1),
    ]
    (band,) = (rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "band")
    assert abs(float(band.get("x", 0)) - axes.x(101.0)) < 0.1
    assert abs(float(band.get("width", 0)) - (axes.x(102.0) - axes.x(101.0))) < 0.1


def test_texts_are_there_and_within_the_picture() -> None:
    root = picture(history(0.002, 0.02, 2.0, 0.01), marks=[Mark(101.5, "power cut")])
    texts = [element.text for element in root.iter(f"{SVG}text")]
    for wanted in ("A <title> & more", "power cut", "protected", "1 ms", "1 s", "IPv4", "IPv6"):
        assert wanted in texts
    for element in root.iter(f"{SVG}text"):
        if element.get("x"):
            assert 0 <= float(element.get("x", -1)) <= WIDTH
            assert 0 <= float(element.get("y", -1)) <= HEIGHT


def test_a_history_without_answers_can_be_drawn() -> None:
    assert picture(history()).tag == f"{SVG}svg"
