# SPDX-License-Identifier: Apache-2.0
"""The harness as a judge: runs in a tree, says what it found first, or that it found nothing.

``python -m tests.prove.judge`` prints one line of JSON: ``caught``, ``by``, ``why``, ``runs``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Final

from tests.prove import scenarios, schedules, sweep
from tests.prove.world import Violation

#: Faults that meet a held output, a moved owner or an ending at once, tried before all others:
#: most rules that are broken are seen with one of them.
_FIRST: Final = (
    sweep.Case("planned", "abandon-recorded", 1, "kill"),
    sweep.Case("planned", "got-stand-down", 1, "kill"),
    sweep.Case("talk_and_stop", "promised", 1, "kill"),
    sweep.Case("declined", "let-go-recorded", 1, "kill"),
    sweep.Case("talk_and_stop", "got-ack", 6, "stall"),
    sweep.Case("talk_and_stop", "got-pages", 6, "partition"),
    sweep.Case("unrecorded", "takeover-recorded", 1, "kill"),
    sweep.Case("talk_and_stop", "got-state", 1, "peer-full-stall", "release"),
    sweep.Case("brought_back", "abandon-destroyed", 1, "kill", "release", 546704033),
    sweep.Case("carried_over", "put-heartbeat", 1, "unplug", "hold", 4),
    sweep.Case("carried_over", "ledger-written", 10, "stall-long", "release"),
    sweep.Case("declined", "paused", 2, "kill"),
)
#: Faults that are tried first where the guest's disk is concerned: (point, its time, action).
_DISK_FIRST: Final = (
    ("got-writes", 5, "peer-power"),
    ("paused", 4, "knock"),
    ("replica-apply", 1, "power"),
    ("replica-written", 7, "power"),
    ("got-writes", 8, "peer-power"),
    ("pages-copied", 5, "knock"),
    ("replica-written", 6, "power"),
)
#: Points around which a request comes and power fails, with several seeds.
_KNOCKS: Final = (
    "pause",
    "paused",
    "output-closed",
    "rings-copied",
    "log-read",
    "pages-copied",
    "released",
)

_TEST_PATIENCE: Final = "15"
"""Seconds: many a broken rule shows in that something never comes."""


@dataclass(slots=True)
class Verdict:
    """What was found.

    :ivar caught: something was
    :ivar by: which part of the harness found it
    :ivar why: the first sentence of it
    :ivar runs: how many runs it took
    """

    caught: bool = False
    by: str = ""
    why: str = ""
    runs: int = 0


def _first(name: str) -> Iterator[tuple[str, sweep.Outcome]]:
    if name:
        yield f"sweep, {name}", sweep.run(sweep.Case.parse(name))


def _disk_runs() -> Iterator[tuple[str, sweep.Outcome]]:
    for seed in range(2):
        for scenario in (
            "there_and_back",
            "protected_again",
            "stuck_disk",
            "lost_writes",
            "planned",
        ):
            outcome = sweep.baseline(scenario, seed=seed, disks=True)
            yield f"course of {scenario} with a disk", outcome
    for seed in range(12):
        for point, nth, action in _DISK_FIRST:
            case = sweep.Case("talk_and_stop", point, nth, action, seed=seed, disks=True)
            yield f"sweep, {case}", sweep.run(case)
    every = [case for case in sweep.cases(brief=True) if case.disks]
    random.Random(1).shuffle(every)
    for case in every:
        yield f"sweep, {case}", sweep.run(case)


def _runs() -> Iterator[tuple[str, sweep.Outcome]]:
    for scenario in scenarios.SCENARIOS:
        for seed in range(3):
            yield f"course of {scenario}", sweep.baseline(scenario, seed=seed)
    for first in _FIRST:
        for seed in {first.seed, 0, 7, 9}:
            case = replace(first, seed=seed)
            yield f"sweep, {case}", sweep.run(case)
    for seed in range(6):
        for point in _KNOCKS:
            for action in ("knock", "power"):
                case = sweep.Case("talk_and_stop", point, 4 + seed, action, seed=seed)
                yield f"sweep, {case}", sweep.run(case)
    for seed in range(12):
        for point in ("got-pages", "got-state"):
            # The rest of an epoch that has come in part is lost with its host.
            case = sweep.Case("talk_and_stop", point, 5 + seed % 3, "peer-power", seed=seed)
            yield f"sweep, {case}", sweep.run(case)
    for point in ("got-state", "put-stand-down", "got-stand-down", "released", "let-go-done"):
        for seed in (7, 8):
            for action in ("stall-long", "stall", "power", "kill"):
                for scenario in ("talk_and_stop", "primary_killed", "cut_off"):
                    policy = "hold" if scenario == "cut_off" else "release"
                    case = sweep.Case(scenario, point, 1, action, policy, seed)
                    yield f"sweep, {case}", sweep.run(case)
    every = list(sweep.cases(brief=True))
    random.Random(1).shuffle(every)
    for case in every:
        yield f"sweep, {case}", sweep.run(case)


def judge(
    *,
    seconds: float,
    tests: Sequence[str] = (),
    simulate: bool = True,
    disks: bool = False,
    first: str = "",
) -> Verdict:
    """Look for something wrong, for at most about so many seconds of simulation.

    :param disks: look first where the guest has a disk
    :param first: the case of the sweep to begin with; "" for none
    """
    verdict = Verdict()
    deadline = time.monotonic() + seconds
    if tests:
        failed = _failed_test(tests)
        if failed:
            return _caught(verdict, failed, "")
    if simulate:
        for name, outcome in chain(_first(first), _disk_runs() if disks else (), _runs()):
            verdict.runs += 1
            if outcome.violation:
                return _caught(verdict, name, outcome.violation)
            if time.monotonic() > deadline:
                break
        try:
            verdict.runs += schedules.run(30, shortest=False)
        except Violation as error:
            return _caught(verdict, "schedules", str(error))
    return verdict


def _failed_test(tests: Sequence[str]) -> str:
    """The first test that fails; "" if none does."""
    argv = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"KEMARI_TEST_PATIENCE": _TEST_PATIENCE}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    if done.returncode != 1:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}")
    # Not what a test logged: such a line may begin with ERROR as well.
    ends = ("FAILED tests/", "ERROR tests/")
    failed = [line for line in done.stdout.splitlines() if line.startswith(ends)]
    return failed[0].split(" ")[1] if failed else tests[0]


def _caught(verdict: Verdict, by: str, violation: str) -> Verdict:
    verdict.caught, verdict.by = True, by
    verdict.why = violation.split("\n")[0][:200]
    return verdict


def main() -> None:
    """Judge the tree that this module is in."""
    parser = argparse.ArgumentParser(prog="judge")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--no-simulation", action="store_true")
    parser.add_argument("--disks", action="store_true", help="with a disk first")
    parser.add_argument("--first", default="", metavar="CASE", help="of the sweep")
    parser.add_argument("tests", nargs="*")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None  # frozen daemons are cleared away
    verdict = judge(
        seconds=options.seconds,
        tests=options.tests,
        simulate=not options.no_simulation,
        disks=options.disks,
        first=options.first,
    )
    print(json.dumps(asdict(verdict)))


if __name__ == "__main__":
    main()
