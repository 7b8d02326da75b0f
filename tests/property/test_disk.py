# SPDX-License-Identifier: Apache-2.0
"""A replica against a model, with the power gone at any step."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from pathlib import Path
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from diskbuffer import bitmap, metadata, stream
from diskbuffer.backing import Backing
from diskbuffer.bitmap import Bitmap
from diskbuffer.errors import DiskError, RecordError, ReplicaError
from diskbuffer.metadata import Fitness, Role
from diskbuffer.replica import Replica
from diskbuffer.stream import Kind, Record

SIZE = 64 * 512
PAIR, PEER = str(uuid.uuid4()), str(uuid.uuid4())

_ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 4096)).map(
    lambda r: (r[0], min(r[1], SIZE - r[0]))
)
_writes = st.tuples(_ranges, st.integers(0, 255)).map(
    lambda w: Record(Kind.WRITE, 0, *w[0], bytes([w[1]]) * w[0][1])
)
_zeros = st.tuples(_ranges, st.integers(0, 1)).map(lambda z: Record(Kind.ZERO, z[1], *z[0]))
_flush = st.just(Record(Kind.FLUSH, 0, 0, 0))
_batches = st.lists(st.one_of(_writes, _zeros, _flush), max_size=4)
#: What happens to a replica, one after the other; the last is its end.
_steps = st.lists(st.one_of(st.tuples(st.just("stage"), _batches), st.just(("seal", []))))
_ends = st.sampled_from(["take over", "lost", "disk fails"])


def play(model: bytearray, record: Record) -> None:
    """What a record does to a disk."""
    if record.kind is not Kind.FLUSH:
        data = record.payload or bytes(record.extent)
        model[record.offset : record.offset + record.extent] = data


@settings(max_examples=120, deadline=None)
@given(steps=_steps, end=_ends, fails_at=st.integers(0, 6))
def test_a_replica_is_of_a_sealed_epoch_or_says_that_it_is_not(
    steps: list[tuple[str, list[Record]]], end: str, fails_at: int
) -> None:
    async def body(folder: Path) -> None:
        target, state = folder / "disk", folder / "state"
        target.write_bytes(bytes(SIZE))
        # What the target holds after each record that may have been applied, in order.
        disks = [bytes(SIZE)]
        sealed, epoch = 0, 0
        replica = Replica(target, state)
        await replica.setup(size=SIZE, pair="", new_pair=PAIR, peer=PEER, generation=1)
        model = bytearray(SIZE)
        writes = 0
        refused = False
        honest = Backing._write

        def failing(self: Backing, data: bytes, offset: int) -> None:
            nonlocal writes
            writes += 1
            if end == "disk fails" and writes > fails_at:
                raise OSError(28, "No space left on device")
            honest(self, data, offset)

        with mock.patch.object(Backing, "_write", failing):
            try:
                for what, records in steps:
                    if what == "stage":
                        batch = b"".join(map(stream.encode, records))
                        await replica.stage(epoch, batch)
                        for record in records:
                            play(model, record)
                            disks.append(bytes(model))
                        if epoch == 0:
                            sealed = len(disks) - 1
                    else:
                        replica.seal(epoch)
                        sealed = len(disks) - 1
                        epoch += 1
                if end == "take over":
                    await replica.take_over(2)
                else:
                    await replica.close()
            except DiskError:
                refused = True
                await replica.close()
        assert not (refused and end == "take over" and epoch >= 2)
        known = metadata.load(state / "state.json")
        assert known is not None
        now = target.read_bytes()
        if replica.failure is not None:
            assert isinstance(replica.failure, ReplicaError)
            assert known.role is Role.REPLICA
        else:
            assert now == disks[sealed]
        if known.role is Role.DISK:
            assert end == "take over"
            assert epoch >= 2
            marks = bitmap.load(state / "bitmap", SIZE)
            assert marks is not None
            assert marks.pair == PAIR
        if known.state is Fitness.CONSISTENT:
            assert epoch >= 2, "fit to run before epoch 1 was whole"

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(body(Path(folder)))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200), size=st.integers(512, 1 << 40))
def test_no_bytes_bring_down_who_reads_records(data: bytes, size: int) -> None:
    for call in (lambda: stream.parse(data, size), lambda: stream.whole(data)):
        try:
            call()
        except RecordError:
            continue


@settings(max_examples=200, deadline=None)
@given(
    records=st.lists(st.one_of(_writes, _zeros, _flush), min_size=1, max_size=5),
    place=st.integers(0),
    bit=st.integers(0, 7),
)
def test_one_wrong_bit_never_passes(records: list[Record], place: int, bit: int) -> None:
    batch = bytearray(b"".join(map(stream.encode, records)))
    batch[place % len(batch)] ^= 1 << bit
    try:
        assert stream.parse(batch, SIZE) != records
        raise AssertionError("a damaged batch was taken")
    except RecordError:
        pass


@settings(max_examples=100, deadline=None)
@given(chunks=st.integers(1, 400), marked=st.sets(st.integers(0, 399)), most=st.integers(1, 20))
def test_runs_never_miss_a_chunk(chunks: int, marked: set[int], most: int) -> None:
    marks = Bitmap(chunks << 16, PAIR, PEER)
    marked = {number for number in marked if number < chunks}
    marks.add((number, 1) for number in sorted(marked))

    def of(runs: list[bitmap.Run]) -> set[int]:
        return {number for first, count in runs for number in range(first, first + count)}

    assert of(marks.runs()) == marked
    few = marks.runs(most)
    assert len(few) <= most
    assert of(few) >= marked
    assert all(first + count <= chunks for first, count in few)
    other = Bitmap(chunks << 16, PAIR, PEER)
    other.add(few)
    assert other.runs() == few


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0), pattern=st.binary(min_size=1, max_size=1))
def test_a_torn_file_of_metadata_is_refused_or_whole(cut: int, pattern: bytes) -> None:
    known = metadata.Metadata(Role.REPLICA, Fitness.CONSISTENT, SIZE, PAIR, PEER, 3, 4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.json"
        known.save(path)
        data = path.read_bytes()
        cut %= len(data)
        path.write_bytes(data[:cut] + pattern * (len(data) - cut))
        try:
            read = metadata.load(path)
        except DiskError:
            return
        assert read == known or pattern.isdigit()
