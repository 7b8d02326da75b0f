# SPDX-License-Identifier: Apache-2.0
"""The clients of the registers, and what is made of their records."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.prove.histories import HistoryError, judge, operations

_ROOT = Path(__file__).resolve().parents[2]


class Registers:
    """The service of ``vagrant/guest/demo.c``, here; forgets each 40th write if told to."""

    def __init__(self, *, forgetful: bool) -> None:
        self._values: dict[str, str] = {}
        self._lock = threading.Lock()
        self._puts = 0
        self._forgetful = forgetful
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rw") as file, contextlib.suppress(OSError):
            for line in file:
                with self._lock:
                    file.write(self._answer(line.split()) + "\n")
                    file.flush()

    def _answer(self, words: list[str]) -> str:
        name, key, *rest = words
        value = self._values.get(key, "-")
        if name == "GET":
            return value
        if name == "INCR":
            self._values[key] = str(int(value.replace("-", "0")) + int(rest[0]))
            return self._values[key]
        if name == "CAS" and value != rest[0]:
            return "no"
        self._puts += 1
        if not (self._forgetful and self._puts % 40 == 0):
            self._values[key] = rest[-1]
        return "ok"


def _records(service: Registers, enough: int) -> list[dict[str, Any]]:
    port = service.listener.getsockname()[1]
    words = [f"--port={port}", "--host=127.0.0.1", "--pause=1", "--connections=5"]
    with subprocess.Popen(
        [sys.executable, "-m", "vagrant.demolib.registers", *words],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        events = []
        for line in process.stdout:
            events.append(json.loads(line))
            if len(events) == enough:
                process.send_signal(signal.SIGTERM)
    service.listener.close()
    return events


def test_an_honest_service_is_believed() -> None:
    events = _records(Registers(forgetful=False), 1500)
    registers, counters = judge(events)
    assert events[-1]["event"] == "end"
    assert registers.linearizable, registers.sentences()
    assert counters.linearizable, counters.sentences()
    assert registers.keys == 3
    assert counters.keys == 2
    assert {each.name for each in operations(events)} == {"get", "put", "cas", "incr"}


def test_a_service_that_forgets_writes_is_found_out() -> None:
    registers, counters = judge(_records(Registers(forgetful=True), 1500))
    assert not registers.linearizable
    assert counters.linearizable


def test_what_was_not_answered_is_taken_as_such() -> None:
    events: list[dict[str, Any]] = [
        {"event": "connected", "connection": 0},
        {
            "event": "done",
            "connection": 0,
            "command": ["GET", "r1"],
            "sent": 5.0,
            "answered": 6.0,
            "reply": "1.1",
        },
        {"event": "end", "waiting": [[1, ["PUT", "r1", "1.1"], 1.0]], "broken": {}},
    ]
    assert all(each.linearizable for each in judge(events))
    events[-1]["waiting"] = []
    assert not judge(events)[0].linearizable


def test_an_error_is_not_an_answer() -> None:
    event = {
        "event": "done",
        "connection": 0,
        "command": ["GET", "r1"],
        "sent": 5.0,
        "answered": 6.0,
        "reply": "error",
    }
    with pytest.raises(HistoryError, match="GET r1 was answered with an error"):
        judge([event])
