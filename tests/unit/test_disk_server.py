# SPDX-License-Identifier: Apache-2.0
"""The plug-in in a real nbdkit, and both ends of its stream."""

from __future__ import annotations

import asyncio
import random
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from diskbuffer import bitmap
from diskbuffer.bitmap import Bitmap
from diskbuffer.control import Control
from diskbuffer.disk import DiskBuffer
from diskbuffer.errors import BitmapError, DiskError, ServerError, StreamLost
from diskbuffer.metadata import Role, load
from diskbuffer.replica import Replica
from diskbuffer.status import Flag, StreamState
from tests.unit.disk_client import NbdClient
from tests.unit.disk_pair import (
    CHUNK,
    MIB,
    PRIMARY,
    SIZE,
    STANDBY,
    WAIT,
    Pair,
    do,
    joined,
    run,
    until,
)
from tests.unit.disk_server import DiskServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DiskServer]:
    server = DiskServer(tmp_path / "primary", SIZE)
    yield server
    server.stop(signal.SIGKILL)


# ---- The disk alone ----


def test_a_disk_reads_as_it_was_written(server: DiskServer) -> None:
    client = server.start()
    model = bytearray(SIZE)
    chance = random.Random(1)
    for _ in range(300):
        offset = chance.randrange(SIZE)
        length = min(chance.choice((1, 512, 4096, 70000, 3 * MIB)), SIZE - offset)
        match chance.randrange(4):
            case 0:
                client.zero(offset, length, hole=chance.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            case 1:
                client.trim(offset, length)
                model[offset : offset + length] = bytes(length)
            case _:
                data = chance.randbytes(length)
                client.write(offset, data, fua=chance.random() < 0.1)
                model[offset : offset + length] = data
    assert client.read(0, SIZE) == model
    client.close()
    server.stop()
    assert server.target.read_bytes() == model


def test_requests_beyond_the_disk_are_refused(server: DiskServer) -> None:
    client = server.start()
    for call in (client.read, client.trim):
        with pytest.raises(OSError, match="Errno"):
            call(SIZE - 1, 2)
    with pytest.raises(OSError, match="Errno"):
        client.write(SIZE, b"x")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"queue": "1"}, "expected 4M to 4G"),
        ({"clean": "never"}, "expected 0.01 to 86400 seconds"),
        ({"what": "1"}, "unknown parameter what"),
    ],
)
def test_a_wrong_parameter_is_refused(
    server: DiskServer, config: dict[str, str], said: str
) -> None:
    with pytest.raises(RuntimeError, match=said):
        server.launch(**config)  # type: ignore[arg-type]


# ---- Replication ----


def test_a_replica_has_what_the_disk_has(server: DiskServer, tmp_path: Path) -> None:
    server.target.write_bytes(random.Random(2).randbytes(SIZE // 2) + bytes(SIZE // 2))

    async def body() -> None:
        client = await asyncio.to_thread(server.start)
        async with joined(server, tmp_path) as pair:
            assert "does not know" in await pair.begin()
            await do(client.write, 100, b"while copying")
            await pair.sync()
            await pair.replica.settle()
            assert pair.replica.consistent
            assert pair.copy.read_bytes() == server.target.read_bytes()
            await do(client.write, 5000, b"of epoch 2")
            await do(client.flush)
            await pair.seal()
            await pair.replica.settle()
            assert pair.copy.read_bytes() == server.target.read_bytes()
            client.close()

    run(body)


def test_only_sealed_epochs_are_applied(server: DiskServer, tmp_path: Path) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(server.start)
        async with joined(server, tmp_path) as pair:
            await pair.begin()
            await pair.sync()
            await do(client.write, 0, b"sealed")
            await pair.seal()
            await do(client.write, 0, b"staged")
            await do(client.trim, CHUNK, CHUNK)
            await pair.carry()
            await pair.replica.take_over(2)
            assert pair.copy.read_bytes() == b"sealed".ljust(SIZE, b"\0")
            known = load(pair.state / "state.json")
            assert known is not None
            assert (known.role, known.generation) == (Role.DISK, 2)
            marks = bitmap.load(pair.state / "bitmap", SIZE)
            assert marks is not None
            assert marks.runs() == []
            client.close()

    run(body)


def test_a_replica_that_is_not_complete_never_becomes_the_disk(
    server: DiskServer, tmp_path: Path
) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(server.start)
        async with joined(server, tmp_path) as pair:
            await pair.begin()
            await pair.disk.sync()
            await pair.seal()
            with pytest.raises(DiskError, match="is not complete"):
                await pair.replica.take_over(2)
            client.close()

    run(body)


def test_only_what_differs_is_copied_again(server: DiskServer, tmp_path: Path) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(lambda: server.start(clean=0.02))
        async with joined(server, tmp_path) as pair:
            await pair.equalise()
        await do(client.write, 7 * CHUNK, b"while nobody listens")
        async with joined(server, tmp_path) as pair:
            assert await pair.begin() == ""
            assert pair.disk.progress().total == CHUNK
            await pair.sync()
            await pair.replica.settle()
            assert pair.copy.read_bytes() == server.target.read_bytes()
        client.close()

    run(body)


def test_a_synchronisation_is_resumed_where_it_was_applied(
    server: DiskServer, tmp_path: Path
) -> None:
    server.target.write_bytes(random.Random(3).randbytes(SIZE))

    async def body() -> None:
        await asyncio.to_thread(lambda: server.launch(clean=0.02))
        async with joined(server, tmp_path) as pair:
            await pair.begin()
            await pair.disk.sync(2 * MIB)
            await until(lambda: server.figures().sync_left <= 48)
            await pair.carry()
            await pair.disk.sync(1)  # almost nothing more
            await pair.carry()
            pair.replica.seal(0)
            await pair.settle()
            await until(lambda: server.figures().dirty < 64)
            left = server.figures().dirty
            assert left > 0
        async with joined(server, tmp_path) as pair:
            assert await pair.begin() == ""
            assert server.figures().sync_total == left
            await pair.sync()
            await pair.replica.settle()
            assert pair.copy.read_bytes() == server.target.read_bytes()

    run(body)


def test_a_killed_server_loses_no_mark(server: DiskServer, tmp_path: Path) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(lambda: server.start(clean=0.02))
        async with joined(server, tmp_path) as pair:
            await pair.equalise()
            await do(client.write, 3 * CHUNK, b"speculative")
            await asyncio.to_thread(server.stop, signal.SIGKILL)
            await until(lambda: "ended" in pair.heard)
        marks = bitmap.load(server.bitmap, SIZE)
        assert marks is not None
        assert marks.runs() == [(3, 1)]
        client = await asyncio.to_thread(server.start)
        await do(client.write, 9 * CHUNK - 1, b"and across two chunks")
        async with joined(server, tmp_path) as pair:
            assert await pair.begin() == ""
            assert server.figures().sync_total == 3
            await pair.sync()
            await pair.replica.settle()
            assert pair.copy.read_bytes() == server.target.read_bytes()
        client.close()

    run(body)


def test_the_old_primary_is_rolled_forward(server: DiskServer, tmp_path: Path) -> None:
    """Takeover, then the other direction: what the old primary wrote on its own is undone."""
    back = DiskServer(tmp_path / "back", SIZE)

    async def body() -> None:
        client = await asyncio.to_thread(server.start)
        async with joined(server, tmp_path) as pair:
            await pair.begin()
            await pair.sync()
            await do(client.write, 0, b"common")
            await pair.seal()
            await do(client.write, 2 * CHUNK, b"speculative, and never sent")
            await pair.replica.take_over(2)
        await asyncio.to_thread(server.stop, signal.SIGKILL)
        # The copy and what is known of it, served in the place of the disk.
        back.target.unlink()
        back.target.symlink_to(tmp_path / "copy.img")
        for name in ("state.json", "bitmap"):
            (tmp_path / "copy-state" / name).rename(back.state / name)
        client = await asyncio.to_thread(back.start)
        await do(client.write, 5 * CHUNK, b"of the new primary")
        pair = Pair(back, tmp_path / "primary")
        pair.copy = server.target
        pair.replica = Replica(server.target, server.state, on_applied=pair._applied)
        assert await pair.begin() == ""
        assert (2, 1) in pair.replica.known.runs or pair.replica.known.runs[0][0] <= 2
        await pair.sync()
        await pair.replica.settle()
        assert server.target.read_bytes() == back.target.read_bytes()
        assert b"speculative" not in server.target.read_bytes()
        assert not server.bitmap.exists()
        await pair.end()
        client.close()

    try:
        run(body)
    finally:
        back.stop(signal.SIGKILL)


# ---- Room, and what breaks ----


def test_a_reader_that_stands_still_makes_writes_wait_and_then_loses_the_stream(
    server: DiskServer, tmp_path: Path
) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(lambda: server.start(queue="4M", patience=0.5))
        async with joined(server, tmp_path) as pair:
            await pair.begin()
            await pair.sync()
            for _ in range(3):
                await do(client.write, 0, bytes(MIB))
            await until(lambda: "full" in pair.heard)
            for _ in range(6):
                await do(client.write, MIB, bytes(MIB))  # none is refused
            await until(lambda: "lost" in pair.heard)
            with pytest.raises(StreamLost, match="Nothing was taken from the stream"):
                pair.disk.position()
        figures = server.figures()
        assert figures.waits > 0
        assert figures.state == StreamState.BROKEN
        client.close()

    run(body)


def test_writes_that_waited_for_room_are_in_the_stream(server: DiskServer, tmp_path: Path) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(lambda: server.start(queue="4M"))
        async with joined(server, tmp_path) as pair:
            await pair.begin()
            await pair.sync()
            chance = random.Random(4)

            def write() -> None:
                for _ in range(12):
                    client.write(chance.randrange(4) * MIB, chance.randbytes(MIB))

            writing = asyncio.create_task(asyncio.to_thread(write))
            await until(lambda: server.figures().waits > 0)
            while not writing.done():
                await pair.seal()
            await writing
            await pair.seal()
            await pair.replica.settle()
            assert pair.copy.read_bytes() == server.target.read_bytes()
        client.close()

    run(body)


def test_a_write_that_fails_is_the_guests_error_and_is_not_replicated(tmp_path: Path) -> None:
    """The server may make files no longer than 2 MiB: behind that, writing fails."""
    server = DiskServer(tmp_path / "primary", SIZE)

    async def body() -> None:
        await asyncio.to_thread(lambda: server.launch(limit=2 * MIB))
        client = server.connect()
        async with joined(server, tmp_path) as pair:
            await pair.begin()
            await pair.sync()
            before = pair.disk.position()
            with pytest.raises(OSError, match="Errno"):
                await do(client.write, 3 * MIB, b"x" * 512)
            await do(client.write, MIB, b"good")
            await until(lambda: pair.disk.progress().left == 0)
            assert pair.disk.position() > before
            await pair.seal()
            await pair.replica.settle()
            assert pair.copy.read_bytes() == server.target.read_bytes()
            assert server.figures().errors == 1
        client.close()

    try:
        run(body)
    finally:
        server.stop(signal.SIGKILL)


def test_a_bitmap_that_cannot_be_written_ends_the_stream_not_the_guest(
    server: DiskServer, tmp_path: Path
) -> None:
    """The server may make files no longer than 6000 bytes: marks are behind byte 4096."""

    async def body() -> None:
        await asyncio.to_thread(lambda: server.launch(limit=6000, clean=0.02))
        client = server.connect()
        async with joined(server, tmp_path) as pair:
            await pair.equalise()
            await do(client.write, 0, b"the guest goes on")
            await until(lambda: "lost" in pair.heard)
            with pytest.raises(StreamLost, match="cannot be written"):
                pair.disk.position()
        assert client.read(0, 17) == b"the guest goes on"
        with pytest.raises(BitmapError, match="damaged"):
            bitmap.load(server.bitmap, SIZE)
        client.close()

    try:
        run(body)
    finally:
        server.stop(signal.SIGKILL)


def test_a_damaged_bitmap_costs_a_full_copy(server: DiskServer, tmp_path: Path) -> None:
    async def body() -> None:
        await asyncio.to_thread(server.launch)
        async with joined(server, tmp_path) as pair:
            await pair.begin()
            await pair.sync()
        await asyncio.to_thread(server.stop)
        data = bytearray(server.bitmap.read_bytes())
        data[30] ^= 1
        server.bitmap.write_bytes(data)
        await asyncio.to_thread(server.launch)
        assert not server.figures().flags & Flag.TRACKING
        async with joined(server, tmp_path) as pair:
            await pair.disk.open()
            assert "is damaged" in pair.disk.why
            await pair.disk.teardown()
        async with joined(server, tmp_path) as pair:
            assert "does not know" in await pair.begin()
            assert pair.disk.progress().total == SIZE

    run(body)


# ---- The control socket ----


def test_commands_that_do_not_fit_are_refused(server: DiskServer) -> None:
    async def body() -> None:
        await asyncio.to_thread(server.launch)
        control = await Control.connect(server.folder / "control", lambda line: None)
        assert await control.ask("hello") == [1, SIZE, 0]
        for command, said in (
            ("what", "no such command"),
            ("load", "there is no bitmap"),
            ("merge 0+1", "no bitmap is loaded"),
            ("sync 0", "there is no stream"),
            ("sync", "no such command"),
            ("sync 1 2", "no such command"),
            ("applied 1 0", "not of this stream"),
            ("stream", "no bitmap is loaded"),
        ):
            with pytest.raises(ServerError, match=said):
                await control.ask(command)
        Bitmap(SIZE, str(uuid.uuid4()), PRIMARY).save(server.bitmap)
        assert await control.ask("load") == [0]
        for runs in ("64+1", "0+65", "1", "-1+2", "0+0"):
            with pytest.raises(ServerError, match="not one of this disk"):
                await control.ask(f"merge {runs}")
        await control.ask("merge 0+1 2+2")
        assert server.figures().dirty == 3
        await control.close()

    run(body)


def test_a_line_without_end_costs_the_connection(server: DiskServer) -> None:
    async def body() -> None:
        await asyncio.to_thread(server.launch)
        reader, writer = await asyncio.open_unix_connection(server.folder / "control")
        writer.write(b"x" * 8192)
        async with asyncio.timeout(WAIT):
            assert await reader.read() == b""
        writer.close()

    run(body)


def test_without_a_server_the_disk_says_so(tmp_path: Path) -> None:
    async def body() -> None:
        with pytest.raises(ServerError, match="expected a disk's server"):
            await DiskBuffer(tmp_path).open()

    run(body)


def test_what_is_read_cannot_end_between_records(server: DiskServer, tmp_path: Path) -> None:
    async def body() -> None:
        client: NbdClient = await asyncio.to_thread(server.start)
        async with joined(server, tmp_path) as pair:
            await pair.begin()
            await pair.sync()
            await do(client.write, 0, b"x")
            batches = pair.disk.read(pair.disk.taken + 20)
            with pytest.raises(DiskError, match="no record that ends"):
                await anext(batches)
        client.close()

    run(body)


def test_a_pair_that_is_not_known_cannot_be_brought_up_to_date(server: DiskServer) -> None:
    async def body() -> None:
        await asyncio.to_thread(server.launch)
        disk = DiskBuffer(server.folder)
        await disk.open()
        with pytest.raises(BitmapError, match="known"):
            await disk.begin(pair=PRIMARY, peer=STANDBY, generation=1, differing=())
        await disk.teardown()

    run(body)
