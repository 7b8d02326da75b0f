# SPDX-License-Identifier: Apache-2.0
"""The guest's transactions and their client on this machine, and what the client must find."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vagrant.demolib.transactions import Held, faults

ROOT = Path(__file__).resolve().parents[2]
WHOLE = Held(7, 7, 1, 7)


@pytest.mark.parametrize(
    ("acknowledged", "asked", "tables"),
    [(7, 7, [WHOLE, WHOLE]), (6, 7, [WHOLE, WHOLE]), (0, 1, [Held(0, 0, 0, 0)] * 2)],
    ids=["all", "one more", "none yet"],
)
def test_what_a_database_that_keeps_its_word_may_hold(
    acknowledged: int, asked: int, tables: list[Held]
) -> None:
    assert faults(0, acknowledged, asked, tables) == []


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        ([Held(6, 6, 1, 6)] * 2, "7 were acknowledged"),
        ([Held(0, 0, 0, 0)] * 2, "7 were acknowledged"),
        ([Held(8, 8, 1, 8)] * 2, "7 asked for"),
        ([Held(8, 7, 1, 7)] * 2, "8 rows with 7 different"),
        ([Held(6, 6, 1, 7)] * 2, "6 numbers from 1 to 7"),
        ([Held(6, 6, 2, 7)] * 2, "6 numbers from 2 to 7"),
        ([WHOLE, Held(6, 6, 1, 6)], "half a transaction"),
    ],
    ids=["lost", "all lost", "never asked for", "twice", "a gap", "the first is gone", "half"],
)
def test_what_it_may_not(tables: list[Held], why: str) -> None:
    assert any(why in each for each in faults(0, 7, 7, tables))


class Service:
    """The guest's program on this machine."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as free:
            self.port: int = free.getsockname()[1]
        source = (ROOT / "vagrant" / "guest" / "transactions.c").read_text()
        changed = folder / "transactions.c"
        changed.write_text(source.replace("PORT = 7979", f"PORT = {self.port}"))
        program = folder / "transactions"
        flags = ["-std=c11", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(["gcc", *flags, "-o", program, changed, "-lsqlite3"], check=True)
        self.data = folder / "data"
        self.data.mkdir()
        self.process = subprocess.Popen([program, self.data])


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    yield service
    # Not its group, which it may not have made yet: its children end with their connections.
    service.process.kill()
    service.process.wait()


def test_the_client_and_the_guest_s_program_agree(service: Service) -> None:
    client = subprocess.Popen(
        [
            *(sys.executable, "-m", "vagrant.demolib.transactions", "--host", "::1"),
            *("--port", str(service.port), "--pause", "1"),
        ],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdin is not None
    assert client.stdout is not None

    def events(name: str, count: int) -> list[dict[str, Any]]:
        assert client.stdout is not None
        found: list[dict[str, Any]] = []
        while len(found) < count:
            event = json.loads(client.stdout.readline())
            found += [event] if event["event"] == name else []
        return found

    assert len(events("done", 20)) == 20
    client.stdin.write("look\n")
    client.stdin.flush()
    assert events("looked", 1)[0]["faults"] == []
    # Somebody takes a row away.
    with sqlite3.connect(service.data / "rollback.db", timeout=30) as database:
        database.execute("DELETE FROM other WHERE client = 1 AND number = 3")
    database.close()
    client.stdin.write("look\n")
    client.stdin.flush()
    found = events("looked", 1)[0]["faults"]
    assert any("half a transaction of client 1" in each for each in found)
    client.stdin.close()
    client.send_signal(signal.SIGTERM)
    (end,) = events("end", 1)
    assert (end["broken"], end["late"]) == ({}, 0)
    assert client.wait(10) == 0
