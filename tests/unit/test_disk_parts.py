# SPDX-License-Identifier: Apache-2.0
"""Records, bitmaps and what is durably known of a disk, each by itself."""

from __future__ import annotations

import json
import uuid
import zlib
from pathlib import Path

import pytest

from diskbuffer import bitmap, metadata, stream
from diskbuffer.bitmap import Bitmap
from diskbuffer.errors import BitmapError, MetadataError, RecordError
from diskbuffer.metadata import Fitness, Metadata, Role
from diskbuffer.stream import HEAD, Flags, Kind, Record

DISK = 1 << 20
PAIR, PEER = str(uuid.uuid4()), str(uuid.uuid4())


def record(data: bytes = b"data", offset: int = 512) -> bytes:
    return stream.encode(Record(Kind.WRITE, 0, offset, len(data), data))


def test_records_come_back_as_they_were() -> None:
    sent = [
        Record(Kind.WRITE, 0, 512, 4, b"data"),
        Record(Kind.ZERO, Flags.PUNCH | Flags.SYNC, 0, DISK),
        Record(Kind.FLUSH, 0, 0, 0),
    ]
    batch = b"".join(map(stream.encode, sent))
    assert stream.parse(batch, DISK) == sent
    assert stream.whole(batch) == len(batch)
    assert stream.whole(batch[:-1]) == len(batch) - HEAD.size
    assert stream.parse(b"", DISK) == []


def forged(**changes: int) -> bytes:
    """A record with fields that do not fit, and a right checksum."""
    fields = {"kind": 1, "flags": 0, "zero": 0, "length": 4, "offset": 512, "extent": 4, "more": 0}
    head = HEAD.pack(*(fields | changes).values(), 0)[:-4]
    return head + zlib.crc32(b"data", zlib.crc32(head)).to_bytes(4, "little") + b"data"


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (record()[:-1], "cut short"),
        (record() + b"more", "4 bytes that are no record"),
        (forged(kind=9), "unknown kind 9"),
        (forged(kind=0), "unknown kind 0"),
        (forged(flags=1), "no meaning"),
        (forged(zero=1), "no meaning"),
        (forged(more=1), "no meaning"),
        (forged(extent=5), "5 bytes has 4 of payload"),
        (forged(kind=2), "has 4 of payload"),
        (forged(length=0, extent=0), "0 bytes at 512"),
        (forged(offset=DISK - 3), "on a disk of"),
        (forged(offset=2**64 - 1), "on a disk of"),
        (forged(length=2**21, extent=2**21), "has 2097152 of payload"),
        (forged(kind=3, length=0, extent=0), "has a range"),
        (record()[:-1] + b"A", "wrong checksum"),
    ],
)
def test_a_record_that_breaks_the_format_is_refused(batch: bytes, said: str) -> None:
    with pytest.raises(RecordError, match=said):
        stream.parse(batch, DISK)


def test_no_record_that_breaks_the_format_is_made() -> None:
    with pytest.raises(RecordError):
        stream.encode(Record(Kind.WRITE, 0, 0, 5, b"data"))


def test_a_boundary_is_not_looked_for_behind_an_impossible_length() -> None:
    with pytest.raises(RecordError, match="at most"):
        stream.whole(forged(length=2**31))


# ---- Bitmaps ----


def test_a_bitmap_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "bitmap"
    marks = Bitmap(DISK + 512, PAIR, PEER, 7)
    assert marks.chunks == 17
    marks.add([(0, 1), (3, 2), (16, 1)])
    marks.save(path)
    read = bitmap.load(path, DISK + 512)
    assert read is not None
    assert (read.pair, read.peer, read.generation) == (PAIR, PEER, 7)
    assert read.runs() == [(0, 1), (3, 2), (16, 1)]
    assert read.count() == 4
    assert bitmap.load(tmp_path / "none", DISK) is None


def test_a_full_bitmap_ends_with_the_disk() -> None:
    marks = Bitmap(9 * 65536 - 1, PAIR, PEER)
    marks.fill()
    assert marks.runs() == [(0, 9)]


def test_too_many_runs_are_joined_where_least_is_copied_in_vain() -> None:
    marks = Bitmap(100 << 16, PAIR, PEER)
    marks.add([(0, 1), (2, 1), (10, 1), (12, 1), (50, 1)])
    assert marks.runs(3) == [(0, 3), (10, 3), (50, 1)]
    assert marks.runs(1) == [(0, 51)]


@pytest.mark.parametrize("run", [(0, 0), (-1, 2), (16, 1), (15, 2)])
def test_a_run_of_another_disk_is_refused(run: tuple[int, int]) -> None:
    with pytest.raises(BitmapError, match="not of a disk of 16"):
        Bitmap(DISK, PAIR, PEER).add([run])


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [(0, 88, "damaged"), (8, 9, "damaged"), (20, 1, "damaged"), (40, 1, "damaged")],
)
def test_a_damaged_header_is_refused(tmp_path: Path, place: int, value: int, said: str) -> None:
    path = tmp_path / "bitmap"
    Bitmap(DISK, PAIR, PEER).save(path)
    data = bytearray(path.read_bytes())
    data[place] ^= value
    path.write_bytes(data)
    with pytest.raises(BitmapError, match=said):
        bitmap.load(path, DISK)


def test_a_bitmap_of_another_disk_or_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bitmap"
    Bitmap(DISK, PAIR, PEER).save(path)
    with pytest.raises(BitmapError, match="is of a disk of"):
        bitmap.load(path, DISK * 2)
    data = path.read_bytes()
    for wrong in (data[:100], data[:-1], data + b"x"):
        path.write_bytes(wrong)
        with pytest.raises(BitmapError):
            bitmap.load(path, DISK)


# ---- What is known ----


def test_metadata_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    known = Metadata(Role.REPLICA, Fitness.SYNCING, DISK, PAIR, PEER, 3, 9)
    known.save(path)
    assert metadata.load(path) == known
    assert '"role": "replica"' in path.read_text(), "block-kemari looks for these words"
    assert metadata.load(tmp_path / "none") is None


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"role": "standby"},
        {"state": 1},
        {"size": "1"},
        {"size": -1},
        {"pair": "x"},
        {"epoch": None},
    ],
)
def test_damaged_metadata_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "state.json"
    Metadata(Role.DISK, Fitness.CONSISTENT, DISK).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(MetadataError, match="damaged"):
        metadata.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '"x"', "7"])
def test_what_is_no_metadata_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(MetadataError, match="damaged"):
        metadata.load(path)


def test_metadata_that_cannot_be_written_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    known = Metadata(Role.DISK, Fitness.CONSISTENT, DISK)
    known.save(path)
    (tmp_path / "state.json.new").mkdir()
    with pytest.raises(MetadataError, match="cannot be written"):
        Metadata(Role.REPLICA, Fitness.SYNCING, DISK).save(path)
    assert metadata.load(path) == known
