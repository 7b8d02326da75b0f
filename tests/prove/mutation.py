# SPDX-License-Identifier: Apache-2.0
"""Runs the harness against each mutant, in a copy of the tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.prove.mutant import Mutant

ROOT: Final = Path(__file__).resolve().parents[2]
#: What the harness needs of the tree.
_PARTS: Final = (
    "checkpoint",
    "kemari",
    "netbuffer",
    "diskbuffer",
    "tests",
    "vagrant",
    "dom0-tools",
)
_FILES: Final = ("setup.cfg", "pyproject.toml")
#: Seconds after which a judge that has not come to its end is taken to have found a hang.
PATIENCE: Final = 600.0


class Stale(ValueError):
    """A mutant's text is not in the tree any more: the list has to follow the code."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one mutant.

    :ivar by: what caught it; "" if it survived
    """

    mutant: Mutant
    by: str
    why: str
    seconds: float


def apply(mutant: Mutant, root: Path) -> None:
    """Change the files below ``root``.

    :raise Stale: a text is not there exactly once
    """
    for edit in mutant.edits:
        path = root / edit.path
        text = path.read_text()
        count = text.count(edit.old)
        if count != 1:
            raise Stale(f"{mutant.name}: the text is {count} times in {edit.path}; expected once")
        path.write_text(text.replace(edit.old, edit.new))


def judge(mutant: Mutant, seconds: float) -> Result:
    """Run the harness on one mutant.

    :param seconds: of simulation, at most about
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder)
        _copy(tree)
        apply(mutant, tree)
        argv = [sys.executable, "-m", "tests.prove.judge", f"--seconds={seconds}", *mutant.tests]
        if not mutant.simulated:
            argv.append("--no-simulation")
        if mutant.disks:
            argv.append("--disks")
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                argv,
                cwd=tree,
                env=environment,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Result(mutant, "a hang", f"no end within {PATIENCE:g} s", PATIENCE)
    took = time.monotonic() - began
    try:
        verdict = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise RuntimeError(f"{mutant.name}: the judge failed:\n{done.stderr[-3000:]}") from None
    return Result(mutant, verdict["by"], verdict["why"], took)


def _copy(tree: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".hypothesis", "lab-state")
    for part in _PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tree / part, ignore=ignore, symlinks=True)
    for name in _FILES:
        shutil.copy(ROOT / name, tree / name)


def run(
    mutants: Iterable[Mutant],
    *,
    seconds: float,
    jobs: int,
    tell: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Judge all of them, some at a time, in their order."""
    results = []
    with ThreadPoolExecutor(jobs) as pool:
        for result in pool.map(lambda mutant: judge(mutant, seconds), mutants):
            tell(result)
            results.append(result)
    return results
