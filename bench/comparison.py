#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Kemari beside what a user would otherwise run, in the lab, in one run: ``docs/performance.md``.

The same guest does the same work unprotected, under Kemari, under Kemari by the timer only, and
under stock ``xl remus``, by turns.  Tables, and at the end one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import failovers, meters, picture, roundtrip, samples, tables  # noqa: E402
from bench.cases import CASES, Case  # noqa: E402
from bench.cases import QUICK as QUICK_CASES  # noqa: E402
from bench.samples import Sample  # noqa: E402
from bench.ways import PRIMARY, WAYS, Way  # noqa: E402
from bench.ways import QUICK as QUICK_WAYS  # noqa: E402
from vagrant.lablib.command import extend_path, say, step  # noqa: E402
from vagrant.lablib.errors import LabError  # noqa: E402
from vagrant.lablib.guest import GuestOptions  # noqa: E402
from vagrant.lablib.host import Machine  # noqa: E402
from vagrant.lablib.lab import DEFAULT_SUITE, Lab, Options  # noqa: E402
from vagrant.lablib.recipe import RECIPES  # noqa: E402

#: What ``bench/micro.py`` has for the closing line.
MICRO: Final = ("zero_vs_memcpy", "compare_vs_memcpy", "delta_gb_per_s", "apply_gb_per_s")
#: All keys of the closing line.
KEYS: Final = (
    *samples.KEYS[:-1],
    *MICRO,
    samples.KEYS[-1],
    "failover_minus_heartbeat_s",
    "latency_over_model",
)
GUEST: Final = GuestOptions(benchmark=True)


class Comparison:
    """One run in a lab that is up.

    :ivar samples: what was measured, in that order
    :ivar failures: one sentence for everything that could not be measured
    """

    def __init__(
        self, lab: Lab, ways: Sequence[Way], cases: Sequence[Case], seconds: float
    ) -> None:
        self.samples: list[Sample] = []
        self.failures: list[str] = []
        self.folder = lab.state / "out"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lab = lab
        self._ways = ways
        self._cases = cases
        self._seconds = seconds

    def round(self, number: int) -> None:
        """All workloads under each way once; every other round in the opposite order."""
        for way in self._ways if number % 2 == 0 else reversed(self._ways):
            try:
                self._under(way)
            except LabError as error:
                if error.details:
                    say(error.details.rstrip())
                self.failures.append(f"{way.name}: {error}")

    def _under(self, way: Way) -> None:
        """Each way has a guest of its own, just booted."""
        self._lab.reset()
        with step("the guest boots"):
            self._lab.guest_start(PRIMARY)
        try:
            with step(f"protection: {way.name}"):
                way.begin(self._lab, self.folder)
            for case in self._cases:
                sample = self._measure(way, case)
                self.samples.append(sample)
                say(f"{way.name}, {case.name}: {sample.rate:.1f} {case.unit}/s")
        finally:
            way.end(self._lab)

    def _measure(self, way: Way, case: Case) -> Sample:
        before, begin = way.look(self._lab, self.folder), time.monotonic()
        watch = meters.Watch(self._lab)
        load = case.run(self._lab, self.folder, self._seconds, watch)
        first, last = watch.readings
        after, end = way.look(self._lab, self.folder), time.monotonic()
        made = after.checkpoints - before.checkpoints
        pause = None
        if made and after.paused_ms is not None and before.paused_ms is not None:
            pause = (after.paused_ms - before.paused_ms) / made
        # Looking costs a Dom0 time of its own, so that is not within what the meters show.
        share = (last.at - first.at) / (end - begin)
        return Sample(
            way=way.name,
            case=case.name,
            unit=case.unit,
            seconds=last.at - first.at,
            worked=load.worked,
            work=load.work,
            latencies=load.latencies,
            gaps=load.gaps,
            checkpoints=made * share,
            wire=last.wire - first.wire,
            cpu=(last.cpu[0] - first.cpu[0], last.cpu[1] - first.cpu[1]),
            free=last.free,
            pause=pause,
            stages=after.stages_ms,
        )


def micro(repetitions: int) -> dict[str, Any]:
    """The loops over pages; its tables go to standard output.

    :raises LabError: it failed
    """
    argv = [sys.executable, str(ROOT / "bench" / "micro.py"), "--repetitions", str(repetitions)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"bench/micro.py failed with exit status {done.returncode}.", done.stdout)
    *shown, line = done.stdout.strip().splitlines()
    print("\n".join(shown), flush=True)
    figures: dict[str, Any] = json.loads(line)
    return {key: figures[key] for key in MICRO}


def _names(known: Sequence[str], default: Sequence[str]) -> dict[str, Any]:
    """What an option that takes some of these names is like."""

    def some(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)}: expected some of {', '.join(known)}"
            )
        return names

    return {"type": some, "default": list(default), "metavar": "NAME,..."}


def _parser(quick: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="comparison", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer ways, workloads and cuts, one round"
    )
    add = parser.add_argument
    add("--suite", choices=list(RECIPES), default=DEFAULT_SUITE, help="(%(default)s)")
    add("--state", type=Path, metavar="DIR", help="folder of the lab (lab-state)")
    add("--ways", **_names(list(WAYS), QUICK_WAYS if quick else list(WAYS)))
    add("--cases", **_names(list(CASES), QUICK_CASES if quick else list(CASES)))
    add("--rounds", type=int, default=1 if quick else 3, metavar="N", help="(%(default)s)")
    add("--seconds", type=float, default=10 if quick else 20, metavar="S", help="(%(default)s)")
    add("--cuts", type=int, default=1 if quick else 20, metavar="N", help="(%(default)s)")
    add("--host-cpus", type=int, default=1, metavar="N",
        help="of each host; of more than one, Dom0 has one to itself (%(default)s)")  # fmt: skip
    add("--no-micro", action="store_true", help="leave the loops over pages out")
    return parser


def _terminated(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit status is 0 if everything could be measured."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = _parser("--quick" in words).parse_args(words)
    extend_path()
    signal.signal(signal.SIGTERM, _terminated)
    figures: dict[str, Any] = dict.fromkeys(KEYS)
    failures: list[str] = []
    lab = Lab(args.state)
    try:
        if not args.no_micro:
            figures |= micro(5 if args.quick else 15)
        if lab.network.is_up:
            raise LabError(f"The lab in {lab.state} is up; expected none, for a guest of our own.")
        machine = Machine(cpus=args.host_cpus, dom0_cpus=min(1, args.host_cpus - 1))
        lab.up(Options(args.suite, machine, GUEST))
        try:
            failures += _compare(lab, args, figures)
        finally:
            lab.down()
    except LabError as error:
        if error.details:
            say(error.details.rstrip())
        failures.append(str(error))
    if failures:
        say("bench: " + "\nbench: ".join(failures))
    print(tables.closing(figures), flush=True)
    return 1 if failures else 0


def _compare(lab: Lab, args: argparse.Namespace, figures: dict[str, Any]) -> list[str]:
    """Measure in the lab, print the tables, fill the figures in; what could not be measured."""
    ways, cases = [WAYS[name] for name in args.ways], [CASES[name] for name in args.cases]
    comparison = Comparison(lab, ways, cases, args.seconds)
    with step("the link alone"):
        round_trip = roundtrip.measure(lab)
    try:
        for number in range(args.rounds):
            comparison.round(number)
    finally:
        # Also of a run that was ended before its time.
        table = samples.merge(comparison.samples)
        print(f"\n{tables.tables(table)}", flush=True)
        figures |= samples.ratios(table)
        if limit := samples.limit(table, round_trip):
            print(limit, flush=True)
            figures["latency_over_model"] = limit.ratio
        kept = [sample.as_json() for sample in comparison.samples]
        (comparison.folder / "bench.json").write_text(json.dumps(kept, indent=1) + "\n")
        (comparison.folder / "bench.svg").write_text(picture.draw(picture.panels(table)))
    if args.cuts:
        try:
            lab.reset()
            seconds = failovers.measure(lab, args.cuts)
        except LabError as error:
            comparison.failures.append(str(error))
        else:
            print(failovers.text(seconds), flush=True)
            figures["failover_minus_heartbeat_s"] = failovers.beyond_heartbeat(seconds)
    return comparison.failures


if __name__ == "__main__":
    sys.exit(main())
