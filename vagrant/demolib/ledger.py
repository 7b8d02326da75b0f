# SPDX-License-Identifier: Apache-2.0
"""What clients of the guest's database were told, and whether one machine could have said it.

Each list has one writer and all writers share one counter, so that linearizability (Herlihy and
Wing, 1990) can be decided by looking: appends to a list must answer 1, 2, 3 ...; answers of the
counter must be different, and grow from any answer to every request that was sent after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vagrant.demolib.program import Event, Program, connected
from vagrant.demolib.writer import TOTAL, list_of
from vagrant.lablib.lab import Lab


@dataclass(frozen=True, slots=True)
class Done:
    """A request that was answered; times in seconds on one clock."""

    connection: int
    command: tuple[str, ...]
    sent: float
    answered: float
    reply: Any

    @property
    def latency(self) -> float:
        """Seconds that the answer took."""
        return self.answered - self.sent


@dataclass(frozen=True, slots=True)
class Contents:
    """What the database holds in the end.

    :ivar lists: of each connection
    :ivar total: the common counter
    """

    lists: Sequence[Sequence[int]]
    total: int


def faults(
    done: Sequence[Done], waiting: Iterable[tuple[int, Sequence[str]]], held: Contents
) -> list[str]:
    """One sentence for everything that a single machine that never died could not have done.

    :param waiting: (connection, command) of what was sent and not answered: done once or never
    """
    open_ones = {(connection, command[0]) for connection, command in waiting}
    found = answer_faults(done, len(held.lists))
    for index, held_list in enumerate(held.lists):
        acknowledged = _appends(done, index)
        most = len(acknowledged) + ((index, "RPUSH") in open_ones)
        if list(held_list) != list(range(1, len(held_list) + 1)):
            found.append(f"{list_of(index)} holds other than 1 to {len(held_list)}, in order")
        if not len(acknowledged) <= len(held_list) <= most:
            found.append(
                f"{list_of(index)} holds {len(held_list)} numbers, expected {len(acknowledged)}"
                + (f" or {most}" if most > len(acknowledged) else "")
            )
    counts = _counts(done)
    most = len(counts) + sum(command == "INCR" for _, command in open_ones)
    if not max([len(counts), *(each.reply for each in counts)]) <= held.total <= most:
        found.append(
            f"the counter stands at {held.total} after {len(counts)} acknowledged counts "
            f"and {most - len(counts)} open ones"
        )
    return found


def answer_faults(done: Sequence[Done], connections: int) -> list[str]:
    """The same of the answers alone, whatever the database holds."""
    found = []
    for index in range(connections):
        for number, each in enumerate(_appends(done, index), start=1):
            if (int(each.command[2]), each.reply) != (number, number):
                found.append(
                    f"append {each.command[2]} to {list_of(index)} was answered {each.reply}, "
                    f"expected append {number} to be answered {number}"
                )
                break
    return found + _counter(_counts(done))


def _appends(done: Sequence[Done], index: int) -> list[Done]:
    return [each for each in done if each.command[:2] == ("RPUSH", list_of(index))]


def _counts(done: Sequence[Done]) -> list[Done]:
    return [each for each in done if each.command == ("INCR", TOTAL)]


def _counter(counts: Sequence[Done]) -> list[str]:
    found = []
    replies = [each.reply for each in counts]
    if len(set(replies)) != len(replies):
        found.append("the counter gave the same number twice")
    # The greatest number that anybody had been told before a request was sent is below its answer.
    by_answer = sorted(counts, key=lambda each: each.answered)
    told, place = 0, 0
    for each in sorted(counts, key=lambda each: each.sent):
        while place < len(by_answer) and by_answer[place].answered < each.sent:
            told = max(told, by_answer[place].reply)
            place += 1
        if each.reply <= told:
            found.append(f"the counter gave {each.reply} after it had given {told}")
    return found


class Writers(Program):
    """Clients that write to the guest's database until they are stopped.

    :param pause_ms: greatest pause between two writes of a connection
    :raises LabError: the lab is down, or the database does not answer
    """

    def __init__(self, lab: Lab, errors: Path, connections: int = 4, pause_ms: float = 0) -> None:
        words = ["vagrant.demolib.writer", "--connections", str(connections)]
        words += ["--pause", str(pause_ms)]
        super().__init__(lab, "writer", words, errors)
        self._connections = connections
        self.begin("the connections", *map(connected, range(connections)))

    def wait_done(self, count: int, *, timeout: float = 300) -> None:
        """Wait until so many more appends were acknowledged on each connection.

        :raises LabError: they were not in time, or the client ended
        """
        since = self.seen
        for index in range(self._connections):
            wanted = _nth_append(index, count)
            self.wait(f"{count} more appends", wanted, since=since, timeout=timeout)

    @property
    def done(self) -> list[Done]:
        """What was answered so far, in the order of the answers."""
        return [
            Done(
                connection=event["connection"],
                command=tuple(event["command"]),
                sent=event["sent"],
                answered=event["answered"],
                reply=event["reply"],
            )
            for event in self.events("done")
        ]

    @property
    def count(self) -> int:
        """How many writes were acknowledged so far."""
        return len(self.events("done"))

    def noticed(self) -> list[str]:
        """One sentence for everything that was answered so far and cannot be."""
        return answer_faults(self.done, self._connections)

    def stop(self) -> list[str]:
        """Have them write no more, read what the database holds, and compare.

        :return: one sentence for everything that does not fit
        :raises LabError: they did not end
        """
        end = self.result()
        waiting = [(connection, command) for connection, command, _ in end["waiting"]]
        held = Contents(**end["contents"])
        broken = [f"connection {index} ended: {why}" for index, why in end["broken"].items()]
        return [*broken, *faults(self.done, waiting, held)]


def _nth_append(connection: int, count: int) -> Callable[[Event], bool]:
    left = count

    def wanted(event: Event) -> bool:
        nonlocal left
        if (
            event["event"] == "done"
            and event["connection"] == connection
            and event["command"][0] == "RPUSH"
        ):
            left -= 1
        return left <= 0

    return wanted
