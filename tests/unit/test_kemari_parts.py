# SPDX-License-Identifier: Apache-2.0
"""The smaller parts: event log, figures, control socket, service manager."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint.stages import Laps
from diskbuffer import durable
from kemari.control import MAX_REQUEST, ControlServer, Progress, request
from kemari.deadline import Deadline
from kemari.errors import DaemonUnreachable, KemariError, NoSuchProtection, Refused
from kemari.host import load_host_id
from kemari.journal import Journal
from kemari.notify import notify, watchdog_interval
from kemari.pace import Pace
from kemari.statistics import Reservoir, Statistics
from kemari.throttle import Throttle
from tests.prove.simulation import Process, Simulation

# ---- Event log ----


def test_the_log_is_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "log" / "events.jsonl", "a", limit=2000)
    for number in range(200):
        journal.note("web", "test", f"event {number}", number=number)
    size = sum(path.stat().st_size for path in (tmp_path / "log").iterdir())
    assert size < 2 * 2200
    entries = journal.read()
    assert entries[-1]["number"] == 199
    assert [entry["number"] for entry in entries] == list(range(entries[0]["number"], 200))
    assert len(journal.read(last=3)) == 3


def test_the_log_can_be_read_for_one_guest_and_past_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    journal = Journal(path, "a")
    journal.note("web", "start", "one")
    journal.note("db", "start", "two")
    with path.open("a") as file:
        file.write('{"time": 1, "guest": "we')
    assert [entry["text"] for entry in journal.read("web")] == ["one"]
    assert [entry["host"] for entry in journal.read()] == ["a", "a"]


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / "file" / "events.jsonl", "a")
    heard: list[dict[str, Any]] = []
    forget = journal.listen(heard.append)
    journal.note("web", "takeover", "still said")
    forget()
    journal.note("web", "takeover", "not heard")
    assert [entry["text"] for entry in heard] == ["still said"]


# ---- When the next checkpoint begins ----


def test_where_processors_are_plenty_a_checkpoint_follows_the_last_at_once() -> None:
    pace = Pace()
    assert pace.wait(5.0) <= 0
    pace.ended(7.0, took=0.040, stolen=0.0)
    assert pace.wait(7.0) <= 0


@pytest.mark.parametrize(
    ("took", "stolen", "wait"),
    [(0.040, 0.2, 0.020), (0.040, 0.4, 0.040), (0.040, 0.9, 0.040), (0.300, 0.9, 0.050)],
)
def test_where_they_are_not_it_waits_up_to_as_long_as_the_last_took(
    took: float, stolen: float, wait: float
) -> None:
    pace = Pace()
    pace.ended(7.0, took=took, stolen=stolen)
    assert pace.wait(7.0) == pytest.approx(wait)
    assert pace.wait(7.010) == pytest.approx(wait - 0.010)


@pytest.mark.parametrize(("first", "wait"), [("latency", 0.0), ("throughput", 0.030)])
@pytest.mark.parametrize("stolen", [0.0, 0.9])
def test_whoever_chose_what_comes_first_has_it_whatever_the_processors_do(
    first: str, wait: float, stolen: float
) -> None:
    pace = Pace(first)
    pace.ended(7.0, took=0.010, stolen=stolen)
    assert pace.wait(7.0) == pytest.approx(wait)


# ---- How long a guest may go on while an epoch is in flight ----


LARGE = 1 << 20


def test_a_guest_whose_epochs_are_acknowledged_in_time_may_go_on_for_half_a_heartbeat() -> None:
    throttle = Throttle(1.0)
    for took in (0.001, 0.4, 0.5):
        throttle.acked(took, LARGE)
        assert throttle.patience == 0.5


def test_a_guest_that_outpaces_its_link_is_slowed_until_epochs_take_no_longer_than_that() -> None:
    throttle, took = Throttle(1.0), 0.0
    for _ in range(20):
        took = throttle.patience * 9  # of what it changes in a second, a ninth can be sent
        throttle.acked(took, LARGE)
    assert took == pytest.approx(0.5)
    for _ in range(4):
        throttle.acked(0.001, LARGE)  # the link is fast again
    assert throttle.patience == 0.5


def test_one_epoch_that_was_slow_for_another_reason_costs_little() -> None:
    throttle = Throttle(1.0)
    throttle.acked(30.0, LARGE)
    assert throttle.patience == 0.125
    for _ in range(20):
        throttle.acked(30.0, LARGE)
    assert throttle.patience == 0.01, "it goes on, whatever the link does"


def test_a_long_way_to_the_standby_is_no_reason_to_wait() -> None:
    throttle = Throttle(0.2)
    for _ in range(20):
        throttle.acked(0.15, 1000)
        assert throttle.patience == pytest.approx(0.25)
    throttle.acked(0.25, LARGE)
    assert throttle.patience == pytest.approx(0.25), "the way, and as long as its size may take"
    throttle.acked(0.5, LARGE)
    assert throttle.patience == pytest.approx(0.2)
    throttle.acked(0.010, 1000)
    assert throttle.patience <= 0.11, "the way is short again"


def test_a_deadline_comes_due_after_the_last_setting_and_not_once_cleared() -> None:
    simulation = Simulation(0)
    loop, due = Process(simulation, "a"), []
    deadlines: list[Deadline] = []

    def make() -> None:
        deadlines.append(Deadline(lambda: due.append(simulation.now)))
        deadlines[0].set(1.0)

    loop.call_soon(make)
    loop.call_later(0.5, lambda: deadlines[0].set(1.0))
    loop.call_later(2.0, lambda: deadlines[0].set(1.0))
    loop.call_later(2.5, lambda: deadlines[0].clear())
    loop.call_later(3.0, lambda: deadlines[0].set(1.0))
    loop.call_later(3.1, lambda: deadlines[0].set(0.2))
    loop.call_later(4.5, lambda: deadlines[0].set(1.0))
    loop.call_later(5.0, lambda: deadlines[0].close())
    began = simulation.now
    simulation.run(lambda: False, 10.0)
    simulation.end()
    assert [when - began for when in due] == pytest.approx([1.5, 3.3])


# ---- Figures ----


def test_quantiles_are_exact_while_everything_fits() -> None:
    reservoir = Reservoir()
    values = list(range(1000))
    random.Random(1).shuffle(values)
    for value in values:
        reservoir.add(value)
    assert reservoir.quantile(0.5) == 500
    assert reservoir.quantile(0.99) == 990
    assert reservoir.summary() == {
        "p50": 500,
        "p99": 990,
        "max": 999,
        "mean": 499.5,
        "last": values[-1],
    }


def test_quantiles_stay_near_in_bounded_memory() -> None:
    reservoir = Reservoir(keep=500)
    for value in range(50_000):
        reservoir.add(value)
    assert reservoir.count == 50_000
    assert len(reservoir._values) == 500
    assert abs(reservoir.quantile(0.5) - 25_000) < 5_000


def test_no_values_no_quantiles() -> None:
    assert Reservoir().summary() == {"p50": 0, "p99": 0, "max": 0, "mean": 0, "last": 0}
    assert json.loads(json.dumps(Statistics().as_json()))["checkpoints"] == 0


# ---- Control socket ----


class Served:
    """A control server in a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loop = asyncio.new_event_loop()
        self.server = ControlServer(path, self.handle)
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.run(self.server.start())

    def run(self, work: Any) -> Any:
        """Run a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    async def handle(self, operation: str, untrusted: dict[str, Any], progress: Progress) -> Any:
        """What the tests ask for."""
        match operation:
            case "echo":
                return untrusted
            case "count":
                for number in range(3):
                    progress({"number": number})
                return "done"
            case "missing":
                raise NoSuchProtection("web is not protected on a")
            case "break":
                raise ZeroDivisionError
        raise Refused("no")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    server = Served(tmp_path / "run" / "kemarid.sock")
    yield server
    server.run(server.server.close())
    server.loop.call_soon_threadsafe(server.loop.stop)


def test_requests_are_answered(served: Served) -> None:
    assert request(served.path, "echo", {"ä": [1, None]}) == {"ä": [1, None]}
    seen: list[dict[str, Any]] = []
    assert request(served.path, "count", {}, seen.append) == "done"
    assert seen == [{"number": 0}, {"number": 1}, {"number": 2}]


def test_refusals_keep_their_class_and_sentence(served: Served) -> None:
    with pytest.raises(NoSuchProtection, match="web is not protected on a"):
        request(served.path, "missing", {})
    with pytest.raises(Refused, match="no"):
        request(served.path, "other", {})
    with pytest.raises(KemariError, match="A fault in kemarid: ZeroDivisionError"):
        request(served.path, "break", {})


def test_the_socket_is_for_its_owner_only(served: Served) -> None:
    assert served.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("sent", "problem"),
    [
        (b"hello\n", "is not JSON"),
        (b"[]\n", "is not an object"),
        (b"{}\n", "has no operation"),
        (b'{"op": 1}\n', "has no operation"),
        (b'{"op": "echo", "args": []}\n', "has no operation"),
        (b"x" * (MAX_REQUEST + 10), "A request is at most"),
    ],
)
def test_hostile_requests_are_refused(served: Served, sent: bytes, problem: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(served.path))
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        answer = json.loads(connection.makefile("rb").readline())
    assert answer["ok"] is False
    assert problem in answer["error"]["text"]
    assert request(served.path, "echo", {}) == {}


def test_a_second_daemon_is_refused_and_a_stale_socket_replaced(served: Served) -> None:
    with pytest.raises(KemariError, match="Another kemarid serves"):
        served.run(ControlServer(served.path, served.handle).start())
    served.run(served.server.close())
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(served.path))
    served.server = ControlServer(served.path, served.handle)
    served.run(served.server.start())
    assert request(served.path, "echo", {}) == {}


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match="kemarid does not answer on"):
        request(tmp_path / "none.sock", "echo", {})


# ---- Service manager ----


def test_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert notify("READY=1") is False
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        assert notify("READY=1") is True
        assert manager.recv(100) == b"READY=1"
    assert notify("STOPPING=1") is False


def test_watchdog_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    assert watchdog_interval() == 0.0
    monkeypatch.setenv("WATCHDOG_USEC", "20000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert watchdog_interval() == 10.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert watchdog_interval() == 0.0
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    assert watchdog_interval() == 0.0


@pytest.mark.parametrize("tail", [b'{"time":1,"ev', bytes(300)])
def test_what_is_noted_after_a_power_cut_can_be_read(tmp_path: Path, tail: bytes) -> None:
    """The last line of before was not written whole, or its place holds zeros."""
    path = tmp_path / "events.jsonl"
    Journal(path, "a").note("web", "start", "before")
    with path.open("ab") as file:
        file.write(tail)
    journal = Journal(path, "a")
    journal.note("web", "daemon", "after")
    journal.note("web", "stop", "later")
    assert [entry["text"] for entry in journal.read()] == ["before", "after", "later"]
    assert path.read_bytes().splitlines()[1] == tail


# ---- Section: files that outlive a power cut ----


def test_a_file_is_the_old_or_the_new_one_at_every_step(tmp_path: Path) -> None:
    path = tmp_path / "file"
    seen: list[tuple[str, str | None]] = []

    def look(step: str) -> None:
        seen.append((step, path.read_text() if path.exists() else None))

    durable.replace(path, [b"o", b"ld"], look)
    durable.replace(path, [b"new"], look)
    assert seen == [
        ("write", None),
        ("synced", None),
        ("renamed", "old"),
        ("written", "old"),
        ("write", "old"),
        ("synced", "old"),
        ("renamed", "new"),
        ("written", "new"),
    ]
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_the_identity_of_a_host_is_synced_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    first = load_host_id(tmp_path / "host-id")
    assert synced == ["host-id.new", tmp_path.name]
    assert load_host_id(tmp_path / "host-id") == first
    (tmp_path / "host-id").write_text("\0" * 37)
    with pytest.raises(KemariError, match="does not hold a UUID"):
        load_host_id(tmp_path / "host-id")


def test_the_steps_of_a_takeover_are_told_with_their_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Half a millisecond more than 10, 40 and 40 ms after the beginning.
    clock = iter([7, 10_500_007, 40_500_007, 40_500_007])
    monkeypatch.setattr(time, "monotonic_ns", lambda: next(clock))
    laps = Laps()
    laps.lap("stub")
    laps.lap("backends")
    assert str(laps) == "40 ms (stub 10, backends 30)"
    assert laps.elapsed_ns == 40_500_000
