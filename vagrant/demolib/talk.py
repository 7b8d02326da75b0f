# SPDX-License-Identifier: Apache-2.0
"""The client of the echo service, at the client's place of a lab, and waiting for its answers."""

from __future__ import annotations

import time
from pathlib import Path

from vagrant.demolib.client import SILENCE
from vagrant.demolib.history import History, HistoryError, read
from vagrant.demolib.program import Program
from vagrant.lablib.errors import LabError
from vagrant.lablib.lab import Lab


class Talk(Program):
    """A client that talks until it is stopped.

    :param records: the file that it writes
    :param options: further words of its command line
    :raises LabError: the lab is down, or the guest's service does not answer
    """

    def __init__(self, lab: Lab, records: Path, *options: str) -> None:
        self.records = records
        words = ["vagrant.demolib.client", str(records.absolute()), *options]
        super().__init__(lab, "client", words, records.with_suffix(".err"))
        self.begin("the connections", lambda event: event["event"] == "connected", timeout=120)

    @property
    def answers(self) -> list[int]:
        """Answers so far on each connection, as of the last tick."""
        ticks = self.events("tick")
        return list(ticks[-1]["answers"]) if ticks else []

    def wait_answers(self, count: int, *, timeout: float = 300) -> None:
        """Wait until there were this many more answers on every connection.

        :raises LabError: there were not in time, or the client ended
        """
        since = self.seen
        before = self.answers
        self.wait(
            f"{count} more answers on every connection",
            lambda event: (
                event["event"] == "tick"
                and len(event["answers"]) >= len(before)
                and all(
                    now - then >= count
                    for now, then in zip(
                        event["answers"], before or [0] * len(event["answers"]), strict=True
                    )
                )
            ),
            since=since,
            timeout=timeout,
        )

    def wait_resumed(self, after: float, *, since: int, timeout: float = 180) -> list[float]:
        """Wait until answers came again on every connection after a silence.

        What comes within the time that makes a silence may have left before it, and is not meant.

        :param after: when the silence began, at the earliest
        :param since: index of the first event to look at, see :attr:`seen`
        :return: when, for each connection
        :raises LabError: a connection ended, or they did not come in time
        """
        resumed = []
        for index in range(len(self.answers)):
            event = self.wait(
                f"answers on connection {index} again",
                lambda event, index=index: (  # type: ignore[misc]
                    event["event"] in ("resumed", "closed")
                    and event["connection"] == index
                    and event["at"] > after + SILENCE
                ),
                since=since,
                timeout=timeout,
            )
            if event["event"] == "closed":
                raise LabError(f"Connection {index} ended: {event['why']}.")
            resumed.append(float(event["at"]))
        return resumed

    def wait_seconds(self, seconds: float) -> None:
        """Let it talk on for a while.

        :raises LabError: the client ended
        """
        end = time.monotonic() + seconds
        self.wait(
            f"{seconds:.0f} s more of it",
            lambda event: event["event"] == "tick" and event["at"] >= end,
            since=self.seen,
            timeout=seconds + 60,
        )

    def stop(self) -> History:
        """Have it send no more, wait for the last answers, and read what it saw.

        :raises LabError: it did not end, or its records cannot be read
        """
        self.finish()
        return self.history()

    def history(self) -> History:
        """What it has written so far; all of it once it was stopped.

        :raises LabError: its records cannot be read
        """
        try:
            with self.records.open() as lines:
                return read(lines)
        except HistoryError as error:
            raise LabError(f"The client's records {self.records}: {error}.", self.said()) from None
