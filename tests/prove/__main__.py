# SPDX-License-Identifier: Apache-2.0
"""``make prove``: the sweep, the schedules and the mutants, and what came of them.

Prints tables, and one closing line of JSON.  The exit status is 0 when nothing was violated and
every mutant was caught.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from xml.etree import ElementTree

from checkpoint.faultpoints import POINTS
from tests.prove import mutation, sweep, workers
from tests.prove.mutants import MUTANTS

#: Cases of the sweep that a worker process takes at a time.
_BATCH = 50
#: Seconds for which schedules are searched for one that shows a broken rule.  The slowest takes
#: some 20 on an idle machine, several times that beside other work; only what survives takes all.
SEARCH = 240.0
#: Modules of tests/lab that are part of the proof.
LAB = ("audit", "faults", "fault_points", "disk_fault_points")


class Proof:
    """What came of everything.

    :ivar points: fault points at which something was made to happen
    :ivar schedules: runs of the sweep and of Hypothesis together
    :ivar violations: one sentence each
    """

    def __init__(self, jobs: int) -> None:
        self.points: set[str] = set()
        self.schedules = 0
        self.lab_runs = 0
        self.violations: list[str] = []
        # Not forked: a guest's memory is not there in a child (`checkpoint.codec.sparse`), and an
        # object for it, left from finding the cases, would unmap what is at that address now.
        self._pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))

    def sweep(self, cases: Iterable[sweep.Case]) -> None:
        """Run cases of the sweep, and print what each action did."""
        every = list(cases)
        batches = [every[at : at + _BATCH] for at in range(0, len(every), _BATCH)]
        ran: Counter[str] = Counter()
        failed: Counter[str] = Counter()
        for results in self._pool.map(workers.run_cases, batches):
            for case, outcome in results:
                ran[case.action] += 1
                self.schedules += 1
                if outcome.fired:
                    self.points.add(case.point)
                if outcome.violation:
                    failed[case.action] += 1
                    self._violated(f"sweep, {case}", outcome.violation)
        print(f"{'fault':<14}{'runs':>8}{'violations':>12}")
        for action in sweep.ACTIONS:
            print(f"{action:<14}{ran[action]:>8}{failed[action]:>12}")

    def random_schedules(self, examples: int, *, derandomize: bool) -> None:
        """Run schedules of Hypothesis."""
        count, violation = self._pool.submit(workers.run_schedules, examples, derandomize).result()
        self.schedules += count
        if violation:
            self._violated("schedules", violation)
        print(f"{count} schedules of any events, {int(bool(violation))} violations")

    def lab(self, root: Path) -> None:
        """Run the fault points on real Xen."""
        report = root / "out" / "prove-lab.xml"
        report.parent.mkdir(exist_ok=True)
        report.unlink(missing_ok=True)
        state = root / "out" / "lab-prove"
        tests = [f"tests/lab/test_{name}.py" for name in LAB]
        words = [f"--junitxml={report}", f"--lab-state={state}", *tests]
        try:
            subprocess.run([sys.executable, "-m", "pytest", "-q", *words], cwd=root, check=False)
        finally:
            down = [sys.executable, "vagrant/lab", "--state", str(state), "down"]
            subprocess.run(down, cwd=root, check=False)
        if not report.exists():
            self._violated("lab", "the tests on real Xen did not come to their end")
            return
        for case in ElementTree.parse(report).iter("testcase"):
            if case.find("skipped") is not None:
                continue
            self.lab_runs += 1
            if case.find("failure") is not None or case.find("error") is not None:
                self._violated("lab", f"{case.get('name')} failed")

    def _violated(self, where: str, violation: str) -> None:
        sentence = f"{where}: {violation.split(chr(10))[0]}"
        self.violations.append(sentence)
        if len(self.violations) <= 5:
            print(f"VIOLATION {where}: {violation}", flush=True)
        else:
            print(f"VIOLATION {sentence}", flush=True)

    def close(self) -> None:
        """End the worker processes."""
        self._pool.shutdown(cancel_futures=True)


def _tell(result: mutation.Result) -> None:
    caught = result.by or "SURVIVED"
    print(f"{result.mutant.name:<44}{result.seconds:6.1f} s  {caught}", flush=True)


def _mutants(jobs: int, seconds: float) -> int:
    """Judge the mutants; how many were caught."""
    print(f"{'rule that is broken':<44}{'time':>8}  caught by")
    # A judge spends half of its time waiting: for a test that shows that something never comes.
    results = mutation.run(MUTANTS, seconds=seconds, jobs=2 * jobs, tell=_tell)
    for result in results:
        if not result.by:
            print(f"SURVIVED {result.mutant.name}: {result.mutant.rule}")
    return sum(bool(result.by) for result in results)


def _some(cases: list[sweep.Case], count: int, seed: int) -> list[sweep.Case]:
    """So many of the cases, all if there are fewer, each with a seed of its own."""
    chance = random.Random(seed)
    chosen = chance.sample(cases, min(count, len(cases)))
    return [replace(case, seed=chance.randrange(1 << 30)) for case in chosen]


def _one(parser: argparse.ArgumentParser, name: str) -> int:
    """Run one case of the sweep, as it is printed."""
    try:
        case = sweep.Case.parse(name)
    except ValueError as error:
        parser.error(str(error))
    outcome = sweep.run(case)
    met = "" if outcome.fired else " (the point was not met)"
    print(f"{outcome.violation or 'no violation'}{met}")
    return 1 if outcome.violation else 0


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="prove", description=__doc__)
    parser.add_argument("--brief", action="store_true", help="what fits into a check: minutes")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), metavar="N")
    parser.add_argument("--seed", type=int, default=1, help="of the sweep (%(default)s)")
    parser.add_argument("--runs", type=int, default=12_000, metavar="N", help="of the sweep")
    parser.add_argument("--schedules", type=int, default=3000, metavar="N")
    parser.add_argument("--case", help="only this case of the sweep, as a violation names it")
    parser.add_argument("--no-mutants", action="store_true")
    parser.add_argument("--lab", action="store_true", help="on real Xen as well")
    options = parser.parse_args()
    workers.quiet()
    if options.case is not None:
        return _one(parser, options.case)
    began = time.monotonic()
    root = Path(__file__).resolve().parents[2]
    proof = Proof(options.jobs)
    try:
        once = list(sweep.cases(brief=True))
        proof.sweep(
            once
            if options.brief
            else once + _some(list(sweep.cases()), max(0, options.runs - len(once)), options.seed)
        )
        proof.random_schedules(
            150 if options.brief else options.schedules, derandomize=options.brief
        )
    finally:
        proof.close()
    caught = 0 if options.no_mutants else _mutants(options.jobs, SEARCH)
    if options.lab:
        proof.lab(root)
    missed = sorted(set(POINTS) - proof.points - sweep.UNSWEPT)
    if missed:
        print(f"nothing was made to happen at {', '.join(missed)}")
    mutants = 0 if options.no_mutants else len(MUTANTS)
    print(f"took {time.monotonic() - began:.0f} s")
    summary = {
        "fault_points": len(proof.points),
        "schedules": proof.schedules,
        "lab_runs": proof.lab_runs,
        "violations": len(proof.violations),
        "mutants": mutants,
        "mutants_caught": caught,
    }
    print(json.dumps(summary), flush=True)
    return 0 if not proof.violations and not missed and caught == mutants else 1


if __name__ == "__main__":
    sys.exit(main())
