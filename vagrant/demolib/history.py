# SPDX-License-Identifier: Apache-2.0
"""What the client saw, read back from the file that it wrote.  Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


class HistoryError(ValueError):
    """The records are not what the client writes."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, as it arrived.

    :ivar connection: index of the connection
    :ivar number: of the request that it belongs to, from 1
    :ivar sent: when that request was sent; None if it had been answered before, or never was sent
    :ivar received: when the answer came
    :ivar count: the guest's own count of this connection's answers, from 1
    :ivar mono: the guest's CLOCK_MONOTONIC when it answered, in seconds
    :ivar boot: the guest's CLOCK_BOOTTIME, in seconds
    :ivar real: the guest's CLOCK_REALTIME, in seconds
    """

    connection: int
    number: int
    sent: float | None
    received: float
    count: int
    mono: float
    boot: float
    real: float

    @property
    def latency(self) -> float:
        """Seconds from request to answer; 0 for an answer without a request."""
        return 0.0 if self.sent is None else self.received - self.sent


@dataclass(frozen=True, slots=True)
class Request:
    """A request that was never answered."""

    connection: int
    number: int
    sent: float


@dataclass(slots=True)
class History:
    """Everything that the client recorded.

    :ivar addresses: of the service, one for each connection
    :ivar answers: in the order in which they came
    :ivar closed: why connections ended that should not have, by index
    :ivar began: when the connections were there
    :ivar until: when the client ended; if it was ended, its last answer
    :ivar ended: whether the client came to its own end
    """

    addresses: list[str]
    began: float
    until: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    unanswered: list[Request] = field(default_factory=list)
    closed: dict[int, str] = field(default_factory=dict)
    ended: bool = False

    def of(self, connection: int) -> list[Answer]:
        """The answers on one connection, in the order in which they came."""
        return [answer for answer in self.answers if answer.connection == connection]

    def silences(self, begin: float, end: float) -> list[tuple[float, float]]:
        """On each connection the longest time without an answer within these times.

        :return: (its begin, its end) for each connection
        """
        return [
            longest_gap([answer.received for answer in self.of(index)], begin, end)
            for index in range(len(self.addresses))
        ]


def longest_gap(times: Iterable[float], begin: float, end: float) -> tuple[float, float]:
    """The longest stretch of [begin, end] in which none of the times lies."""
    marks = [begin, *sorted(t for t in times if begin <= t <= end), end]
    return max(pairwise(marks), key=lambda gap: gap[1] - gap[0])


def read(lines: Iterable[str]) -> History:
    """Read the client's file.

    :raise HistoryError: it is not what the client writes; a last line that was cut off by the
        client's death is left out, and the history then has not ended
    """
    history: History | None = None
    rows = list(lines)
    for place, line in enumerate(rows, 1):
        if place == len(rows) and not line.endswith("\n"):
            break
        try:
            row: dict[str, Any] = json.loads(line)
            event = row.pop("event")
            if history is None:
                if event != "start":
                    raise HistoryError(f"line {place} is {event!r}; expected 'start'")
                addresses = [str(each["address"]) for each in row["connections"]]
                history = History(addresses, float(row["at"]))
            else:
                _take(history, event, row)
        except HistoryError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise HistoryError(f"line {place} cannot be read: {error!r}") from None
    if history is None:
        raise HistoryError("the client recorded nothing; expected a line 'start'")
    return history


def _take(history: History, event: str, row: dict[str, Any]) -> None:
    match event:
        case "answer":
            for clock in ("mono", "boot", "real"):
                row[clock] /= 1e9
            history.answers.append(Answer(**row))
            history.until = history.answers[-1].received
        case "unanswered":
            history.unanswered.append(Request(**row))
        case "closed":
            history.closed[int(row["connection"])] = str(row["why"])
        case "end":
            history.ended = True
            history.until = float(row["at"])
        case _:
            raise HistoryError(f"{event!r} is not an event of the client")
