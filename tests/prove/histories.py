# SPDX-License-Identifier: Apache-2.0
"""What the demonstration's clients recorded, as histories for the checker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tests.prove.linearizable import Judgement, Operation, check, counter, register


class HistoryError(ValueError):
    """The records are not what the clients write, or the service answered with an error."""


def operations(events: Iterable[Mapping[str, Any]]) -> list[Operation]:
    """The operations of ``vagrant.demolib.registers``, from the lines that it printed."""
    found = []
    for event in events:
        if event["event"] == "done":
            found.append(
                _operation(
                    event["connection"],
                    event["command"],
                    event["reply"],
                    event["sent"],
                    event["answered"],
                )
            )
        elif event["event"] == "end":
            for connection, command, sent in event["waiting"]:
                found.append(_operation(connection, command, None, sent, None))
    return found


def _operation(
    connection: int, command: list[str], reply: str | None, sent: float, received: float | None
) -> Operation:
    if reply == "error":
        raise HistoryError(f"{' '.join(command)} was answered with an error")
    name, key, *rest = command
    argument: Any
    answer: Any = reply
    match name:
        case "GET":
            argument, answer = None, _value(reply)
        case "PUT":
            argument = rest[0]
        case "CAS":
            argument, answer = (_value(rest[0]), rest[1]), reply == "ok"
        case "INCR":
            argument, answer = int(rest[0]), None if reply is None else int(reply)
        case _:
            raise HistoryError(f"{name} is no command of the registers")
    return Operation(connection, key, name.lower(), argument, answer, sent, received)


def _value(word: str | None) -> str | None:
    return None if word == "-" else word


def judge(events: Iterable[Mapping[str, Any]]) -> list[Judgement]:
    """Whether one machine that never died could have answered so: registers, then counters.

    :raise HistoryError: the records are not what the clients write
    :raise tests.prove.linearizable.Undecided: they are too many at a time
    """
    every = operations(events)
    counts = [each for each in every if each.name == "incr"]
    values = [each for each in every if each.name != "incr"]
    return [check(values, register, None), check(counts, counter, 0)]
