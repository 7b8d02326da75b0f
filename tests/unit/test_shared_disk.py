# SPDX-License-Identifier: Apache-2.0
"""Shared mode: the plug-in in a real nbdkit, and both ends; what reaches the target when."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from diskbuffer.control import Control
from diskbuffer.direct import DirectTarget
from diskbuffer.errors import RecordError, ReplicaError, ServerError, StreamLost
from diskbuffer.held import HeldDisk, boot_ns
from diskbuffer.metadata import Role, load
from diskbuffer.shared import BUDGET, SharedReplica
from diskbuffer.status import Flag
from diskbuffer.stream import Kind, Record, encode, parse
from tests.unit.disk_server import DiskServer
from tests.unit.shared_disk import PRIMARY, WAIT, do, far_away, joined, serve, until

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DiskServer]:
    server = DiskServer(tmp_path / "primary", SIZE)
    yield server
    server.stop(signal.SIGKILL)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(6 * WAIT):
            await body()

    asyncio.run(bounded())


def role(state: Path) -> Role:
    known = load(state / "state.json")
    assert known is not None
    return known.role


# ---- What reaches the target when ----


def test_a_disk_that_is_not_protected_reads_as_it_was_written(server: DiskServer) -> None:
    client = serve(server)
    model = bytearray(SIZE)
    chance = random.Random(1)
    for _ in range(200):
        offset = chance.randrange(SIZE)
        length = min(chance.choice((1, 512, 4096, 70000, 3 * MIB)), SIZE - offset)
        if chance.randrange(4):
            data = chance.randbytes(length)
            client.write(offset, data, fua=chance.random() < 0.1)
        else:
            data = bytes(length)
            client.zero(offset, length, hole=chance.random() < 0.5)
        model[offset : offset + length] = data
    assert client.read(0, SIZE) == model
    client.close()
    server.stop()
    assert server.target.read_bytes() == model


def test_a_change_reaches_the_target_only_once_it_is_acknowledged(
    server: DiskServer, tmp_path: Path
) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(serve, server)
        await do(client.write, 0, b"before")
        async with joined(server, tmp_path / "standby") as pair:
            assert server.target.read_bytes()[:6] == b"before"
            await do(client.write, 3, b"held")
            await do(client.flush)
            assert client.read(0, 8) == b"befheld\0"
            await pair.epoch()
            await do(client.write, 100, b"of epoch 2")
            assert server.target.read_bytes()[:8] == b"before\0\0"
            await pair.issue()
            assert server.target.read_bytes() == b"befheld".ljust(SIZE, b"\0")
            assert client.read(100, 10) == b"of epoch 2"
            assert pair.disk.issued() == pair.ends[1] < pair.disk.position()
            client.close()

    run(body)


def test_nothing_is_issued_without_a_lease(server: DiskServer, tmp_path: Path) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(serve, server)
        async with joined(server, tmp_path / "standby") as pair:
            await do(client.write, 0, b"held")
            await pair.epoch()
            await pair.disk.issue(pair.ends[1], boot_ns() - 1)
            await pair.disk.halt()  # returns when nothing is on its way
            assert pair.disk.issued() == 0
            assert not any(server.target.read_bytes())
            with pytest.raises(ServerError, match="issuing was halted"):
                await pair.disk.issue(pair.ends[1], far_away())
            assert not any(server.target.read_bytes())
            client.close()

    run(body)


def test_the_next_lease_goes_on_where_the_last_one_ended(
    server: DiskServer, tmp_path: Path
) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(serve, server)
        async with joined(server, tmp_path / "standby") as pair:
            await do(client.write, 0, b"held")
            await pair.epoch()
            await pair.disk.issue(pair.ends[1], boot_ns() - 1)
            await until(lambda: ("late", "") in pair.heard)
            assert pair.disk.issued() == 0
            await pair.issue()
            assert server.target.read_bytes()[:4] == b"held"
            client.close()

    run(body)


def test_only_what_the_standby_can_have_may_be_issued(server: DiskServer, tmp_path: Path) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(serve, server)
        async with joined(server, tmp_path / "standby") as pair:
            await pair.epoch()
            await do(client.write, 0, b"held")
            for position in (pair.disk.position() + 1, 1 << 60):
                with pytest.raises(ServerError, match="not of this stream"):
                    await pair.disk.issue(position, far_away())
            client.close()

    run(body)


def test_a_released_disk_has_everything_and_holds_nothing(
    server: DiskServer, tmp_path: Path
) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(serve, server)
        async with joined(server, tmp_path / "standby") as pair:
            assert role(server.state) is Role.HELD
            await do(client.write, 0, b"acknowledged")
            await pair.epoch()
            await do(client.write, 4096, b"not acknowledged")
            await pair.disk.halt()
            await pair.disk.release()
            assert role(server.state) is Role.DISK
            await do(client.write, 8192, b"at once")
            data = server.target.read_bytes()
            assert data[:12] == b"acknowledged"
            assert data[4096:4112] == b"not acknowledged"
            assert data[8192:8199] == b"at once"
            with pytest.raises(StreamLost):
                pair.disk.position()
        async with joined(server, tmp_path / "standby") as pair:
            await do(client.write, 0, b"and held again")
            assert server.target.read_bytes()[:12] == b"acknowledged"
            client.close()

    run(body)


def test_a_dropped_disk_changes_no_more(server: DiskServer, tmp_path: Path) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(serve, server)
        async with joined(server, tmp_path / "standby") as pair:
            await do(client.write, 0, b"held")
            await pair.disk.drop()
            with pytest.raises(OSError, match="not permitted"):
                await do(client.write, 0, b"more")
            assert not any(server.target.read_bytes())
            with pytest.raises(ServerError, match="is a replica"):
                await pair.disk.release()
            client.close()
        await asyncio.to_thread(server.stop)
        assert role(server.state) is Role.HELD

    run(body)


def test_a_daemon_that_dies_leaves_the_disk_held(server: DiskServer, tmp_path: Path) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(serve, server)
        async with joined(server, tmp_path / "standby"):
            await do(client.write, 0, b"held")
        await do(client.write, 4, b" on")
        assert client.read(0, 7) == b"held on"
        assert not any(server.target.read_bytes())
        disk = HeldDisk(server.folder)
        await disk.open()
        assert disk.figures().flags & Flag.HOLDING
        with pytest.raises(ServerError, match="still held"):
            await disk.hold(PRIMARY, "", 2)
        await disk.release()
        assert server.target.read_bytes()[:7] == b"held on"
        await disk.teardown()
        client.close()

    run(body)


def test_a_server_that_is_to_end_waits_for_what_it_holds(
    server: DiskServer, tmp_path: Path
) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(serve, server)
        async with joined(server, tmp_path / "standby") as pair:
            await do(client.write, 0, b"last words")
            client.close()
            ending = asyncio.create_task(asyncio.to_thread(server.stop))
            await asyncio.sleep(0)
            await pair.disk.release()
            await ending
        assert server.target.read_bytes()[:10] == b"last words"

    run(body)


# ---- Room, and what breaks ----


def test_a_full_queue_makes_changes_wait_and_loses_none(server: DiskServer, tmp_path: Path) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(lambda: serve(server, queue="4M", patience=0.01))
        async with joined(server, tmp_path / "standby") as pair:
            data = random.Random(2).randbytes(SIZE)
            for start in range(0, 3 * MIB, MIB):
                await do(client.write, start, data[start : start + MIB])
            await until(lambda: ("full", "") in pair.heard)
            await pair.epoch()
            last = asyncio.create_task(do(client.write, 3 * MIB, data[3 * MIB :]))
            await until(lambda: server.figures().waits > 0)
            assert not last.done()
            assert server.target.read_bytes() == bytes(SIZE)
            await pair.issue()
            await last
            assert client.read(0, SIZE) == data
            pair.replica.issued(pair.disk.issued())
            await pair.epoch()
            await pair.issue()
            assert server.target.read_bytes() == data
            assert "lost" not in [news for news, _ in pair.heard]
            client.close()

    run(body)


def test_a_change_that_cannot_be_issued_is_kept_and_tried_again(
    server: DiskServer, tmp_path: Path
) -> None:
    async def body() -> None:
        await asyncio.to_thread(lambda: server.launch(limit=MIB, shared="true"))
        client = await asyncio.to_thread(server.connect)
        async with joined(server, tmp_path / "standby") as pair:
            await do(client.write, 0, b"possible")
            await do(client.write, 2 * MIB, b"beyond what this process may write")
            await do(client.write, 512, b"after it")
            await pair.epoch()
            await pair.disk.issue(pair.ends[1], far_away())
            await until(lambda: any(news == "failing" for news, _ in pair.heard))
            assert client.read(2 * MIB, 6) == b"beyond"
            assert server.target.read_bytes()[512:520] == bytes(8), "the order was changed"
            pid = server.figures().pid
            resource.prlimit(pid, resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE))
            await until(lambda: pair.disk.issued() == pair.ends[1])
            data = server.target.read_bytes()
            assert (data[:8], data[512:520]) == (b"possible", b"after it")
            assert data[2 * MIB :].startswith(b"beyond what this process may write")
            client.close()

    run(body)


@pytest.mark.parametrize("command", ["issue 1 0 0", "halt", "release", "drop"])
def test_a_replicated_disk_knows_nothing_of_it(server: DiskServer, command: str) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(server.start)
        control = await Control.connect(server.folder / "control", lambda news: None)
        with pytest.raises(ServerError, match=r"not a shared one|not of this stream"):
            await control.ask(command)
        await control.close()
        with pytest.raises(ServerError, match="expected a shared one"):
            await HeldDisk(server.folder).open()
        client.close()

    run(body)


# ---- The standby ----


def test_the_standby_issues_what_the_primary_has_not(server: DiskServer, tmp_path: Path) -> None:
    other = DiskServer(tmp_path / "standby", SIZE, target=server.target)

    async def body() -> None:
        client = await asyncio.to_thread(serve, server)
        async with joined(server, other.state) as pair:
            there = await asyncio.to_thread(lambda: serve(other, replica="true"))
            with pytest.raises(OSError, match="not permitted"):
                await do(there.write, 0, b"x")
            await do(client.write, 0, b"first, first, first")
            await pair.epoch()
            await pair.issue()
            await do(client.write, 7, b"second")
            await do(client.zero, 14, 5)
            await do(client.flush)
            await pair.epoch()
            pair.replica.issued(pair.ends[1])
            await do(client.write, 0, b"speculative")
            await pair.capture()
            await asyncio.to_thread(server.stop, signal.SIGKILL)
            await pair.replica.settle()
            expected = b"first, second ".ljust(SIZE, b"\0")
            assert server.target.read_bytes() == expected
            await pair.replica.take_over(2)
            assert role(other.state) is Role.DISK
            control = await Control.connect(other.folder / "control", lambda news: None)
            await control.ask("activate")
            await control.close()
            assert there.read(0, SIZE) == expected
            await do(there.write, 0, b"FIRST")
            assert server.target.read_bytes()[:5] == b"FIRST"
            there.close()

    try:
        run(body)
    finally:
        other.stop(signal.SIGKILL)


def test_a_target_that_is_in_use_here_is_not_taken(server: DiskServer, tmp_path: Path) -> None:
    other = DiskServer(tmp_path / "standby", SIZE, target=server.target)

    async def body() -> None:
        client = await asyncio.to_thread(serve, server)
        there = await asyncio.to_thread(lambda: serve(other, replica="true"))
        control = await Control.connect(other.folder / "control", lambda news: None)
        with pytest.raises(ServerError, match="in use as another guest's disk"):
            await control.ask("activate")
        with pytest.raises(OSError, match="not permitted"):
            await do(there.write, 0, b"x")
        await control.close()
        client.close()
        there.close()

    try:
        run(body)
    finally:
        other.stop(signal.SIGKILL)


def test_a_copy_of_the_target_is_found_out(server: DiskServer, tmp_path: Path) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(serve, server)
        await do(client.write, 2 * MIB, b"copied")
        shutil.copy(server.target, tmp_path / "copy.img")
        await do(client.write, MIB, b"after the copy was made")
        async with joined(server, tmp_path / "standby", tmp_path / "copy.img") as pair:
            with pytest.raises(ReplicaError, match="is not the primary's: it differs at byte 1048"):
                await pair.capture()
            with pytest.raises(ReplicaError, match="Nothing shows that"):
                pair.replica.seal(1)
        client.close()

    run(body)


def test_the_standby_keeps_to_its_bounds(server: DiskServer, tmp_path: Path) -> None:
    async def body() -> None:
        replica = SharedReplica(server.target, tmp_path / "standby")
        write = encode(Record(Kind.WRITE, 0, 0, 1000, bytes(1000)))
        seen = encode(Record(Kind.SEEN, 0, 0, 512, bytes(512)))
        for size, queue, said in (
            (SIZE, BUDGET + 1, "expected at most"),
            (SIZE // 2, 1 << 20, "has 4194304 bytes on this host, expected 2097152"),
        ):
            with pytest.raises(ReplicaError, match=said):
                await replica.setup(size=size, queue=queue, peer=PRIMARY, generation=1)
        await replica.setup(size=SIZE, queue=3000, peer=PRIMARY, generation=1)
        with pytest.raises(RecordError, match="of epoch 0"):
            await replica.stage(0, write)
        await replica.stage(1, seen + write)
        with pytest.raises(RecordError, match="no sealed record's end"):
            replica.issued(len(seen))
        replica.seal(1)
        await replica.stage(2, write)
        with pytest.raises(RecordError, match="3640 bytes of records are not issued"):
            await replica.stage(2, write)
        replica.issued(len(seen + write))
        await replica.stage(2, write)
        replica.discard()
        assert replica.waiting == 0
        for wrong in (len(seen), len(seen + write) + 1):
            with pytest.raises(RecordError, match="no sealed record's end"):
                replica.issued(wrong)

    run(body)


def test_a_target_that_shrinks_is_not_taken_over(server: DiskServer, tmp_path: Path) -> None:
    async def body() -> None:
        replica = SharedReplica(server.target, tmp_path / "standby")
        await replica.setup(size=SIZE, queue=MIB, peer=PRIMARY, generation=1)
        os.truncate(server.target, SIZE // 2)
        with pytest.raises(ReplicaError, match="bytes now, expected"):
            await replica.take_over(2)
        assert role(tmp_path / "standby") is Role.REPLICA

    run(body)


def test_what_was_seen_is_no_record_of_a_replicated_disk() -> None:
    seen = encode(Record(Kind.SEEN, 0, 0, 512, bytes(512)))
    assert parse(seen, SIZE, shared=True)[0].kind is Kind.SEEN
    with pytest.raises(RecordError, match="unknown kind 4"):
        parse(seen, SIZE)


def test_direct_requests_of_any_shape(tmp_path: Path) -> None:
    path = tmp_path / "target"
    path.write_bytes(bytes(3 * MIB))
    model = bytearray(3 * MIB)
    chance = random.Random(4)
    with closing(DirectTarget(path, writing=True)) as target:
        for _ in range(60):
            offset = chance.randrange(3 * MIB)
            length = min(chance.choice((1, 511, 512, 4096, 2 * MIB)), 3 * MIB - offset)
            data = chance.randbytes(length)
            if chance.randrange(3):
                target.write(offset, data)
            else:
                data = bytes(length)
                target.zero(offset, length)
            model[offset : offset + length] = data
            assert target.read(offset, length) == data
        target.flush()
    assert path.read_bytes() == model


@pytest.mark.parametrize(
    ("what", "said"),
    [("missing", "No such file"), ("folder", "neither a file nor a block device")],
)
def test_what_is_no_target_is_refused(tmp_path: Path, what: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ReplicaError, match=said):
        DirectTarget(tmp_path / what)
