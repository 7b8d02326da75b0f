# SPDX-License-Identifier: Apache-2.0
"""A program at the client's place of a lab that tells what happens, and waiting for that."""

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

from vagrant.lablib.errors import LabError
from vagrant.lablib.lab import REPOSITORY, Lab

Event = dict[str, Any]


def connected(connection: int) -> Callable[[Event], bool]:
    """Whether an event tells that this connection is there."""
    return lambda event: event["event"] == "connected" and event["connection"] == connection


class Program:
    """Runs until it is stopped; each line that it prints is an event, a JSON object.

    :param name: what it is called in sentences, "client"
    :param words: a module of this repository and its arguments
    :param errors: file for what it says on standard error
    """

    def __init__(self, lab: Lab, name: str, words: list[str], errors: Path) -> None:
        errors.parent.mkdir(parents=True, exist_ok=True)
        self.name = name
        self._errors = errors
        self._events: list[Event] = []
        self._changed = threading.Condition()
        # By the same interpreter as ours.
        with errors.open("w") as file:
            self._process = subprocess.Popen(
                lab.net_argv([sys.executable, "-m", *words]),
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

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

    def events(self, name: str) -> list[Event]:
        """The events of that name so far."""
        with self._changed:
            return [event for event in self._events if event["event"] == name]

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
        :raises LabError: it did not come in time, or the program ended
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                for event in self._events[since:]:
                    if wanted(event):
                        return event
                    if event["event"] == "gone":
                        raise LabError(f"The {self.name} ended; expected {what}.", self.said())
                since = len(self._events)
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise LabError(
                        f"The {self.name} saw nothing of {what} within {timeout:.0f} s.",
                        self.said(),
                    )

    def begin(self, what: str, *wanted: Callable[[Event], bool], timeout: float = 300) -> None:
        """Wait for all of these events, which come first; end the program if they do not come.

        :raises LabError: they did not come in time, or the program ended
        """
        try:
            for each in wanted:
                self.wait(what, each, timeout=timeout)
        except BaseException:
            self.close()
            raise

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def finish(self, timeout: float = 300) -> None:
        """End its standard input, ask it to end, and wait until it has.

        :raises LabError: it did not within ``timeout`` seconds
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.close()
            raise LabError(
                f"The {self.name} did not end within {timeout:.0f} s.", self.said()
            ) from None
        self._reader.join(timeout=10)

    def result(self) -> Event:
        """Ask it to end, and the event ``end`` that it came to.

        :raises LabError: it did not end, or without that
        """
        self.finish()
        ends = self.events("end")
        if not ends:
            raise LabError(f"The {self.name} ended without a result.", self.said())
        return ends[-1]

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

    def said(self) -> str:
        """The end of what it said on standard error."""
        return self._errors.read_text()[-2000:]
