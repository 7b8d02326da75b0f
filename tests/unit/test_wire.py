# SPDX-License-Identifier: Apache-2.0
"""Frames: what is written can be read, and nothing else is."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import pytest

from checkpoint.errors import ProtocolError
from checkpoint.fields import Fields
from checkpoint.wire import (
    HEADER,
    MAX_AGE_NS,
    MAX_JSON,
    MAX_PAGES,
    MAX_STATE,
    SPECS,
    Frame,
    FrameType,
    Parser,
    Totals,
    decode_json,
    encode_frame,
    encode_json,
)


def encoded(frame_type: FrameType, payload: bytes = b"", **fields: int) -> bytes:
    return b"".join(encode_frame(frame_type, payload, **fields)[0])


def raw(
    payload: bytes = b"",
    *,
    magic: bytes = b"KMRI",
    number: int = FrameType.HEARTBEAT,
    flags: int = 0,
    reserved: int = 0,
    length: int | None = None,
    epoch: int = 0,
    crc: int | None = None,
) -> bytes:
    """A frame with whatever is asked for in its header, and by default the right checksum."""
    size = len(payload) if length is None else length
    head = struct.pack("<4sBBHIQ", magic, number, flags, reserved, size, epoch)
    right = zlib.crc32(head + payload)
    return head + struct.pack("<I", right if crc is None else crc) + payload


def parse(data: bytes) -> list[Frame]:
    return list(Parser().feed(data))


# ---- Encoding ----


def test_layout_of_a_frame() -> None:
    assert encoded(FrameType.ACK, epoch=7) == raw(number=21, epoch=7)
    payload = b"x" * 100
    assert encoded(FrameType.PAGES, payload, flags=1, epoch=2**64 - 1) == raw(
        payload, number=18, flags=1, epoch=2**64 - 1
    )


def test_payload_is_not_copied() -> None:
    payload = bytes(1000)
    buffers, _ = encode_frame(FrameType.PAGES, payload)
    assert buffers[1] is payload


@pytest.mark.parametrize("frame_type", FrameType)
def test_every_type_passes_at_both_limits_of_its_length(frame_type: FrameType) -> None:
    spec = SPECS[frame_type]
    for length in {spec.least, spec.most}:
        data = encoded(frame_type, bytes(length), flags=spec.flags)
        (frame,) = parse(data)
        assert frame.type is frame_type
        assert frame.flags == spec.flags
        assert frame.payload == bytes(length)
        assert frame.size == len(data)


@pytest.mark.parametrize(
    ("frame_type", "length", "fields"),
    [
        (FrameType.HEARTBEAT, 1, {}),
        (FrameType.COMMIT, 31, {}),
        (FrameType.PAGES, MAX_PAGES + 1, {}),
        (FrameType.PAGES, 100, {"flags": 4}),
        (FrameType.STOP, 2, {"epoch": 1}),
        (FrameType.ACK, 0, {"epoch": -1}),
        (FrameType.ACK, 0, {"epoch": 2**64}),
    ],
)
def test_a_frame_against_the_protocol_is_not_made(
    frame_type: FrameType, length: int, fields: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match=frame_type.name):
        encode_frame(frame_type, bytes(length), **fields)


# ---- Parsing ----


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (raw(magic=b"KMRJ"), "begins with b'KMRJ'"),
        (raw(number=0), "unknown type 0"),
        (raw(number=255), "unknown type 255"),
        (raw(reserved=1), "no meaning"),
        (raw(flags=1), "no meaning"),
        (raw(bytes(9), number=FrameType.PAGES, flags=4), "no meaning"),
        (raw(epoch=1), "HEARTBEAT has epoch 1, expected 0"),
        (raw(b"x"), "HEARTBEAT has 1 bytes, expected 0 to 0"),
        (raw(bytes(31), number=FrameType.COMMIT), "COMMIT has 31 bytes, expected 32 to 32"),
        (raw(crc=1), "wrong checksum"),
        (raw(b"{}", number=FrameType.STOP, crc=1), "STOP has a wrong checksum"),
    ],
)
def test_a_bad_frame_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        parse(data)


@pytest.mark.parametrize(
    ("frame_type", "length"),
    [
        (FrameType.HELLO, MAX_JSON + 1),
        (FrameType.PAGES, MAX_PAGES + 1),
        (FrameType.STATE, MAX_STATE + 1),
        (FrameType.STATE, 2**32 - 1),
    ],
)
def test_a_length_beyond_its_limit_is_refused_before_the_payload_comes(
    frame_type: FrameType, length: int
) -> None:
    with pytest.raises(ProtocolError, match=f"{frame_type.name} has {length} bytes"):
        parse(raw(number=frame_type, length=length))


def test_checksum_covers_the_header() -> None:
    data = bytearray(encoded(FrameType.ACK, epoch=5))
    data[12] = 6
    with pytest.raises(ProtocolError, match="checksum"):
        parse(bytes(data))


def test_frames_before_a_breach_are_delivered() -> None:
    frames = Parser().feed(encoded(FrameType.ACK, epoch=5) + b"nonsense" * 3)
    assert next(frames).epoch == 5
    with pytest.raises(ProtocolError):
        next(frames)


@pytest.mark.parametrize("step", [1, 2, 23, 24, 25, 70, 1 << 20])
def test_bytes_may_come_in_any_portions(step: int) -> None:
    stream = b"".join(
        [
            encoded(FrameType.HEARTBEAT),
            encoded(FrameType.PAGES, bytes(range(256)) * 3, flags=2, epoch=1),
            encoded(FrameType.STOP, b"{}"),
        ]
        * 2
    )
    parser = Parser()
    frames: list[Frame] = []
    for first in range(0, len(stream), step):
        frames += parser.feed(stream[first : first + step])
    assert [frame.type for frame in frames] == 2 * [
        FrameType.HEARTBEAT,
        FrameType.PAGES,
        FrameType.STOP,
    ]
    assert frames[1].payload == bytes(range(256)) * 3
    assert not parser.midway


def receive_in_place(stream: bytes, most: int) -> tuple[list[Frame], int]:
    """Feed as a socket would, ``most`` bytes at once; the frames, and the widest buffer offered."""
    parser = Parser()
    frames: list[Frame] = []
    at = widest = 0
    while at < len(stream):
        buffer = parser.buffer()
        widest = max(widest, len(buffer))
        count = min(len(buffer), most, len(stream) - at)
        buffer[:count] = stream[at : at + count]
        frames += parser.filled(count)
        at += count
    return frames, widest


@pytest.mark.parametrize("most", [100, 65536, 1 << 30])
def test_a_large_payload_is_received_in_place(most: int) -> None:
    large = bytes(range(256)) * 4000
    stream = encoded(FrameType.PAGES, large, epoch=3) + encoded(FrameType.ACK, epoch=9)
    frames, widest = receive_in_place(stream, most)
    assert [frame.type for frame in frames] == [FrameType.PAGES, FrameType.ACK]
    assert frames[0].payload == large
    assert widest > 9 * Parser.SCRATCH


def test_midway() -> None:
    parser = Parser()
    assert not parser.midway
    data = encoded(FrameType.STOP, b"{}")
    for end in (1, 24, 25):
        parser = Parser()
        assert list(parser.feed(data[:end])) == []
        assert parser.midway


# ---- JSON ----


def json_frame(payload: bytes) -> Frame:
    return parse(encoded(FrameType.STOP, payload))[0]


@pytest.mark.parametrize(
    "payload",
    [
        b"  ",
        b"[]",
        b"12",
        b"{]",
        b'{"a":1}x',
        b"\xff\xfe",
        b'{"a":1,"a":2}',
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"9" * 10_000 + b"}",
    ],
)
def test_json_that_is_no_valid_object_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="STOP"):
        decode_json(json_frame(payload))


FIELDS: dict[str, Any] = {
    "text": "x",
    "half": "\ud800",
    "integer": 5,
    "yes": True,
    "real": 1.5,
    "list": ["a", "b"],
    "halves": ["\ud800"],
    "numbers": [1, 2],
    "mixed": [1, "a"],
    "truths": [True],
    "object": {"inner": 3},
    "huge": 2**63,
    "negative": -1,
}


def test_fields_of_the_right_type() -> None:
    fields = decode_json(json_frame(encode_json(FIELDS)))
    assert fields.text("text") == "x"
    assert fields.integer("integer") == 5
    assert fields.texts("list") == ("a", "b")
    assert fields.integers("numbers") == (1, 2)
    assert fields.mapping("object") == {"inner": 3}
    assert fields.fields("object").integer("inner") == 3
    assert fields.choice("text", ("x", "y")) == "x"


@pytest.mark.parametrize(
    ("method", "key", "arguments"),
    [
        ("text", "missing", ()),
        ("text", "integer", ()),
        ("text", "half", ()),
        ("integer", "text", ()),
        ("integer", "yes", ()),
        ("integer", "real", ()),
        ("integer", "huge", ()),
        ("integer", "negative", ()),
        ("integer", "integer", (6, 9)),
        ("choice", "text", (("a", "b"),)),
        ("texts", "mixed", ()),
        ("texts", "text", ()),
        ("texts", "halves", ()),
        ("integers", "mixed", ()),
        ("integers", "truths", ()),
        ("mapping", "list", ()),
        ("fields", "text", ()),
    ],
)
def test_fields_of_a_wrong_type_are_refused(
    method: str, key: str, arguments: tuple[Any, ...]
) -> None:
    fields = Fields("STOP", FIELDS)
    with pytest.raises(ProtocolError, match=rf"STOP has .*'{key}'"):
        getattr(fields, method)(key, *arguments)


def test_nested_fields_say_where_they_are() -> None:
    with pytest.raises(ProtocolError, match=r"STOP\.object has no string 'inner'"):
        Fields("STOP", FIELDS).fields("object").text("inner")


def test_json_that_is_too_long_is_not_made() -> None:
    with pytest.raises(ValueError, match="at most"):
        encode_json({"a": "x" * MAX_JSON})


# ---- COMMIT ----


def test_totals_agree_when_both_ends_counted_the_same() -> None:
    here, there = Totals(), Totals()
    for totals in (here, there):
        totals.add(100, 0xDEADBEEF, 3)
        totals.add(50, 5)
    (frame,) = parse(encoded(FrameType.COMMIT, here.pack(12345), epoch=1))
    assert there.compare(frame) == 12345
    assert here.wire_bytes == 150 + 2 * HEADER.size


@pytest.mark.parametrize(
    "frames",
    [
        [(100, 1, 3)],
        [(100, 1, 3), (50, 2, 1), (0, 3, 0)],
        [(50, 2, 1), (100, 1, 3)],
        [(100, 1, 4), (50, 2, 1)],
        [(101, 1, 3), (50, 2, 1)],
        [(100, 9, 3), (50, 2, 1)],
    ],
    ids=["missing", "one more", "order", "pages", "bytes", "content"],
)
def test_totals_differ(frames: list[tuple[int, int, int]]) -> None:
    here, there = Totals(), Totals()
    here.add(100, 1, 3)
    here.add(50, 2, 1)
    for frame in frames:
        there.add(*frame)
    (commit,) = parse(encoded(FrameType.COMMIT, here.pack(0), epoch=4))
    with pytest.raises(ProtocolError, match="COMMIT of epoch 4 does not describe"):
        there.compare(commit)


def test_an_epoch_that_claims_to_be_old_beyond_sense_is_refused() -> None:
    payload = struct.pack("<QQIIQ", 0, 0, 0, 0, MAX_AGE_NS + 1)
    (commit,) = parse(encoded(FrameType.COMMIT, payload))
    with pytest.raises(ProtocolError, match="old"):
        Totals().compare(commit)
    (commit,) = parse(encoded(FrameType.COMMIT, Totals().pack(2**64)))
    assert Totals().compare(commit) == MAX_AGE_NS
