# SPDX-License-Identifier: Apache-2.0
"""A load on the guest's memory that checks itself, and asking it from outside what it has found.

The load is ``keep`` of ``vagrant/guest/demo.c``: it writes to pages at random, and checks on and on
that each page of its area holds what was written there last.  It is asked over one connection that
is never opened again.  Its own counts must never go back either: then the guest would be an older
one than the outside has heard of.

Run as a program of its own, at the client's place in the lab's network: begins the load, then asks
once for each line of standard input, which has the number of rounds to wait for.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vagrant.demolib.program import Program
from vagrant.lablib.errors import LabError
from vagrant.lablib.guest import COMMAND_PORT
from vagrant.lablib.lab import Lab
from vagrant.lablib.network import GUEST_IPV4

#: Seconds to wait for a connection, or for an answer.
PATIENCE = 300.0


@dataclass(frozen=True, slots=True)
class Kept:
    """What the load has come to.

    :ivar writes: pages written
    :ivar rounds: checks of the whole area
    :ivar mismatches: checks of a page that held something else than was written there
    """

    writes: int
    rounds: int
    mismatches: int


def faults(told: Sequence[Kept]) -> list[str]:
    """One sentence for everything that the memory of one machine could not have done.

    :param told: answers, in the order in which they were asked for and came
    """
    found = []
    for before, after in pairwise(told):
        if after.writes < before.writes or after.rounds < before.rounds:
            found.append(f"the memory load went back from {before} to {after}")
    if told and told[-1].mismatches:
        found.append(f"the memory load found {told[-1].mismatches} pages with other contents")
    return found


class Memory(Program):
    """The load, and its client.

    :param kib: that it writes per second
    :param mib: of its area
    :raises LabError: the lab is down, or the guest does not answer
    """

    def __init__(self, lab: Lab, errors: Path, kib: int, mib: int) -> None:
        words = ["vagrant.demolib.memory", str(kib), str(mib)]
        super().__init__(lab, "memory load's client", words, errors)
        self.begin("the load", lambda event: event["event"] == "began")

    @property
    def told(self) -> list[Kept]:
        """Every answer so far."""
        return [
            Kept(event["writes"], event["rounds"], event["mismatches"])
            for event in self.events("kept")
        ]

    def look(self, rounds: int = 0) -> Kept:
        """What it has come to, once it has come to so many rounds.

        :raises LabError: the guest does not answer
        """
        mark = self.seen
        self.tell(str(rounds))
        self.wait("an answer", lambda event: event["event"] == "kept", since=mark)
        return self.told[-1]

    @property
    def faults(self) -> list[str]:
        """What does not hold, of everything it told so far."""
        return faults(self.told)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="memory", description="A load on the guest's memory.")
    parser.add_argument("kib", type=int)
    parser.add_argument("mib", type=int)
    options = parser.parse_args(argv)
    stream = socket.create_connection((GUEST_IPV4, COMMAND_PORT), PATIENCE).makefile("rw")

    def ask(command: str) -> list[str]:
        stream.write(f"{command}\n")
        stream.flush()
        said = stream.readline().split()
        if said[:1] != ["ok"]:
            raise LabError(f"The guest answered {' '.join(said)!r} to {command!r}; expected ok.")
        return said[1:]

    ask(f"keep {options.kib} {options.mib}")
    print(json.dumps({"event": "began"}), flush=True)
    for line in sys.stdin:
        writes, rounds, mismatches = map(int, ask(f"kept {int(line)}")[1:])
        kept = {"writes": writes, "rounds": rounds, "mismatches": mismatches}
        print(json.dumps({"event": "kept", **kept}), flush=True)


if __name__ == "__main__":
    main()
