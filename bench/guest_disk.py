#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What Kemari costs a guest's disk, in the lab: ``docs/performance.md``, A guest's disk.

The guest reads and writes past its cache (``vagrant/guest/io.c``), by turns in one run: a disk
that Xen's own script gives it (``phy:`` of a loop device), one through ``block-kemari``, and that
one while the guest is protected.  Figures are medians of the turns, and ratios to the first way.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vagrant.demolib import stage  # noqa: E402
from vagrant.demolib.hosts import kemari  # noqa: E402
from vagrant.lablib.command import extend_path, say, step  # noqa: E402
from vagrant.lablib.errors import LabError  # noqa: E402
from vagrant.lablib.guest import COMMAND_PORT, GuestOptions  # noqa: E402
from vagrant.lablib.guest import NAME as GUEST  # noqa: E402
from vagrant.lablib.lab import DEFAULT_SUITE, Lab, Options  # noqa: E402
from vagrant.lablib.network import GUEST_IPV4  # noqa: E402
from vagrant.lablib.recipe import RECIPES  # noqa: E402

HOST, STANDBY = "a", "b"
WAYS = ("raw", "unprotected", "protected")
RAW, OURS = "/dev/xvdd", "/dev/xvdc"
SIZES = {"4 KiB": 4 << 10, "128 KiB": 128 << 10}
#: Run at the client's place: one command, and its line of answer.
_ASK = """
import socket, sys
stream = socket.create_connection((sys.argv[1], int(sys.argv[2])), 120).makefile("rw")
stream.write(sys.argv[3] + "\\n")
stream.flush()
sys.stdout.write(stream.readline())
"""
#: The disk of Xen's own script, and the wait until the guest has it; then the other way round.
_ATTACH = f"""
modprobe loop && image=/root/guest/raw.img &&
  {{ [ -e $image ] || head -c {{mib}}M /dev/zero >$image; }} && sync &&
  device=$(losetup -j $image | cut -d: -f1) && device=${{device:-$(losetup -f --show $image)}} &&
  xl block-attach {GUEST} "phy:$device,xvdd,w" &&
  state=/local/domain/$(xl domid {GUEST})/device/vbd/51760/state &&
  for try in $(seq 100); do
      [ "$(xenstore-read $state)" = 4 ] && exit 0
      sleep 0.1
  done
exit 1
"""
_DETACH = f"xl block-detach {GUEST} xvdd"


@dataclass(frozen=True, slots=True)
class Job:
    """What is done to a disk.

    :ivar depth: requests at a time
    """

    what: str
    order: str
    size: str
    depth: int

    def __str__(self) -> str:
        return f"{self.order} {self.what}, {self.size}, {self.depth} at a time"

    def command(self, device: str, seconds: float) -> str:
        """For the guest."""
        return f"io {device} {self.what} {self.order} {SIZES[self.size]} {self.depth} {seconds}"


@dataclass(frozen=True, slots=True)
class Figure:
    """What came of it.

    :ivar rate: requests per second
    :ivar p50_ms: median time of a request
    """

    rate: float
    p50_ms: float
    p99_ms: float

    @classmethod
    def read(cls, line: str) -> Figure:
        """Out of the guest's answer.

        :raises LabError: it is an error
        """
        match line.split():
            case ["ok", "io", "requests", n, "seconds", s, "p50_us", p50, "p99_us", p99]:
                return cls(int(n) / float(s), int(p50) / 1000, int(p99) / 1000)
        raise LabError(f"The guest answered {line.strip()!r}; expected figures.")


def middle(figures: Sequence[Figure]) -> Figure:
    """Medians, each by itself."""
    return Figure(
        statistics.median(each.rate for each in figures),
        statistics.median(each.p50_ms for each in figures),
        statistics.median(each.p99_ms for each in figures),
    )


class Bench:
    """One run.

    :ivar found: every figure of a job, by the way
    """

    def __init__(self, lab: Lab, options: argparse.Namespace) -> None:
        self._lab = lab
        self._options = options
        self.jobs = [
            Job(*words)
            for words in product(("read", "write"), ("sequential", "random"), SIZES, options.depth)
        ]
        self.found: dict[Job, dict[str, list[Figure]]] = {
            job: {way: [] for way in WAYS} for job in self.jobs
        }

    def run(self) -> None:
        """Measure.

        :raises LabError: something could not be done
        """
        self._lab.guest_start(HOST, GuestOptions(scratch_mib=self._options.disk))
        for number in range(1, self._options.turns + 1):
            with step(f"turn {number} of {self._options.turns}"):
                self._turn()

    def _turn(self) -> None:
        self._lab.ssh(HOST, _ATTACH.replace("{mib}", str(self._options.disk)))
        for job in self.jobs:
            self._measure(job, "raw", RAW)
            self._measure(job, "unprotected", OURS)
        # A guest with a disk that block-kemari does not serve cannot be protected.
        self._lab.ssh(HOST, _DETACH)
        kemari(self._lab, HOST, "start", GUEST, STANDBY)
        for job in self.jobs:
            self._measure(job, "protected", OURS)
        kemari(self._lab, HOST, "stop", GUEST)

    def _measure(self, job: Job, way: str, device: str) -> None:
        command = job.command(device, self._options.seconds)
        argv = [sys.executable, "-c", _ASK, GUEST_IPV4, str(COMMAND_PORT), command]
        figure = Figure.read(self._lab.run_in_net(argv).stdout)
        say(f"{job}: {way} {figure.rate:.0f}/s")
        self.found[job][way].append(figure)

    def medians(self) -> dict[Job, dict[str, Figure]]:
        """Of each job and way."""
        return {
            job: {way: middle(figures) for way, figures in by_way.items()}
            for job, by_way in self.found.items()
        }


def table(medians: dict[Job, dict[str, Figure]]) -> str:
    """In Markdown: requests per second and their ratio to raw, then median and 99th percentile."""
    head = ("", *(f"{way}, 1/s" for way in WAYS), *(f"{way}, p50 / p99 ms" for way in WAYS))
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for job, by_way in medians.items():
        raw = by_way["raw"].rate
        rates = [f"{by_way[way].rate:,.0f} ({by_way[way].rate / raw:.2f})" for way in WAYS]
        times = [f"{by_way[way].p50_ms:.1f} / {by_way[way].p99_ms:.1f}" for way in WAYS]
        lines.append(f"| {' | '.join([str(job), *rates, *times])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit status is 0 if everything was measured."""
    parser = argparse.ArgumentParser(prog="guest_disk", description=__doc__)
    add = parser.add_argument
    add("--suite", choices=list(RECIPES), default=DEFAULT_SUITE, help="(%(default)s)")
    add("--state", type=Path, metavar="DIR", help="folder of the lab (lab-state)")
    add("--turns", type=int, default=2, help="(%(default)s)")
    add("--seconds", type=float, default=2.0, help="of each measurement (%(default)s)")
    add("--disk", type=int, default=32, metavar="MIB", help="size of each disk (%(default)s)")
    add("--depth", type=int, nargs="+", default=[1, 4], help="requests at a time (%(default)s)")
    options = parser.parse_args(argv)
    extend_path()
    lab = Lab(options.state)
    bench = Bench(lab, options)
    guest = GuestOptions(scratch_mib=options.disk)
    try:
        with stage.ready(lab, Options(options.suite, guest=guest), lab.state / "out"):
            bench.run()
    except LabError as error:
        if error.details:
            say(error.details.rstrip())
        say(f"guest_disk: {error}")
        return 1
    medians = bench.medians()
    print(table(medians))
    values = [
        {**asdict(job), **{way: asdict(by_way[way]) for way in WAYS}}
        for job, by_way in medians.items()
    ]
    print(json.dumps(values), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
