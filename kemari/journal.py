# SPDX-License-Identifier: Apache-2.0
"""The event log: every decision as a sentence, in a bounded file of JSON lines.

One line is ``{"time": seconds since 1970, "host": …, "guest": …, "event": …, "text": …}`` and
whatever figures belong to it.  When the file has grown to its limit it becomes ``….1`` and a new
one is begun, so at most twice the limit is kept.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, BinaryIO, Final

log = logging.getLogger(__name__)

LIMIT: Final = 1 << 20


class Journal:
    """Writes and reads the event log of one host.

    :param path: the file; its folder is made if need be
    :param host: this host's name, put into every line
    :param limit: bytes after which the file is turned over
    """

    def __init__(self, path: Path, host: str, *, limit: int = LIMIT) -> None:
        self._path = path
        self._host = host
        self._limit = limit
        self._listeners: list[Callable[[dict[str, Any]], None]] = []
        self._looked = False

    def note(self, guest: str, event: str, text: str, **figures: Any) -> None:
        """Record a decision; also goes to the daemon's own log.

        A log that cannot be written is said in the daemon's log and changes nothing else: a full
        disk must not stop a failover.
        """
        entry = {
            "time": round(time.time(), 3),
            "host": self._host,
            "guest": guest,
            "event": event,
            "text": text,
            **figures,
        }
        log.info("%s: %s", guest or self._host, text)
        try:
            self._append(json.dumps(entry, separators=(",", ":")) + "\n")
        except OSError as error:
            log.error("the event log %s cannot be written: %s", self._path, error.strerror)
        for listener in list(self._listeners):
            listener(entry)

    async def attempt(self, guest: str, what: str, work: Awaitable[Any]) -> bool:
        """One step of several: when it fails, say so, that the others are taken all the same.

        :return: whether it was done
        """
        try:
            await work
        except Exception as error:
            log.debug("%s: %s", guest, what, exc_info=error)
            self.note(guest, "trouble", f"{guest}: could not {what}: {error}")
            return False
        return True

    def _append(self, line: str) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            if not self._looked and self._torn(file):
                file.write(b"\n")
            self._looked = True
            file.write(line.encode())
            full = file.tell() >= self._limit
        if full:
            self._path.replace(self._path.with_name(self._path.name + ".1"))

    @staticmethod
    def _torn(file: BinaryIO) -> bool:
        """Whether the file's last line has no end: a power cut leaves part of one, or zeros."""
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"

    def listen(self, listener: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Call ``listener`` with each new entry; returns a function that ends it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def read(self, guest: str = "", *, last: int = 1000) -> list[dict[str, Any]]:
        """The newest entries, oldest first; of one guest if named.

        A line that is not JSON (cut short by a power cut) is left out.
        """
        found: list[dict[str, Any]] = []
        for path in (self._path.with_name(self._path.name + ".1"), self._path):
            try:
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            except FileNotFoundError:
                continue
            for line in lines:
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if isinstance(entry, dict) and (not guest or entry.get("guest") == guest):
                    found.append(entry)
        return found[-last:]
