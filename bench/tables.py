# SPDX-License-Identifier: Apache-2.0
"""The comparison's tables for people, and its closing line for programs.  Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bench.samples import UNPROTECTED, Sample, Table

HEADS = (
    "way",
    "rate",
    "kept",
    "latency p50 / p90 / p99 ms",
    "stall inside p50 / p99 ms",
    "as many gaps unprotected p50 / p99 ms",
    "paused mean ms",
    "ckpt/s",
    "wire KiB/s",
    "Dom0 CPU a + b %",
    "Dom0 memory a + b MiB",
)
NONE = "-"


def case_table(case: str, samples: Sequence[Sample]) -> str:
    """One workload under each way, as a table in Markdown.

    Memory is what a Dom0 has less of than unprotected.

    :param samples: of that workload, at least one
    """
    plain = next((sample for sample in samples if sample.way == UNPROTECTED), None)
    rows = [HEADS, *(_row(sample, plain) for sample in samples)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return f"{case}, rate in {samples[0].unit}/s:\n\n" + "\n".join(lines) + "\n"


def _row(sample: Sample, plain: Sample | None) -> tuple[str, ...]:
    kept = memory = NONE
    if plain is not None and plain.rate:
        kept = f"{sample.rate / plain.rate:.2f}"
    if plain is not None and plain is not sample:
        memory = " + ".join(
            f"{(before - now) / 2**20:.0f}"
            for before, now in zip(plain.free, sample.free, strict=True)
        )
    return (
        sample.way,
        f"{sample.rate:.1f}",
        kept,
        _numbers([sample.latency(share) for share in (0.5, 0.9, 0.99)]),
        _numbers([sample.stall(share) for share in (0.5, 0.99)]),
        _numbers([plain.gaps_like(sample, share) if plain else None for share in (0.5, 0.99)]),
        _numbers([sample.pause]),
        f"{sample.checkpoints / sample.seconds:.1f}" if sample.checkpoints else NONE,
        f"{sample.wire / sample.seconds / 1024:.0f}",
        " + ".join(f"{100 * share:.0f}" for share in sample.cpu_share),
        memory,
    )


def _numbers(values: Sequence[float | None]) -> str:
    if None in values:
        return NONE
    return " / ".join(f"{value:.1f}" for value in values)


def tables(table: Table) -> str:
    """A table for each workload."""
    cases = list(dict.fromkeys(case for case, _ in table))
    return "\n".join(
        case_table(case, [sample for (at, _), sample in table.items() if at == case])
        for case in cases
    )


def closing(figures: Mapping[str, Any]) -> str:
    """The closing line: one object of JSON, four significant digits, null for what is not known."""
    rounded = {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in figures.items()
    }
    return json.dumps(rounded, separators=(",", ":"))
