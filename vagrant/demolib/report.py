# SPDX-License-Identifier: Apache-2.0
"""The demonstration's result: a table for people and one line of JSON for programs.  Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vagrant.demolib.history import History
from vagrant.demolib.verdict import Cut, Verdict, quantile

#: Keys of the line of JSON, in their order.
KEYS = (
    "result",
    "requests",
    "lost",
    "duplicated",
    "reordered",
    "same_connection",
    "failover_s",
    "checkpoints",
    "pause_ms_p50",
    "pause_ms_p99",
    "latency_ms_p50",
    "latency_ms_p99",
    "wire_bytes_per_checkpoint_p50",
    "clock_jump_ms",
)


@dataclass(frozen=True, slots=True)
class Figures:
    """What ``kemari status`` said just before a cut.

    :ivar pause_ms_p50: median time for which the guest was paused for a checkpoint
    """

    checkpoints: int
    pause_ms_p50: float
    pause_ms_p99: float
    wire_bytes_p50: float

    @classmethod
    def of(cls, status: dict[str, Any]) -> Figures:
        """Out of one guest's status.

        :raises KeyError: it has no statistics
        """
        statistics = status["statistics"]
        return cls(
            statistics["checkpoints"],
            statistics["pause_ms"]["p50"],
            statistics["pause_ms"]["p99"],
            statistics["wire_bytes"]["p50"],
        )


def result(
    verdict: Verdict | None,
    figures: Sequence[Figures],
    failures: Sequence[str],
    acknowledged: int | None = None,
    committed: int | None = None,
) -> dict[str, Any]:
    """The line's values; what was not measured is None.

    Of several cuts the worst value counts; checkpoints are added up.

    :param verdict: None if there is none, because something failed before the end
    :param failures: what did not hold beside what the verdict tells of
    :param acknowledged: writes that the guest's database has acknowledged, if it has one: all of
        them are there, or it is among the failures
    :param committed: transactions that were acknowledged, likewise
    """
    survived = verdict is not None and verdict.survived and not failures
    values: dict[str, Any] = dict.fromkeys(KEYS)
    values["result"] = "survived" if survived else "failed"
    if verdict is not None:
        values["requests"] = verdict.requests
        values["lost"] = verdict.lost
        values["duplicated"] = verdict.duplicated
        values["reordered"] = verdict.reordered
        values["same_connection"] = verdict.same_connection
        values["failover_s"] = _rounded(verdict.failover_s, 3)
        values["latency_ms_p50"] = _rounded(verdict.latency_ms_p50, 2)
        values["latency_ms_p99"] = _rounded(verdict.latency_ms_p99, 2)
        values["clock_jump_ms"] = _rounded(verdict.clock_jump_ms, 2)
    if figures:
        values["checkpoints"] = sum(each.checkpoints for each in figures)
        values["pause_ms_p50"] = max(each.pause_ms_p50 for each in figures)
        values["pause_ms_p99"] = max(each.pause_ms_p99 for each in figures)
        values["wire_bytes_per_checkpoint_p50"] = max(each.wire_bytes_p50 for each in figures)
    if acknowledged is not None:
        values["acknowledged_writes"] = acknowledged
    if committed is not None:
        values["acknowledged_transactions"] = committed
    return values


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def line(values: dict[str, Any]) -> str:
    """The line of JSON."""
    return json.dumps(values, separators=(",", ":"))


def table(
    history: History,
    verdict: Verdict,
    figures: Sequence[Figures],
    cuts: Sequence[Cut],
    names: Sequence[str],
    unprotected_until: float,
) -> str:
    """The same for people, and what a line of JSON has no room for.

    :param names: of the connections
    :param unprotected_until: when protection was asked for: before it, latency is the network's
    """
    rows = [
        ("requests", f"{verdict.requests:,} on {len(names)} connections, {_kept(verdict)}"),
        ("lost", f"{verdict.lost}"),
        ("answered twice", f"{verdict.duplicated}"),
        ("out of order", f"{verdict.reordered}"),
    ]
    for cut, resume in zip(cuts, verdict.resumes, strict=True):
        each = ", ".join(
            f"{name} {_after(cut, first)}" for name, first in zip(names, resume.each, strict=True)
        )
        rows.append(("answers again", f"{_after(cut, resume.first)} after the power cut ({each})"))
    rows.append(("guest's clocks", f"changed by {_ms(verdict.clock_jump_ms)} across the cut"))
    rows.append(
        (
            "latency",
            f"p50 {_ms(verdict.latency_ms_p50)}, p99 {_ms(verdict.latency_ms_p99)} protected; "
            f"{_latency(history, float('-inf'), unprotected_until)} unprotected",
        )
    )
    if cuts:
        while_set_up = _latency(history, unprotected_until, cuts[0].protected)
        rows.append(("set up", f"{while_set_up} until it was protected (first copy)"))
    for each_figures in figures:
        rows += [
            ("checkpoints", f"{each_figures.checkpoints:,}"),
            (
                "guest paused",
                f"p50 {_ms(each_figures.pause_ms_p50)}, p99 {_ms(each_figures.pause_ms_p99)} "
                "for a checkpoint",
            ),
            ("sent", f"p50 {each_figures.wire_bytes_p50 / 1024:.1f} KiB for a checkpoint"),
        ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _latency(history: History, begin: float, end: float) -> str:
    """Of what was answered between these times."""
    found = [
        answer.latency * 1000
        for answer in history.answers
        if answer.sent is not None and begin <= answer.received < end
    ]
    return f"p50 {_ms(quantile(found, 0.5))}, p99 {_ms(quantile(found, 0.99))}"


def _kept(verdict: Verdict) -> str:
    return "never opened again" if verdict.same_connection else "NOT ALL OF WHICH LASTED"


def _after(cut: Cut, first: float | None) -> str:
    return "never" if first is None else f"{first - cut.at:.2f} s"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
