# SPDX-License-Identifier: Apache-2.0
"""The list of mutants follows the code, and the runner tells caught from survived."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.prove import mutation
from tests.prove.mutant import Edit, Mutant
from tests.prove.mutants import MUTANTS, SHOWN_BY
from tests.prove.sweep import Case

_ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: str(mutant.name))
def test_each_mutant_can_be_made_and_can_be_compiled(mutant: Mutant, tmp_path: Path) -> None:
    for path in {edit.path for edit in mutant.edits}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text((_ROOT / path).read_text())
    mutation.apply(mutant, tmp_path)
    for path in {edit.path for edit in mutant.edits}:
        text = (tmp_path / path).read_text()
        assert text != (_ROOT / path).read_text()
        compile(text, path, "exec")
    assert all((_ROOT / test).is_file() for test in mutant.tests)


def test_names_are_given_once() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
    assert set(SHOWN_BY) <= set(names)


@pytest.mark.parametrize("name", sorted(set(SHOWN_BY.values())))
def test_a_case_has_the_name_that_it_is_printed_with(name: str) -> None:
    assert str(Case.parse(name)) == name


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("", "'' names no case; expected SCENARIO/POINT:"),
        ("planned/paused:kill/hold/seed 0", "names no case; expected SCENARIO/POINT:"),
        ("planned/paused:kill:1/keep/seed 0", "names no case; expected SCENARIO/POINT:"),
        ("nowhere/paused:kill:1/hold/seed 0", "has no scenario; expected one of talk_and_stop, "),
        ("planned/paused:sing:1/hold/seed 0", "has no action; expected one of kill, "),
        ("planned/asleep:kill:1/hold/seed 0", "has no fault point; expected one of "),
    ],
)
def test_what_names_no_case_is_told(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Case.parse(name)


@pytest.mark.parametrize("old", ["nowhere to be found", "from __future__", "import"])
def test_a_text_that_is_not_there_once_is_refused(old: str, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("import a\nimport b\n")
    mutant = Mutant("stale", "none", (Edit("file.py", old, "x"),))
    with pytest.raises(mutation.Stale, match=r"stale: the text is \d times in file\.py"):
        mutation.apply(mutant, tmp_path)


def test_a_broken_rule_is_caught_and_a_harmless_change_survives(tmp_path: Path) -> None:
    mutation.prepare(tmp_path)
    caught = next(mutant for mutant in MUTANTS if mutant.name == "half-an-epoch")
    result = mutation.judge(caught, 60.0, tmp_path)
    assert result.by == "course of power_cut"
    assert "the guest runs nowhere" in result.why
    harmless = replace(
        caught,
        name="harmless",
        edits=(
            Edit("kemari/epoch.py", '"""The epoch state machine of', '"""Epoch state machine of'),
        ),
        tests=(),
    )
    assert mutation.judge(harmless, 0.0, tmp_path).by == ""
