# SPDX-License-Identifier: Apache-2.0
"""The demonstration: a guest goes on answering although the host under it loses its power."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType

from vagrant.demolib import databases, picture, report, stage
from vagrant.demolib.databases import Databases
from vagrant.demolib.history import History
from vagrant.demolib.hosts import await_event, bring_back, kemari
from vagrant.demolib.picture import Band, Mark
from vagrant.demolib.report import Figures
from vagrant.demolib.talk import Talk
from vagrant.demolib.verdict import Cut, Verdict, judge
from vagrant.lablib.command import extend_path, say, step
from vagrant.lablib.errors import LabError
from vagrant.lablib.guest import NAME as GUEST
from vagrant.lablib.guest import GuestOptions
from vagrant.lablib.host import Machine
from vagrant.lablib.lab import DEFAULT_SUITE, Lab, Options
from vagrant.lablib.network import HOSTS
from vagrant.lablib.recipe import RECIPES

#: Names of the client's two connections.
CONNECTIONS = ("IPv4", "IPv6")
#: Answers on each connection before protection begins.
UNPROTECTED = 150
#: Seconds that the client talks on after the last cut.
AFTERWARDS = 15.0
#: Answers on each connection after which they are coming again.
SETTLED = 25
#: Acknowledged writes on each of the databases' connections, likewise.
WRITTEN = 10


class Demo:
    """One run.

    :param guest: what the guest is to be like; with a disk, clients write to databases on it
    :ivar failures: one sentence for everything that did not hold, beside the verdict's
    """

    def __init__(
        self, lab: Lab, cuts: int, protected_s: float, interval_ms: float, guest: GuestOptions
    ) -> None:
        self.failures: list[str] = []
        self.figures: list[Figures] = []
        self.cuts: list[Cut] = []
        self.history: History | None = None
        self.verdict: Verdict | None = None
        self.acknowledged: int | None = None
        self.committed: int | None = None
        self.out = lab.state / "out"
        self._lab = lab
        self._guest = guest
        self._wanted = cuts
        self._protected_s = protected_s
        self._interval_ms = interval_ms
        self._copies: list[Band] = []

    def run(self) -> None:
        """Do it; everything that is known afterwards is in the attributes.

        :raises LabError: it could not be begun, or what the client saw cannot be read
        """
        self.out.mkdir(parents=True, exist_ok=True)
        for old in ("demo.svg", "demo.jsonl"):
            (self.out / old).unlink(missing_ok=True)
        with step("the guest boots on host a"):
            self._lab.guest_start("a", self._guest)
        words = ["--interval", str(self._interval_ms)]
        with ExitStack() as clients:
            talk = clients.enter_context(Talk(self._lab, self.out / "demo.jsonl", *words))
            writing = None
            if self._guest.disk_mib:
                writing = clients.enter_context(databases.clients(self._lab, self.out))
            try:
                self._story(talk, writing)
                if writing is not None:
                    self.failures += writing.stop()
            except LabError as error:
                # What the client saw until then is worth a verdict and a picture all the same.
                self.failures.append(str(error))
                if error.details:
                    say(error.details.rstrip())
            if writing is not None:
                self.acknowledged = writing.writes
                self.committed = writing.commits
            self.history = talk.stop()
        self.verdict = judge(self.history, self.cuts)
        self._draw(self.history, self.verdict)

    def _story(self, talk: Talk, writing: Databases | None) -> None:
        say("a client outside both hosts talks to the guest, which is not protected yet")
        talk.wait_answers(UNPROTECTED)
        primary, standby = HOSTS
        for number in range(self._wanted):
            if number:
                with step(f"host {standby} gets its power back"):
                    bring_back(self._lab, standby)
            self._protect(primary, standby)
            self._cut(talk, primary)
            if writing is not None:
                writing.wait_done(WRITTEN)
                self.failures += writing.noticed()
            primary, standby = standby, primary
        say("the client goes on")
        talk.wait_seconds(AFTERWARDS)
        self.failures += stage.misplaced(self._lab, primary)
        self.failures += stage.other_role(self._lab, primary, "owner")

    def _protect(self, primary: str, standby: str) -> None:
        """As asked the first time; after a power cut it comes about by itself."""
        begun = time.monotonic()
        if self.cuts:
            moved = time.time() - (begun - self.cuts[-1].at)
            with step(f"host {primary} protects it to host {standby}, by itself"):
                await_event(self._lab, primary, "protected", moved)
        else:
            with step(f"`kemari start {GUEST} {standby}` on host {primary}"):
                kemari(self._lab, primary, "start", GUEST, standby, "--progress", show=True)
        self._copies.append(Band(begun, time.monotonic(), "first copy", "#f1f1f1", "#666666"))

    def _cut(self, talk: Talk, primary: str) -> None:
        protected = time.monotonic()
        say(f"protected; the client talks on for {self._protected_s:.0f} s")
        talk.wait_seconds(self._protected_s)
        status = kemari(self._lab, primary, "status", GUEST).value[0]
        if not status["protected"]:
            raise LabError(
                f"The guest is {status['state']} ({status['why']}); expected it protected."
            )
        self.figures.append(Figures.of(status))
        seen = talk.seen
        cut = Cut(protected, time.monotonic())
        self._lab.power_cut(primary)
        self.cuts.append(cut)
        say(f"POWER CUT of host {primary}")
        resumed = talk.wait_resumed(cut.at, since=seen)
        for name, at in zip(CONNECTIONS, resumed, strict=True):
            say(f"answers over {name} again, {at - cut.at:.2f} s after the cut")
        talk.wait_answers(SETTLED)
        self.cuts[-1] = replace(cut, settled=time.monotonic())

    def _draw(self, history: History, verdict: Verdict) -> None:
        bands = [
            *self._copies,
            *(Band(cut.protected, cut.at, "protected") for cut in self.cuts),
        ]
        marks = []
        host, other = HOSTS
        for cut, resume in zip(self.cuts, verdict.resumes, strict=True):
            marks.append(Mark(cut.at, f"power cut of host {host}"))
            if resume.first is not None:
                text = f"host {other} answers, {resume.first - cut.at:.1f} s later"
                marks.append(Mark(resume.first, text, "#2f7040"))
            host, other = other, host
        text = picture.draw(
            history,
            title="Every request of two TCP connections through the power cut of the server's host",
            subtitle=f"{verdict.requests:,} requests, {verdict.lost} lost, "
            f"{verdict.duplicated} answered twice, {verdict.reordered} out of order; "
            "two Xen hosts in software emulation",
            names=[f"{n} ({a})" for n, a in zip(CONNECTIONS, history.addresses, strict=True)],
            bands=bands,
            marks=marks,
        )
        (self.out / "demo.svg").write_text(text)

    def table(self) -> str:
        """The table for people, or "" if the run did not get far enough."""
        if self.history is None or self.verdict is None or not self._copies:
            return ""
        return report.table(
            self.history, self.verdict, self.figures, self.cuts, CONNECTIONS, self._copies[0].begin
        )


def _where_to_look(lab: Lab) -> str:
    lines = [f"client: {lab.state}/out/demo.jsonl, demo.err"]
    for name, host in lab.hosts.items():
        kept = stage.kept_log(lab.state / "out", name)
        lines.append(f"host {name}: console {host.console_log}")
        if kept.exists():
            lines.append(f"host {name}: kemarid {kept}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="demo",
        description="A guest survives the power cut of its host, in a lab of two emulated hosts.",
    )
    parser.add_argument(
        "--suite", choices=list(RECIPES), default=DEFAULT_SUITE, help="(%(default)s)"
    )
    parser.add_argument("--state", type=Path, metavar="DIR", help="folder of the lab (lab-state)")
    parser.add_argument("--keep", action="store_true", help="leave the lab up afterwards")
    parser.add_argument("--json-only", action="store_true", help="no table, only the line of JSON")
    parser.add_argument(
        "--cuts", type=int, default=1, metavar="N", help="power cuts, to and fro (%(default)s)"
    )
    parser.add_argument(
        "--guest-vcpus", type=int, default=1, metavar="N", help="the guest's (%(default)s)"
    )
    parser.add_argument(
        "--guest-memory", type=int, default=GuestOptions().memory_mib, metavar="MIB",
        help="the guest's; the hosts have as much more (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--guest-disk", type=int, default=0, metavar="MIB",
        help="size of a disk with databases under load on it (none)",
    )  # fmt: skip
    parser.add_argument(
        "--protected", type=float, default=20, metavar="S", help="before each cut (%(default)s)"
    )
    parser.add_argument(
        "--interval", type=float, default=40, metavar="MS",
        help="between two requests of a connection (%(default)s)",
    )  # fmt: skip
    return parser


def _terminated(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit status is 0 if everything held."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.cuts < 1:
        parser.error(f"--cuts {args.cuts}: expected at least one power cut")
    extend_path()
    signal.signal(signal.SIGTERM, _terminated)
    lab = Lab(args.state)
    guest = GuestOptions(
        vcpus=args.guest_vcpus, memory_mib=args.guest_memory, disk_mib=args.guest_disk
    )
    demo = Demo(lab, args.cuts, args.protected, args.interval, guest)
    try:
        options = Options(args.suite, Machine.for_guest(guest.memory_mib), guest)
        with stage.ready(lab, options, demo.out, keep=args.keep):
            demo.run()
    except LabError as error:
        if error.details:
            say(error.details.rstrip())
        demo.failures.append(str(error))
    except KeyboardInterrupt:
        demo.failures.append("interrupted")
    failures = [*demo.failures, *(demo.verdict.failures if demo.verdict else ())]
    values = report.result(
        demo.verdict, demo.figures, demo.failures, demo.acknowledged, demo.committed
    )
    table = demo.table()
    if table and not args.json_only:
        print(f"\n{table}")
        if (demo.out / "demo.svg").exists():
            print(f"picture: {demo.out / 'demo.svg'}")
        print()
    if failures:
        say("demo: " + "\ndemo: ".join(failures) + f"\nwhere to look:\n{_where_to_look(lab)}")
    print(report.line(values), flush=True)
    return 0 if values["result"] == "survived" else 1
