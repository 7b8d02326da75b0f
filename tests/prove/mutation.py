# SPDX-License-Identifier: Apache-2.0
"""Runs the harness against each mutant, in a copy of the tree."""

from __future__ import annotations

import compileall
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
from py_compile import PycInvalidationMode
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


def judge(mutant: Mutant, seconds: float, original: Path) -> Result:
    """Run the harness on one mutant.

    :param seconds: of simulation, at most about
    :param original: the tree without the change, see :func:`prepare`
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder)
        shutil.copytree(original, tree, symlinks=True, dirs_exist_ok=True)
        apply(mutant, tree)
        argv = [sys.executable, "-m", "tests.prove.judge", f"--seconds={seconds}", *mutant.tests]
        if not mutant.simulated:
            argv.append("--no-simulation")
        if mutant.disks:
            argv.append("--disks")
        if mutant.shown_by:
            argv.append(f"--first={mutant.shown_by}")
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


def prepare(tree: Path) -> None:
    """Copy what the harness needs of this tree, and compile it once for all mutants."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".hypothesis", "lab-state")
    for part in _PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tree / part, ignore=ignore, symlinks=True)
    for name in _FILES:
        shutil.copy(ROOT / name, tree / name)
    # By what a source says, not by its time: a mutant may be made within the second.
    mode = PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(tree, quiet=1, invalidation_mode=mode)


def run(
    mutants: Iterable[Mutant],
    *,
    seconds: float,
    jobs: int,
    tell: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Judge all of them, some at a time, in their order."""
    results = []
    with (
        tempfile.TemporaryDirectory(prefix="original-") as folder,
        ThreadPoolExecutor(jobs) as pool,
    ):
        original = Path(folder)
        prepare(original)
        for result in pool.map(lambda mutant: judge(mutant, seconds, original), mutants):
            tell(result)
            results.append(result)
    return results
