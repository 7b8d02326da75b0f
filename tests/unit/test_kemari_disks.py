# SPDX-License-Identifier: Apache-2.0
"""Guests with disks on two daemons."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint.driver import Disk
from diskbuffer.backing import Backing
from diskbuffer.replica import Replica
from diskbuffer.stream import Record
from kemari.control import request
from kemari.daemon import Daemon
from kemari.errors import KemariError, Refused
from kemari.standby import StandbySession
from tests.unit.kemari_disk_pair import MIB, SIZE, TARGET, DiskPair
from tests.unit.kemari_pair import await_true
from tests.unit.patience import PATIENCE


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: the name of a socket has 108 bytes at most.
    with tempfile.TemporaryDirectory(prefix="kd") as name:
        yield Path(name)


@pytest.fixture
def pair(folder: Path) -> Iterator[DiskPair]:
    pair = DiskPair(folder)
    noise = random.Random(5).randbytes(MIB)
    with pair.sides["a"].server.target.open("r+b") as disk:
        disk.seek(4 * MIB)
        disk.write(noise)
    pair.sides["a"].serve(clean=0.05)
    with pair:
        yield pair


def same(pair: DiskPair) -> bool:
    one, other = (side.server.target.read_bytes() for side in pair.sides.values())
    return one == other


def test_the_first_copy_of_a_disk_can_be_watched(folder: Path) -> None:
    told: list[dict[str, Any]] = []
    pair = DiskPair(folder, disk_rate=16 * MIB, heartbeat_ms=2000)
    pair.sides["a"].serve()
    with pair:
        socket = pair.a.config.paths.socket
        request(socket, "start", {"domain": "web", "standby": "b"}, told.append)
    of_disks = [figures["disks"][0] for figures in told if figures["round"] == 0]
    assert all(disk["vdev"] == "xvda" and disk["total"] == SIZE for disk in of_disks)
    left = [disk["left"] for disk in of_disks]
    assert left == sorted(left, reverse=True)
    assert (left[0] > 0, left[-1]) == (True, 0)
    assert told[-1]["round"] > 0


def test_after_a_power_cut_the_disk_is_that_of_the_epoch_that_runs(pair: DiskPair) -> None:
    pair.protect()
    (copied,) = pair.a.status("web")["progress"]["disks"]
    assert copied == {"vdev": "xvda", "total": SIZE, "left": 0}
    assert "disk" in pair.a.events("web"), "that everything is copied is said"
    pair.talk(30)
    pair.a.power_cut()
    pair.talk(20)
    pair.check_answers()
    pair.check_revival("b")
    data = pair.sides["b"].server.target.read_bytes()
    pair.check_disk(data, 50)
    assert data[4 * MIB : 5 * MIB] == random.Random(5).randbytes(MIB)


def test_what_an_ended_session_still_applies_is_on_disk_before_the_next_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, claim = Backing.apply, Daemon.claim
    stalled, moving = threading.Event(), threading.Event()
    moving.set()
    closed: list[bool] = []

    def slow(backing: Backing, records: Iterable[Record]) -> None:
        if not moving.is_set():
            stalled.set()
            moving.wait()
        apply(backing, records)

    async def claimed(daemon: Daemon, uuid: str, name: str, session: StandbySession) -> None:
        asyncio.get_running_loop().call_soon(moving.set)  # once somebody waits for it
        await claim(daemon, uuid, name, session)
        closed.append(old._backing is None)

    monkeypatch.setattr(Backing, "apply", slow)
    pair = DiskPair(folder, heartbeat_ms=800, resume=False)
    pair.sides["a"].serve()
    with pair:
        pair.protect()
        pair.talk(3)
        assert pair.b.daemon
        (session,) = pair.b.daemon.sessions.values()
        replica = session._disks._replicas[0]
        assert isinstance(replica, Replica)
        old: Replica = replica
        moving.clear()
        pair.talk(3)
        assert stalled.wait(PATIENCE)
        pair.a.request("stop", domain="web")
        await_true(lambda: "stood-down" in pair.b.events("web"), "the shell is removed")
        monkeypatch.setattr(Daemon, "claim", claimed)
        pair.protect()
        assert closed == [True]
        pair.talk(3)
        pair.power_cut("a")
        pair.check_revival("b")


@pytest.mark.parametrize("chunks", [0, 3, 7, 11])
def test_a_write_of_an_epoch_that_was_not_acknowledged_is_not_on_the_disk(
    pair: DiskPair, chunks: int
) -> None:
    pair.protect()
    pair.talk(5)
    pair.fabric.cut_after(chunks, pair.a.power_cut)
    pair.talk(15)
    pair.check_answers()
    pair.check_revival("b")


def test_a_handover_takes_the_disk_along(pair: DiskPair) -> None:
    pair.protect()
    pair.talk(10)
    pair.a.request("failover", domain="web")
    pair.talk(10)
    pair.check_answers()
    pair.check_revival("b")
    pair.check_disk(pair.sides["b"].server.target.read_bytes(), 20)


def test_the_old_primary_is_brought_up_to_date_and_can_take_over_again(pair: DiskPair) -> None:
    pair.protect()
    pair.talk(10)
    page = pair.sides["a"].server
    await_true(lambda: page.figures().dirty < 10, "what both have is not marked any more")
    pair.a.power_cut()
    # It had written on: nobody saw that, and it must not survive.
    client = pair.sides["a"].client
    assert client is not None
    client.write(7 * MIB, b"speculative")
    pair.talk(5)
    pair.sides["a"].stop()
    pair.power_on(pair.a)
    await_true(lambda: pair.a.status("web")["state"] == "moved", "a knows that it moved")
    pair.b.request("start", domain="web", standby="a")
    (copied,) = pair.b.status("web")["progress"]["disks"]
    assert copied["total"] < SIZE, "more was copied than differs"
    pair.talk(10)
    await_true(lambda: same(pair), "both disks are equal")
    assert b"speculative" not in pair.sides["a"].server.target.read_bytes()
    pair.b.power_cut()
    pair.talk(5)
    pair.check_answers()
    pair.check_revival("a")
    pair.check_disk(pair.sides["a"].server.target.read_bytes(), 30)


def test_after_a_lost_link_only_what_changed_is_copied(folder: Path) -> None:
    pair = DiskPair(folder, resume=False)
    pair.sides["a"].serve(clean=0.05)
    with pair:
        pair.protect()
        pair.talk(5)
        page = pair.sides["a"].server
        await_true(lambda: page.figures().dirty < 5, "what both have is not marked any more")
        pair.a.request("stop", domain="web")
        pair.talk(3)
        pair.protect()
        (copied,) = pair.a.status("web")["progress"]["disks"]
        assert 0 < copied["total"] < SIZE // 4
        pair.talk(3)
        pair.a.power_cut()
        pair.talk(3)
        pair.check_answers()
        pair.check_revival("b")


def test_a_server_that_is_no_replica_is_no_standby(
    pair: DiskPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = pair.sides["b"]
    monkeypatch.setattr(side, "serve", functools.partial(side.serve, replica="false"))
    with pytest.raises(KemariError, match=r"standby does not serve it as a replica \(flags "):
        pair.protect()
    monkeypatch.undo()
    pair.protect()
    pair.talk(3)
    pair.a.power_cut()
    pair.talk(3)
    pair.check_revival("b")


def test_a_bitmap_that_no_server_kept_is_not_believed(folder: Path) -> None:
    pair = DiskPair(folder, resume=False)
    side = pair.sides["a"]
    side.serve(clean=0.05)
    with pair:
        pair.protect()
        pair.talk(3)
        server = side.server
        await_true(lambda: server.figures().dirty < 5, "what both have is not marked any more")
        pair.a.request("stop", domain="web")
        side.stop()
        kept = server.bitmap.read_bytes()
        server.bitmap.unlink()
        side.serve()
        server.bitmap.write_bytes(kept)
        pair.talk(3)
        pair.protect()
        (copied,) = pair.a.status("web")["progress"]["disks"]
        assert copied["total"] == SIZE
        pair.talk(3)
        pair.a.power_cut()
        pair.talk(3)
        pair.check_answers()
        pair.check_revival("b")


def test_a_server_that_dies_ends_the_protection_not_the_guest(folder: Path) -> None:
    pair = DiskPair(folder, resume=False)
    pair.sides["a"].serve()
    with pair:
        pair.protect()
        pair.talk(3)
        side = pair.sides["a"]
        side.machine.hypervisor.guests["web"].write_disk = lambda guest, number: None
        side.stop()
        await_true(lambda: "unprotected" in pair.a.events("web"), "the protection has ended")
        pair.talk(3)
        pair.check_answers()
        (said,) = [e["text"] for e in pair.a.request("log") if e["event"] == "disk-lost"]
        assert said.startswith("nbdkit, the server of disk xvda (/dev/vg0/web), has ended and the")
        cure = "; expected the guest to be shut down and started again, which starts a new server"
        assert said.endswith(cure)
        assert pair.a.status("web")["why"] == said
        with pytest.raises(Refused, match="cannot be replicated: its server, nbdkit, has ended"):
            pair.a.request("check", domain="web")
        with pytest.raises(Refused, match=r"The disk xvda \(/dev/vg0/web\) cannot be replicated"):
            pair.protect()
        side.serve()
        pair.a.request("check", domain="web")
        pair.protect()


def test_a_server_that_dies_on_the_standby_ends_the_protection_until_there_is_a_new_one(
    pair: DiskPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kemari.daemon.AGAIN", 0.2)
    pair.protect(interval_ms=50)
    pair.talk(3)
    pair.sides["b"].stop()
    await_true(lambda: "standby-lost" in pair.a.events("web"), "b could not run it any more")
    (said,) = [e["text"] for e in pair.a.request("log") if e["event"] == "standby-lost"]
    assert "disk.img on the standby, has ended; expected it to serve as long as" in said
    # The next shell's disk has a server of its own.
    await_true(lambda: pair.a.status("web")["protected"], "web is protected again")
    pair.talk(3)
    pair.a.power_cut()
    pair.talk(3)
    pair.check_answers()
    pair.check_revival("b")


def test_a_standby_on_which_nobody_serves_the_disk_is_refused(pair: DiskPair) -> None:
    pair.b.hypervisor.reached = lambda point: None  # as if its shell had another hotplug script
    with pytest.raises(KemariError, match="No disk server answers at"):
        pair.protect()
    await_true(lambda: not pair.b.hypervisor.shells, "b removed the shell")
    pair.talk(3)
    pair.check_answers()


def test_a_disk_that_nobody_serves_is_refused(folder: Path) -> None:
    with DiskPair(folder) as pair:
        with pytest.raises(Refused, match="expected a disk's server"):
            pair.protect()
        shutil.rmtree(pair.a.config.paths.run / "disks")
        with pytest.raises(Refused, match="block-kemari does not serve it"):
            pair.protect()


def test_a_queue_that_holds_more_than_an_epoch_may_have_is_refused(folder: Path) -> None:
    pair = DiskPair(folder)
    pair.sides["a"].serve(queue="65M")
    with pair, pytest.raises(Refused, match="a queue of 68157440 bytes, expected at most 67108864"):
        pair.protect()


def test_an_epoch_with_more_records_than_one_may_have_ends_the_protection(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = DiskPair(folder, resume=False)
    pair.sides["a"].serve()
    with pair:
        pair.protect()
        pair.talk(3)
        monkeypatch.setattr("kemari.disks.EPOCH_BYTES", 512)
        pair.talk(3)
        await_true(lambda: "unprotected" in pair.a.events("web"), "the protection has ended")
        log = str(pair.a.request("log", domain="web"))
        assert "bytes of records in one epoch; expected at most 512" in log
        pair.check_answers()


def test_a_target_of_another_size_is_refused(pair: DiskPair) -> None:
    os.truncate(pair.sides["b"].server.target, 2 * SIZE)
    with pytest.raises(KemariError, match="has 16777216 bytes on this host, expected 8388608"):
        pair.protect()
    assert pair.sides["a"].server.figures().state != 1, "changes are still written down"


def test_a_target_that_is_missing_is_refused(pair: DiskPair) -> None:
    pair.sides["b"].server.target.unlink()
    with pytest.raises(KemariError, match="No such file"):
        pair.protect()


def test_a_full_disk_on_the_standby_ends_the_protection(
    pair: DiskPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.protect()
    pair.talk(3)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diskbuffer.backing.Backing._write", full)
    pair.talk(3)
    await_true(lambda: "standby-lost" in pair.a.events("web"), "the standby is given up")
    pair.talk(3)
    pair.check_answers()
    assert pair.a.daemon is not None
    assert "No space left on device" in str(pair.a.daemon.host.journal.read("web"))


def test_a_read_only_disk_is_compared_by_its_size_alone(folder: Path) -> None:
    image = folder / "programs.img"
    image.write_bytes(bytes(MIB))
    pair = DiskPair(folder)
    pair.a.hypervisor.destroy_domain("web")
    disks = [Disk(51712, "xvda", TARGET, True), Disk(51728, "xvdb", os.fspath(image), False)]
    pair.guest = pair.a.hypervisor.boot("web", disks=disks)
    pair.sides["a"].serve()
    with pair:
        pair.protect()
        pair.talk(5)
        pair.a.power_cut()
        pair.talk(5)
        pair.check_answers()
        pair.check_revival("b")
