# SPDX-License-Identifier: Apache-2.0
"""The client against a service of the same kind on this machine, which can be made to misbehave."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.demo_service import Service
from vagrant.demolib.history import History, read
from vagrant.demolib.verdict import judge

ROOT = Path(__file__).resolve().parents[2]


class Running:
    """The client as a process."""

    def __init__(self, service: Service, records: Path, *options: str) -> None:
        self.records = records
        words = ["--address", "127.0.0.1", "--address", "127.0.0.1", "--port", str(service.port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vagrant.demolib.client", str(records), *words, *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )

    def await_event(self, name: str, **values: Any) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name and values.items() <= event.items():
                return event
        raise AssertionError(f"the client ended without {name}")

    def await_answers(self, count: int) -> None:
        while min(self.await_event("tick")["answers"]) < count:
            pass

    def end(self, *, status: int = 0) -> History:
        self.process.send_signal(signal.SIGTERM)
        return self.ended(status=status)

    def ended(self, *, status: int = 0) -> History:
        self.process.communicate(timeout=60)
        assert self.process.returncode == status
        with self.records.open() as lines:
            return read(lines)


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


def test_requests_are_numbered_answered_and_recorded(service: Service, tmp_path: Path) -> None:
    client = Running(service, tmp_path / "records", "--interval", "5")
    client.await_answers(50)
    history = client.end()
    verdict = judge(history, [])
    assert verdict.survived, verdict.failures
    assert history.ended
    assert not history.unanswered
    for connection in range(2):
        answers = history.of(connection)
        assert [a.number for a in answers] == list(range(1, len(answers) + 1))
        assert [a.count for a in answers] == [a.number for a in answers]
        assert len(answers) >= 50
        assert all(a.sent is not None and a.sent <= a.mono <= a.received for a in answers)


def test_the_pace_does_not_depend_on_answers(service: Service, tmp_path: Path) -> None:
    """Open loop: what was sent during a silence is answered after it, nothing is left out."""
    client = Running(service, tmp_path / "records", "--interval", "10")
    client.await_answers(20)
    service.answering.clear()
    client.await_event("stopped", connection=0)
    service.largest_burst = 0
    service.answering.set()
    resumed = client.await_event("resumed", connection=0)
    assert resumed["at"] - resumed["since"] > 0.5
    history = client.end()
    assert judge(history, []).survived
    assert service.largest_burst >= 25  # half a second and more of requests at once
    gap = max(end - begin for begin, end in history.silences(history.began, history.until))
    assert gap > 0.5


def test_in_a_closed_loop_a_request_waits_for_the_answer(service: Service, tmp_path: Path) -> None:
    client = Running(service, tmp_path / "records", "--interval", "5", "--closed-loop")
    client.await_answers(10)
    service.answering.clear()
    client.await_event("stopped", connection=0)
    service.answering.set()
    client.await_event("resumed", connection=0)
    client.await_event("tick")
    assert judge(client.end(), []).survived
    assert service.largest_burst == 1


def test_the_backlog_is_bounded(service: Service, tmp_path: Path) -> None:
    client = Running(service, tmp_path / "records", "--interval", "1", "--backlog", "30")
    client.await_answers(20)
    service.answering.clear()
    client.await_event("stopped", connection=0)
    client.await_event("tick")
    service.largest_burst = 0
    service.answering.set()
    client.await_event("resumed", connection=0)
    assert judge(client.end(), []).survived
    assert service.largest_burst <= 31


@pytest.mark.parametrize(("trick", "field"), [("twice", "duplicated"), ("swap", "reordered")])
def test_what_the_service_does_wrong_is_found(
    service: Service, tmp_path: Path, trick: str, field: str
) -> None:
    client = Running(service, tmp_path / "records", "--interval", "5")
    client.await_answers(10)
    service.misbehave = trick
    client.await_answers(20)
    verdict = judge(client.end(), [])
    assert getattr(verdict, field) == 1
    assert not verdict.survived


@pytest.mark.parametrize("trick", ["close", "nonsense"])
def test_a_connection_that_ends_is_not_opened_again(
    service: Service, tmp_path: Path, trick: str
) -> None:
    client = Running(service, tmp_path / "records", "--interval", "5", "--drain", "5")
    client.await_answers(10)
    service.misbehave = trick
    client.await_event("closed")
    history = client.end(status=1)
    verdict = judge(history, [])
    assert not verdict.same_connection
    assert len(history.closed) == 1
    assert verdict.lost >= 1


def test_requests_without_an_answer_are_recorded(service: Service, tmp_path: Path) -> None:
    client = Running(service, tmp_path / "records", "--interval", "5", "--drain", "0.2")
    client.await_answers(10)
    service.answering.clear()
    client.await_event("stopped", connection=0)
    history = client.end()
    assert history.unanswered
    assert judge(history, []).lost == len(history.unanswered)


def test_it_ends_by_itself_after_its_time(service: Service, tmp_path: Path) -> None:
    history = Running(service, tmp_path / "records", "--duration", "0.5").ended()
    assert history.ended
    assert judge(history, []).survived


def test_without_a_service_it_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    done = subprocess.run(
        [
            *[sys.executable, "-m", "vagrant.demolib.client", str(tmp_path / "records")],
            *["--address", "127.0.0.1", "--port", str(port)],
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"no connection to 127.0.0.1 port {port}" in done.stderr
