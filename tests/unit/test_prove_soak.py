# SPDX-License-Identifier: Apache-2.0
"""What a soak writes down, and what it takes for a violation."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.prove.soak_report import Row, read, result, spread, table
from vagrant.demolib.memory import Kept, faults

ROWS = [
    Row(1, "a to b", 4.0, 60.0, 700, 300, 90),
    Row(2, "b to a", 6.0, 70.0, 800, 400, 80),
]


def test_rows_come_back_from_their_lines_and_half_a_line_is_left_out() -> None:
    lines = [row.line() for row in ROWS]
    assert read([*lines, '{"cut": 3, "dir']) == ROWS


def test_a_complete_run_without_violations_has_survived() -> None:
    values = result(ROWS, 2, [], {"lost": 0})
    assert values["result"] == "survived"
    assert (values["cuts"], values["violations"], values["lost"]) == (2, 0, 0)
    assert values["failover_s"] == {"min": 4.0, "p50": 6.0, "p90": 6.0, "max": 6.0}


@pytest.mark.parametrize(
    ("rows", "failures"),
    [
        (ROWS[:1], []),
        (ROWS, ["a request was lost"]),
        ([ROWS[0], Row(2, "b to a", 6.0, 70.0, 800, 400, 80, ["twice"])], []),
        ([ROWS[0], Row(2, "b to a", 6.0)], []),
        ([], []),
    ],
)
def test_anything_else_has_not(rows: list[Row], failures: list[str]) -> None:
    assert result(rows, 2, failures, {})["result"] == "failed"


def test_the_table_has_a_row_for_each_cut_and_says_what_is_not_known() -> None:
    shown = table([*ROWS, Row(3, "a to b")])
    assert "| 2 | b to a | 6.00 | 70.00 | 800 | 400 | 80 | 0 |" in shown
    assert "| 3 | a to b | - | - | - | - | - | 0 |" in shown
    assert spread([None]) is None


def test_a_memory_that_goes_back_or_differs_is_found() -> None:
    assert faults([Kept(5, 1, 0), Kept(9, 2, 0)]) == []
    assert len(faults([Kept(9, 2, 0), Kept(5, 2, 0)])) == 1
    assert len(faults([Kept(9, 2, 0), Kept(9, 1, 0)])) == 1
    assert len(faults([Kept(9, 2, 0), Kept(10, 2, 1)])) == 1


def test_the_load_takes_no_other_page_for_its_own(tmp_path: Path) -> None:
    """A page of another place, of an older version, or with one byte changed, is a mismatch."""
    guest = Path(__file__).resolve().parents[2] / "vagrant" / "guest" / "demo.c"
    source = tmp_path / "keep.c"
    source.write_text(
        f"""#define main service
#include "{guest}"
#undef main
int main(void)
{{
    static uint64_t page[WORDS];
    write_page(page, 3, 7);
    if (!holds(page, 3, 7) || holds(page, 3, 6) || holds(page, 4, 7))
        return 1;
    for (size_t i = 0; i < PAGE; i++) {{
        ((char *)page)[i] ^= 1;
        if (holds(page, 3, 7))
            return 2;
        ((char *)page)[i] ^= 1;
    }}
    return 0;
}}
"""
    )
    program = tmp_path / "keep"
    flags = ["-std=c11", "-O1", "-pthread"]
    subprocess.run(["gcc", *flags, "-o", program, source, guest.parent / "io.c"], check=True)
    assert subprocess.run([program], stderr=subprocess.DEVNULL, check=False).returncode == 0
