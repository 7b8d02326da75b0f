# SPDX-License-Identifier: Apache-2.0
"""Guests on two daemons whose disk is one storage that both reach."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diskbuffer.errors import ReplicaError
from diskbuffer.metadata import Fitness, Metadata, Role, load
from diskbuffer.shared import SharedReplica
from diskbuffer.status import Flag
from kemari.errors import DaemonUnreachable, KemariError, Refused
from kemari.shared import SharedDisks
from tests.unit.kemari_disk_pair import MIB, SECTOR, SIZE, DiskPair
from tests.unit.kemari_pair import await_true
from tests.unit.patience import PATIENCE


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: the name of a socket has 108 bytes at most.
    with tempfile.TemporaryDirectory(prefix="kd") as name:
        yield Path(name)


@pytest.fixture
def storage(folder: Path) -> Path:
    path = folder / "storage.img"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def pair(folder: Path, storage: Path) -> Iterator[DiskPair]:
    pair = DiskPair(folder, {"a": storage, "b": storage}, heartbeat_ms=800)
    pair.sides["a"].serve()
    with pair:
        yield pair


def role(pair: DiskPair, name: str) -> Role:
    known = load(pair.sides[name].server.state / "state.json")
    assert known is not None
    return known.role


def all_issued(pair: DiskPair, name: str) -> bool:
    figures = pair.sides[name].server.figures()
    return figures.issued == figures.position


def test_after_a_power_cut_the_storage_is_that_of_the_epoch_that_runs(
    pair: DiskPair, storage: Path
) -> None:
    pair.protect()
    pair.talk(30)
    pair.power_cut("a")
    pair.talk(20)
    pair.check_answers()
    pair.check_revival("b")
    pair.check_disk(storage.read_bytes(), 50)


@pytest.mark.parametrize("chunks", [0, 3, 7, 11])
def test_a_write_of_an_epoch_that_was_not_acknowledged_never_was_on_the_storage(
    pair: DiskPair, chunks: int
) -> None:
    pair.protect()
    pair.talk(5)
    pair.fabric.cut_after(chunks, lambda: pair.power_cut("a"))
    pair.talk(15)
    pair.check_answers()
    pair.check_revival("b")


def test_what_is_acknowledged_is_issued_and_then_forgotten(pair: DiskPair, storage: Path) -> None:
    pair.protect()
    pair.talk(10)
    await_true(lambda: all_issued(pair, "a"), "what was acknowledged is issued")
    pair.check_disk(storage.read_bytes(), 10)
    assert pair.a.daemon is not None
    shown = pair.a.status("web")["disks"][0]
    assert shown["shared"]
    assert role(pair, "a") is Role.HELD
    assert role(pair, "b") is Role.REPLICA


def test_what_the_primary_did_not_come_to_issue_is_issued_by_the_standby(
    pair: DiskPair, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.protect()
    pair.talk(5)
    await_true(lambda: all_issued(pair, "a"), "what was acknowledged is issued")
    monkeypatch.setattr("kemari.shared.SharedDisks.allow", lambda *_: None)
    pair.talk(5)
    pair.check_disk(storage.read_bytes(), 5)
    pair.power_cut("a")
    pair.talk(1)
    pair.check_answers()
    pair.check_revival("b")
    pair.check_disk(storage.read_bytes(), 11)


def test_a_handover_leaves_the_rest_to_the_standby(
    pair: DiskPair, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.protect()
    pair.talk(5)
    monkeypatch.setattr("kemari.shared.SharedDisks.allow", lambda *_: None)
    pair.talk(5)
    pair.a.request("failover", domain="web")
    pair.talk(10)
    pair.check_answers()
    pair.check_revival("b")
    pair.check_disk(storage.read_bytes(), 20)
    assert role(pair, "a") is Role.HELD
    assert pair.sides["a"].server.figures().flags & Flag.REPLICA


def test_a_handover_that_is_declined_gives_the_disk_back(
    pair: DiskPair, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.protect()
    pair.talk(5)

    async def fail(replica: SharedReplica) -> None:
        raise ReplicaError("the storage cannot be reached from here")

    monkeypatch.setattr(SharedReplica, "settle", fail)
    with pytest.raises(KemariError, match="was not moved to b"):
        pair.a.request("failover", domain="web")
    pair.talk(5)
    pair.check_answers()
    pair.check_disk(storage.read_bytes(), 10)
    assert role(pair, "a") is Role.DISK


def test_the_old_primary_can_stand_by_and_take_over_again(pair: DiskPair, storage: Path) -> None:
    pair.protect()
    pair.talk(10)
    pair.power_cut("a")
    pair.talk(5)
    pair.power_on(pair.a)
    await_true(lambda: pair.a.status("web")["state"] == "moved", "a knows that it moved")
    assert role(pair, "a") is Role.HELD, "nothing may serve the disk there"
    pair.b.request("start", domain="web", standby="a")
    pair.talk(10)
    pair.power_cut("b")
    pair.talk(5)
    pair.check_answers()
    pair.check_revival("a")
    pair.check_disk(storage.read_bytes(), 30)


def test_the_end_of_a_protection_issues_everything(pair: DiskPair, storage: Path) -> None:
    pair.protect()
    pair.talk(5)
    client = pair.sides["a"].client
    assert client is not None
    client.write(7 * MIB, b"in no epoch")
    pair.a.request("stop", domain="web")
    assert role(pair, "a") is Role.DISK
    data = storage.read_bytes()
    pair.check_disk(data, 5)
    assert data[7 * MIB : 7 * MIB + 11] == b"in no epoch"
    pair.talk(5)
    pair.check_disk(storage.read_bytes(), 10)
    pair.protect()
    pair.talk(5)
    pair.power_cut("a")
    pair.talk(5)
    pair.check_answers()


def test_a_restarted_daemon_lets_go_what_the_killed_one_held(folder: Path, storage: Path) -> None:
    pair = DiskPair(folder, {"a": storage, "b": storage}, heartbeat_ms=800, resume=False)
    pair.sides["a"].serve()
    with pair:
        pair.protect()
        pair.talk(5)
        pair.a.kill()
        client = pair.sides["a"].client
        assert client is not None
        client.write(7 * MIB, b"held")
        assert storage.read_bytes()[7 * MIB : 7 * MIB + 4] == bytes(4)
        pair.a.start()
        await_true(lambda: "unprotected" in pair.a.events("web"), "the standby has answered")
        assert role(pair, "a") is Role.DISK
        assert storage.read_bytes()[7 * MIB : 7 * MIB + 4] == b"held"
        pair.talk(5)
        pair.check_answers()
        pair.check_disk(storage.read_bytes(), 10)


@pytest.mark.parametrize("ends", [False, True])
def test_a_daemon_that_dies_while_it_lets_go_leaves_nothing_held(
    folder: Path, storage: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    releasing = threading.Event()

    async def dies(disks: SharedDisks) -> None:
        releasing.set()
        await asyncio.Event().wait()

    pair = DiskPair(folder, {"a": storage, "b": storage}, heartbeat_ms=800, resume=False)
    pair.sides["a"].serve()
    with pair:
        pair.protect()
        pair.talk(5)
        client = pair.sides["a"].client
        assert client is not None
        client.write(7 * MIB, b"held")
        with monkeypatch.context() as patch:
            patch.setattr(SharedDisks, "release", dies)
            if ends:
                pair.a.hypervisor.destroy_domain("web")
            else:
                stopping = threading.Thread(target=_stop_in_vain, args=(pair,))
                stopping.start()
            assert releasing.wait(PATIENCE)
            pair.a.kill()
        pair.a.start()
        assert role(pair, "a") is Role.DISK
        assert storage.read_bytes()[7 * MIB : 7 * MIB + 4] == b"held"
        if not ends:
            stopping.join()
            pair.talk(5)
            pair.check_answers()
            pair.check_disk(storage.read_bytes(), 10)


def _stop_in_vain(pair: DiskPair) -> None:
    with pytest.raises(DaemonUnreachable):
        pair.a.request("stop", domain="web")


@pytest.mark.parametrize("changes", [{"guest": str(uuid.uuid4())}, {"role": Role.REPLICA}])
def test_what_is_held_of_another_guest_is_left_alone(
    folder: Path, storage: Path, changes: dict[str, Any]
) -> None:
    pair = DiskPair(folder, {"a": storage, "b": storage}, heartbeat_ms=800, resume=False)
    pair.sides["a"].serve()
    with pair:
        pair.protect()
        pair.a.request("stop", domain="web")
        pair.a.stop()
        state = pair.sides["a"].server.state / "state.json"
        held = Metadata(Role.HELD, Fitness.CONSISTENT, SIZE, shared=True)
        replace(held, **({"guest": pair.guest.description.uuid} | changes)).save(state)
        before = state.read_bytes()
        pair.a.start()
        assert state.read_bytes() == before


def test_a_lost_standby_is_waited_for_whatever_the_policy_says(folder: Path, storage: Path) -> None:
    pair = DiskPair(folder, {"a": storage, "b": storage}, heartbeat_ms=800, resume=False)
    pair.sides["a"].serve()
    with pair:
        pair.protect()
        pair.talk(5)
        assert pair.a.config.on_standby_loss == "release"
        pair.power_cut("b")
        await_true(lambda: pair.a.state("web") == "holding", "nobody answers")
        client = pair.sides["a"].client
        assert client is not None
        client.write(7 * MIB, b"held")
        assert storage.read_bytes()[7 * MIB : 7 * MIB + 4] == bytes(4)
        pair.a.request("stop", domain="web", force=True)
        assert storage.read_bytes()[7 * MIB : 7 * MIB + 4] == b"held"
        pair.talk(5)
        pair.check_answers()


def test_what_a_guest_wrote_last_is_not_lost_when_it_shuts_down(
    pair: DiskPair, storage: Path
) -> None:
    pair.protect()
    pair.talk(5)
    side = pair.sides["a"]
    assert side.client is not None
    side.client.write(7 * MIB, b"unmounted")
    pair.a.hypervisor.destroy_domain("web")
    side.client.close()
    side.client = None
    side.server.stop(signal.SIGTERM)
    assert storage.read_bytes()[7 * MIB : 7 * MIB + 9] == b"unmounted"
    await_true(lambda: "ended" in pair.a.events("web"), "the protection has ended")
    await_true(lambda: role(pair, "a") is Role.DISK, "it may be served again")


def test_two_copies_are_not_one_storage(folder: Path, storage: Path) -> None:
    copy = folder / "copy.img"
    shutil.copy(storage, copy)
    pair = DiskPair(folder, {"a": storage, "b": copy})
    pair.sides["a"].serve()
    with pair:
        pair.talk(3)
        with pytest.raises(KemariError, match="is not the primary's"):
            pair.protect()
        pair.talk(3)
        pair.check_answers()
        pair.check_disk(storage.read_bytes(), 6)
        assert copy.read_bytes() == bytes(SIZE)
        assert role(pair, "a") is Role.DISK


def test_a_server_of_the_other_mode_is_refused(folder: Path, storage: Path) -> None:
    pair = DiskPair(folder, {"a": storage, "b": storage}, heartbeat_ms=800)
    pair.sides["a"].shared = False
    pair.sides["a"].serve()
    with pair, pytest.raises(Refused, match="serves a replicated disk, expected a shared one"):
        pair.protect()


def test_a_queue_that_is_full_pauses_the_guest_until_the_acknowledgement(
    folder: Path, storage: Path
) -> None:
    pair = DiskPair(folder, {"a": storage, "b": storage}, heartbeat_ms=800, interval_ms=60000)
    pair.sides["a"].serve(queue="4M")
    with pair:
        pair.protect()
        client = pair.sides["a"].client
        assert client is not None
        for _ in range(5):
            for start in range(4, 7):
                client.write(start * MIB, b"x" * MIB)
        assert pair.a.status("web")["statistics"]["stalls"] > 0
        # Less than half a queue waits for the interval, or for output.
        pair.talk(3)
        await_true(lambda: all_issued(pair, "a"), "all is acknowledged and issued")
        assert storage.read_bytes()[4 * MIB : 7 * MIB] == b"x" * (3 * MIB)
        pair.check_answers()
        assert pair.a.state("web") == "protected"
        assert storage.read_bytes()[:SECTOR] != bytes(SECTOR)


def test_only_force_frees_a_disk_that_the_other_host_may_use(pair: DiskPair, storage: Path) -> None:
    pair.protect()
    pair.talk(3)
    pair.a.request("stop", domain="web")
    await_true(lambda: pair.b.state("web") == "released", "b has stood down")
    pair.sides["b"].stop()
    with pytest.raises(Refused, match="is shared with the other host; expected --force"):
        pair.b.request("forget", domain="web")
    assert role(pair, "b") is Role.REPLICA
    freed = pair.b.request("forget", domain="web", force=True)
    assert freed["disks"] == [str(storage)]
    assert load(pair.sides["b"].server.state / "state.json") is None
