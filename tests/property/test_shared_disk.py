# SPDX-License-Identifier: Apache-2.0
"""A shared disk against a flat model: what is read, and what the target holds when."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diskbuffer.direct import DirectTarget
from diskbuffer.errors import ReplicaError
from diskbuffer.shared import SharedReplica
from diskbuffer.stream import Kind, Record, encode
from tests.unit.disk_client import NbdClient
from tests.unit.disk_server import DiskServer
from tests.unit.shared_disk import PRIMARY, do, joined, serve

SIZE = 32 * 512

_ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 5000)).map(
    lambda r: (r[0], min(r[1], SIZE - r[0]))
)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), _ranges, st.integers(0, 255)),
        st.tuples(st.just("zero"), _ranges, st.just(0)),
        st.tuples(st.just("read"), _ranges, st.just(0)),
        st.tuples(st.sampled_from(["flush", "epoch", "issue"]), st.just((0, 0)), st.just(0)),
    ),
    max_size=25,
)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[DiskServer, NbdClient]]:
    # Not tmp_path: the name of a socket has 108 bytes at most.
    with tempfile.TemporaryDirectory(prefix="kd") as name:
        server = DiskServer(Path(name), SIZE)
        client = serve(server)
        yield server, client
        client.close()
        server.stop(signal.SIGKILL)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=_steps)
def test_the_guest_reads_what_it_wrote_and_the_target_is_what_was_issued(
    served: tuple[DiskServer, NbdClient], steps: list[tuple[str, tuple[int, int], int]]
) -> None:
    server, client = served

    async def body(folder: Path) -> None:
        model = bytearray(server.target.read_bytes())
        async with joined(server, folder) as pair:
            # What an issue of each acknowledged epoch makes of the target.
            disks = [bytes(model)]
            issued = 0
            for what, (offset, length), value in steps:
                match what:
                    case "write":
                        await do(client.write, offset, bytes([value]) * length)
                        model[offset : offset + length] = bytes([value]) * length
                    case "zero":
                        await do(client.zero, offset, length)
                        model[offset : offset + length] = bytes(length)
                    case "read":
                        assert client.read(offset, length) == model[offset : offset + length]
                    case "flush":
                        await do(client.flush)
                    case "epoch":
                        await pair.epoch()
                        disks.append(bytes(model))
                    case "issue" if len(disks) > 1:
                        issued = len(disks) - 1
                        await pair.issue()
                        pair.replica.issued(pair.ends[-1])
                assert server.target.read_bytes() == disks[issued]
            assert client.read(0, SIZE) == model
            if len(disks) > 1:
                await pair.replica.settle()
                assert server.target.read_bytes() == disks[-1]
            await pair.disk.release()
            assert server.target.read_bytes() == model

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(body(Path(folder)))


def play(model: bytearray, record: Record) -> None:
    """What a record does to a disk."""
    if record.kind in (Kind.WRITE, Kind.ZERO):
        model[record.offset : record.offset + record.extent] = record.payload or bytes(
            record.extent
        )


_records = st.lists(
    st.one_of(
        st.tuples(_ranges, st.integers(0, 255)).map(
            lambda w: Record(Kind.WRITE, 0, *w[0], bytes([w[1]]) * w[0][1])
        ),
        _ranges.map(lambda z: Record(Kind.ZERO, 0, *z)),
        st.just(Record(Kind.FLUSH, 0, 0, 0)),
    ),
    max_size=12,
)


@settings(max_examples=50, deadline=None)
@given(records=_records, done=st.integers(0), told=st.integers(0), fails_at=st.integers(0, 12))
def test_whatever_the_primary_had_issued_the_takeover_makes_the_same_disk(
    records: list[Record], done: int, told: int, fails_at: int
) -> None:
    """The primary dies with ``done`` records on the target, of which it has said ``told``; the
    standby fails in the middle, and tries again."""

    async def body(folder: Path) -> None:
        target = folder / "disk"
        target.write_bytes(bytes(SIZE))
        replica = SharedReplica(target, folder / "state")
        await replica.setup(size=SIZE, queue=1 << 20, peer=PRIMARY, generation=1)
        seen = Record(Kind.SEEN, 0, 0, 512, bytes(512))
        batch = [encode(record) for record in (seen, *records)]
        await replica.stage(1, b"".join(batch))
        replica.seal(1)
        number = done % (len(records) + 1)
        model = bytearray(SIZE)
        for record in records[:number]:
            play(model, record)
        target.write_bytes(model)
        replica.issued(sum(map(len, batch[: 1 + told % (number + 1)])))
        for record in records[number:]:
            play(model, record)
        writes = 0
        honest = DirectTarget._write_slice

        def failing(self: DirectTarget, offset: int, data: memoryview) -> None:
            nonlocal writes
            writes += 1
            if writes == fails_at:
                raise ReplicaError("the path to the storage is gone")
            honest(self, offset, data)

        with mock.patch.object(DirectTarget, "_write_slice", failing):
            try:
                await replica.take_over(2)
            except ReplicaError:
                await replica.take_over(2)
        assert target.read_bytes() == model

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(body(Path(folder)))
