# SPDX-License-Identifier: Apache-2.0
"""The client as a process at the client's place of a lab, and waiting for what it tells."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vagrant.demolib.history import History, HistoryError, read
from vagrant.lablib.errors import LabError
from vagrant.lablib.lab import REPOSITORY, Lab

Event = dict[str, Any]


class Talk:
    """A client that talks until it is stopped.

    :param records: the file that it writes
    :param options: further words of its command line
    :raises LabError: the lab is down, or the guest's service does not answer
    """

    def __init__(self, lab: Lab, records: Path, *options: str) -> None:
        records.parent.mkdir(parents=True, exist_ok=True)
        self.records = records
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._errors = records.with_suffix(".err")
        # As a module of the repository's root, by the same interpreter as ours.
        argv = [sys.executable, "-m", "vagrant.demolib.client", str(records.absolute()), *options]
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                lab.net_argv(argv),
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.wait("the connections", lambda event: event["event"] == "connected", timeout=120)
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._add(json.loads(line))
        self._add({"event": "gone", "at": time.monotonic()})

    def _add(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    @property
    def seen(self) -> int:
        """How many events there have been: where to wait on from."""
        with self._changed:
            return len(self._events)

    @property
    def answers(self) -> list[int]:
        """Answers so far on each connection, as of the last tick."""
        with self._changed:
            ticks = [event["answers"] for event in self._events if event["event"] == "tick"]
        return list(ticks[-1]) if ticks else []

    def wait(
        self,
        what: str,
        wanted: Callable[[Event], bool],
        *,
        since: int = 0,
        timeout: float = 300,
    ) -> Event:
        """Wait for an event.

        :param what: what is waited for, for the error's sentence
        :param since: index of the first event to look at, see :attr:`seen`
        :raises LabError: it did not come in time, or the client ended
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                for event in self._events[since:]:
                    if wanted(event):
                        return event
                    if event["event"] == "gone":
                        raise LabError(f"The client ended; expected {what}.", self._said())
                since = len(self._events)
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise LabError(
                        f"The client saw nothing of {what} within {timeout:.0f} s.", self._said()
                    )

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
                    and event["at"] > after
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
        self._process.terminate()
        try:
            self._process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.close()
            raise LabError("The client did not end within 120 s.", self._said()) from None
        return self.history()

    def history(self) -> History:
        """What it has written so far; all of it once it was stopped.

        :raises LabError: its records cannot be read
        """
        try:
            with self.records.open() as lines:
                return read(lines)
        except HistoryError as error:
            raise LabError(f"The client's records {self.records}: {error}.", self._said()) from None

    def close(self) -> None:
        """End it at once if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _said(self) -> str:
        return self._errors.read_text()[-2000:]
