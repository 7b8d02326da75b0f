# SPDX-License-Identifier: Apache-2.0
"""Many power cuts in a row, to and fro, under load on network, memory and disk: one guest, the same
connections all the way, and nothing may be lost.

A row for each cut is written as soon as it is known, so that a run that is cut off leaves its
evidence.  The first violation ends the run: what comes after it says nothing.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from tests.prove import soak_report
from tests.prove.registers import Registers
from tests.prove.soak_report import Row
from vagrant.demolib import databases, stage
from vagrant.demolib.hosts import await_event, bring_back, kemari
from vagrant.demolib.memory import Memory
from vagrant.demolib.talk import Talk
from vagrant.demolib.verdict import Cut, judge
from vagrant.lablib.command import extend_path, say, step
from vagrant.lablib.errors import LabError
from vagrant.lablib.guest import NAME as GUEST
from vagrant.lablib.guest import GuestOptions
from vagrant.lablib.lab import DEFAULT_SUITE, Lab, Options
from vagrant.lablib.network import HOSTS
from vagrant.lablib.recipe import RECIPES

#: Answers on each connection, and acknowledged writes on each of the database's, that show that
#: the guest goes on.
SOME = 10


class Loads:
    """Everything that works on the guest from outside, over connections that stay.

    :raises LabError: the guest does not serve one of them
    """

    def __init__(self, lab: Lab, out: Path, options: argparse.Namespace, stack: ExitStack) -> None:
        words = ["--interval", str(options.interval), "--drain", "60"]
        pause = str(options.pause)
        self.talk = stack.enter_context(Talk(lab, out / "soak-talk.jsonl", *words))
        self.registers = stack.enter_context(
            Registers(lab, out / "soak-registers.err", "--connections", "3", "--pause", pause)
        )
        self.databases = stack.enter_context(
            databases.clients(lab, out, options.writers, options.pause)
        )
        self.memory = stack.enter_context(
            Memory(lab, out / "soak-memory.err", options.memory_kib, options.memory_mib)
        )

    @property
    def counts(self) -> tuple[int, int, int]:
        """(answers, acknowledged writes, acknowledged transactions) so far."""
        return sum(self.talk.answers), self.databases.writes, self.databases.commits

    def settle(self) -> None:
        """Wait for some more of everything.

        :raises LabError: a client ended, or waited in vain
        """
        self.talk.wait_answers(SOME)
        self.databases.wait_done(SOME)

    def noticed(self) -> list[str]:
        """What does not hold, as far as it can be told while everything goes on."""
        closed = [f"connection {e['connection']}: {e['why']}" for e in self.talk.events("closed")]
        return [*closed, *self.databases.noticed(), *self.memory.faults]

    def stop(self, cuts: Sequence[Cut]) -> tuple[list[str], dict[str, Any]]:
        """End the clients and judge all that they saw.

        :return: a sentence for everything that does not hold; figures
        :raises LabError: a client did not end
        """
        kept = self.memory.look()
        found = [*self.memory.faults, *self.registers.stop(), *self.databases.stop()]
        verdict = judge(self.talk.stop(), cuts)
        figures = {
            "requests": verdict.requests,
            "lost": verdict.lost,
            "duplicated": verdict.duplicated,
            "reordered": verdict.reordered,
            "same_connection": verdict.same_connection,
            "clock_jump_ms": verdict.clock_jump_ms,
            "register_operations": self.registers.count,
            "acknowledged_writes": self.databases.writes,
            "acknowledged_transactions": self.databases.commits,
            "memory_writes": kept.writes,
            "memory_rounds": kept.rounds,
            "memory_mismatches": kept.mismatches,
        }
        return [*found, *verdict.failures], figures


class Soak:
    """One run.

    :ivar failures: what did not hold, or went wrong, beside the rows' violations
    :ivar wanted: power cuts; :meth:`enough` makes it fewer
    """

    def __init__(self, lab: Lab, options: argparse.Namespace) -> None:
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.figures: dict[str, Any] = {}
        self.out = lab.state / "out"
        self.results = self.out / "soak.jsonl"
        self._lab = lab
        self._options = options
        self._cuts: list[Cut] = []
        self.wanted = options.cuts

    def enough(self) -> None:
        """Cut no more after the one that is under way, and judge what there is."""
        self.wanted = min(self.wanted, len(self.rows) + 1)
        say(f"no more cuts after number {self.wanted}")

    def run(self) -> None:
        """Do it; what is known afterwards is in the attributes and in the file of results.

        :raises LabError: something could not be done
        """
        self.results.unlink(missing_ok=True)
        with step("the guest boots on host a"):
            self._lab.guest_start("a", GuestOptions(disk_mib=self._options.disk))
        with ExitStack() as stack:
            loads = Loads(self._lab, self.out, self._options, stack)
            primary, standby = HOSTS
            with step("first protection"):
                kemari(self._lab, primary, "start", GUEST, standby)
            protected = time.monotonic()
            while len(self.rows) < self.wanted:
                row = Row(len(self.rows) + 1, f"{primary} to {standby}")
                try:
                    protected = self._cut(row, loads, primary, standby, protected)
                finally:
                    self._note(row)
                primary, standby = standby, primary
                if row.violations:
                    break
            with step("the verdict on everything"):
                found, self.figures = loads.stop(self._cuts)
                self.failures += found
            self.failures += stage.other_role(self._lab, primary, "primary")
        with step("the guest is shut down, and its disks are looked at"):
            self.failures += stage.end_and_check_disks(self._lab, primary, standby)

    def _cut(self, row: Row, loads: Loads, primary: str, standby: str, protected: float) -> float:
        """One power cut, until the guest is protected again: when that was."""
        before = loads.counts
        loads.talk.wait_seconds(self._options.protected)
        loads.settle()
        seen = loads.talk.seen
        moved = time.time()
        cut = Cut(protected, time.monotonic())
        self._lab.power_cut(primary)
        self._cuts.append(cut)
        resumed = loads.talk.wait_resumed(cut.at, since=seen)
        row.failover_s = min(resumed) - cut.at
        loads.settle()
        self._cuts[-1] = replace(cut, settled=time.monotonic())
        # The round that is under way began before the cut; the next one is whole.
        whole_round = loads.memory.look().rounds + 2
        bring_back(self._lab, primary)
        row.violations += stage.misplaced(self._lab, standby)
        await_event(self._lab, standby, "protected", moved)
        again = time.monotonic()
        row.protected_s = again - cut.at
        loads.memory.look(whole_round)
        gained = (now - then for now, then in zip(loads.counts, before, strict=True))
        row.answers, row.writes, row.commits = gained
        row.violations += loads.noticed()
        return again

    def _note(self, row: Row) -> None:
        """Keep what is known of a cut, and tell of it."""
        self.rows.append(row)
        with self.results.open("a") as file:
            file.write(row.line())
        known = (
            f"answers again after {row.failover_s:.2f} s" if row.failover_s else "no answer",
            f"protected again after {row.protected_s:.1f} s"
            if row.protected_s
            else "not protected again",
            f"{row.answers} answers, {row.writes} writes, {row.commits} transactions, "
            f"{len(row.violations)} violations",
        )
        say(f"cut {row.cut}, {row.direction}: {', '.join(known)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    add = parser.add_argument
    add("--suite", choices=list(RECIPES), default=DEFAULT_SUITE, help="(%(default)s)")
    add("--state", type=Path, metavar="DIR", help="folder of the lab (lab-state)")
    add("--keep", action="store_true", help="leave the lab up afterwards")
    add("--cuts", type=int, default=50, metavar="N", help="power cuts (%(default)s)")
    add("--protected", type=float, default=5, metavar="S", help="before each cut (%(default)s)")
    add("--disk", type=int, default=64, metavar="MIB", help="size of the disk (%(default)s)")
    add("--writers", type=int, default=4, metavar="N", help="of the key-value store (%(default)s)")
    add("--interval", type=float, default=100, metavar="MS",
        help="between two requests of a talking connection (%(default)s)")  # fmt: skip
    add("--pause", type=float, default=200, metavar="MS",
        help="greatest one between two requests of the other clients (%(default)s)")  # fmt: skip
    add("--memory-kib", type=int, default=256, metavar="KIB",
        help="of memory written each second (%(default)s)")  # fmt: skip
    add("--memory-mib", type=int, default=4, metavar="MIB", help="of that area (%(default)s)")
    add("--table", type=Path, metavar="FILE", help="only show the rows in a file of results")
    return parser


def _terminated(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit status is 0 if every cut was survived without a violation."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.cuts < 1:
        parser.error(f"--cuts {options.cuts}: expected at least one power cut")
    if options.table:
        print(soak_report.table(soak_report.read(options.table.read_text().splitlines(True))))
        return 0
    extend_path()
    signal.signal(signal.SIGTERM, _terminated)
    lab = Lab(options.state)
    soak = Soak(lab, options)
    signal.signal(signal.SIGUSR1, lambda *_: soak.enough())
    guest = GuestOptions(disk_mib=options.disk)
    try:
        with stage.ready(lab, Options(options.suite, guest=guest), soak.out, keep=options.keep):
            soak.run()
    except LabError as error:
        if error.details:
            say(error.details.rstrip())
        soak.failures.append(str(error))
    except KeyboardInterrupt:
        soak.failures.append("interrupted")
    table = soak_report.table(soak.rows)
    (soak.out / "soak.md").write_text(table)
    print(f"\n{table}")
    for failure in [*(each for row in soak.rows for each in row.violations), *soak.failures]:
        say(f"soak: {failure}")
    values = soak_report.result(soak.rows, soak.wanted, soak.failures, soak.figures)
    if values["result"] != "survived":
        say(f"where to look: {soak.out} and the hosts' consoles, {lab.state}/host-*/console.log")
    print(json.dumps(values), flush=True)
    return 0 if values["result"] == "survived" else 1


if __name__ == "__main__":
    sys.exit(main())
