# SPDX-License-Identifier: Apache-2.0
"""Frames of the replication protocol, without I/O.

``docs/protocol.md`` is the law; :data:`SPECS` is its table of frame types.  The header is checked
before anything is allocated for the payload, the checksum before the payload is shown to anyone.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, NoReturn

from checkpoint.errors import ProtocolError
from checkpoint.fields import Fields

VERSIONS = (1,)
"""Versions of the protocol that this code speaks."""

MAGIC = b"KMRI"
HEADER = struct.Struct("<4sBBHIQI")
"""magic, type, flags, reserved, length, epoch, crc32."""

_CRC_OFFSET = HEADER.size - 4
_CRC = struct.Struct("<I")

MAX_JSON = 1 << 20
MAX_PAGES = 8 << 20
MAX_WRITES = 8 << 20
MAX_STATE = 16 << 20
MAX_EPOCH = (1 << 64) - 1

Buffer = bytes | bytearray | memoryview


class FrameType(IntEnum):
    """The ``type`` field of the header."""

    HELLO = 1
    HELLO_ACK = 2
    HEARTBEAT = 3
    ERROR = 4
    PREPARE = 16
    PREPARED = 17
    PAGES = 18
    STATE = 19
    COMMIT = 20
    ACK = 21
    HANDOVER = 22
    RUNNING = 23
    DECLINED = 24
    STOP = 25
    STOPPED = 26
    WRITES = 27
    APPLIED = 28
    ISSUED = 29
    INQUIRE = 32
    OWNER = 33
    STAND_DOWN = 34
    STOOD_DOWN = 35
    ALIVE = 36


class FrameSpec(NamedTuple):
    """What the header of one type of frame may say.

    :ivar sender: who may send it: letters of P, S, C, A as in the document
    :ivar roles: connections that may carry it: letters of R, L
    :ivar epoch: whether the epoch field has a meaning
    :ivar flags: mask of the flag bits that have a meaning
    :ivar kind: "json", "empty", or the name of a binary layout
    :ivar least: least payload, bytes
    :ivar most: greatest payload, bytes
    """

    sender: str
    roles: str
    epoch: bool
    flags: int
    kind: str
    least: int
    most: int


def _json(sender: str, roles: str, *, epoch: bool = False) -> FrameSpec:
    return FrameSpec(sender, roles, epoch, 0, "json", 2, MAX_JSON)


SPECS: dict[FrameType, FrameSpec] = {
    FrameType.HELLO: _json("C", "RL"),
    FrameType.HELLO_ACK: _json("A", "RL"),
    FrameType.HEARTBEAT: FrameSpec("CA", "RL", False, 0, "empty", 0, 0),
    FrameType.ERROR: _json("CA", "RL"),
    FrameType.PREPARE: _json("P", "R"),
    FrameType.PREPARED: _json("S", "R"),
    FrameType.PAGES: FrameSpec("P", "R", True, 0x03, "batch", 9, MAX_PAGES),
    FrameType.STATE: FrameSpec("P", "R", True, 0x07, "state", 8, MAX_STATE),
    FrameType.COMMIT: FrameSpec("P", "R", True, 0, "totals", 32, 32),
    FrameType.ACK: FrameSpec("S", "R", True, 0, "empty", 0, 0),
    FrameType.HANDOVER: _json("P", "R", epoch=True),
    FrameType.RUNNING: _json("S", "R", epoch=True),
    FrameType.DECLINED: _json("S", "R", epoch=True),
    FrameType.STOP: _json("P", "R"),
    FrameType.STOPPED: _json("S", "R"),
    FrameType.WRITES: FrameSpec("P", "R", True, 0, "writes", 40, MAX_WRITES),
    FrameType.APPLIED: FrameSpec("S", "R", True, 0, "applied", 16, 16),
    FrameType.ISSUED: FrameSpec("P", "R", False, 0, "issued", 16, 16),
    FrameType.INQUIRE: _json("CA", "L"),
    FrameType.OWNER: _json("CA", "L"),
    FrameType.STAND_DOWN: _json("CA", "L"),
    FrameType.STOOD_DOWN: _json("CA", "L"),
    FrameType.ALIVE: _json("CA", "L"),
}

_BY_NUMBER = {int(number): (number, spec) for number, spec in SPECS.items()}


class Frame(NamedTuple):
    """One received frame whose header and checksum are right; its payload is still untrusted."""

    type: FrameType
    flags: int
    epoch: int
    crc: int
    payload: memoryview

    @property
    def size(self) -> int:
        """Bytes that the frame took on the wire."""
        return HEADER.size + len(self.payload)


class Head(NamedTuple):
    """A checked header."""

    type: FrameType
    flags: int
    epoch: int
    length: int
    crc: int
    seed: int


def encode_frame(
    frame_type: FrameType, payload: Buffer = b"", *, flags: int = 0, epoch: int = 0
) -> tuple[list[Buffer], int]:
    """The buffers to write for one frame, and its crc32 field.

    The payload is not copied: it is the last of the buffers.

    :raise ValueError: when the frame would break the protocol
    """
    spec = SPECS[frame_type]
    length = len(payload)
    if not spec.least <= length <= spec.most:
        raise ValueError(
            f"{frame_type.name} with {length} bytes, expected {spec.least} to {spec.most}"
        )
    if flags & ~spec.flags:
        raise ValueError(f"{frame_type.name} with flags {flags:#04x}")
    if not 0 <= epoch <= (MAX_EPOCH if spec.epoch else 0):
        raise ValueError(f"{frame_type.name} with epoch {epoch}")
    head = HEADER.pack(MAGIC, frame_type, flags, 0, length, epoch, 0)[:_CRC_OFFSET]
    crc = zlib.crc32(payload, zlib.crc32(head))
    head += _CRC.pack(crc)
    return ([head, payload] if length else [head]), crc


def parse_header(untrusted_header: Buffer) -> Head:
    """Check the 24 bytes of a header.

    :raise ProtocolError: for the first field that is not as the protocol says
    """
    magic, number, flags, reserved, length, epoch, crc = HEADER.unpack(untrusted_header)
    if magic != MAGIC:
        raise ProtocolError(f"a frame begins with {bytes(magic)!r}, expected {MAGIC!r}")
    if number not in _BY_NUMBER:
        raise ProtocolError(f"a frame has the unknown type {number}")
    frame_type, spec = _BY_NUMBER[number]
    if not spec.least <= length <= spec.most:
        raise ProtocolError(
            f"{frame_type.name} has {length} bytes, expected {spec.least} to {spec.most}"
        )
    if reserved or flags & ~spec.flags:
        raise ProtocolError(f"{frame_type.name} has a flag set that has no meaning")
    if epoch and not spec.epoch:
        raise ProtocolError(f"{frame_type.name} has epoch {epoch}, expected 0")
    return Head(frame_type, flags, epoch, length, crc, zlib.crc32(untrusted_header[:_CRC_OFFSET]))


class Parser:
    """Turns received bytes into frames.

    Two ways to feed it: :meth:`feed` with bytes, or :meth:`buffer` and :meth:`filled` for a reader
    that receives in place; then the greater part of a large payload is never copied.

    Holds at most one payload, of at most :data:`MAX_STATE` bytes, and its scratch buffer.
    After a :class:`ProtocolError` the parser must not be used any more.
    """

    SCRATCH = 1 << 16

    def __init__(self) -> None:
        self._scratch = memoryview(bytearray(self.SCRATCH))
        self._header = bytearray()
        self._head: Head | None = None
        self._payload = memoryview(b"")
        self._have = 0

    @property
    def midway(self) -> bool:
        """Whether a frame has begun and not ended."""
        return self._head is not None or bool(self._header)

    def feed(self, data: Buffer) -> Iterator[Frame]:
        """The frames that ``data`` completes.

        :raise ProtocolError: at the first breach; frames before it were yielded
        """
        view = memoryview(data)
        at = 0
        while True:
            if self._head is None:
                if self._header or len(view) - at < HEADER.size:
                    missing = view[at : at + HEADER.size - len(self._header)]
                    self._header += missing
                    at += len(missing)
                    if len(self._header) < HEADER.size:
                        return
                    self._head = parse_header(bytes(self._header))
                    self._header.clear()
                else:
                    self._head = parse_header(view[at : at + HEADER.size])
                    at += HEADER.size
                length = self._head.length
                if len(view) - at >= length:
                    # All of it is here, as of any small frame: one copy, and no buffer to fill.
                    self._payload = memoryview(bytes(view[at : at + length]))
                    at += length
                    yield self._finish()
                    continue
                self._payload = memoryview(bytearray(length))
                self._have = 0
            some = view[at : at + self._head.length - self._have]
            self._payload[self._have : self._have + len(some)] = some
            self._have += len(some)
            at += len(some)
            if self._have < self._head.length:
                return
            yield self._finish()

    def buffer(self) -> memoryview:
        """Where to receive the next bytes to: the payload itself while much of it is missing."""
        if self._head is not None and self._head.length - self._have >= self.SCRATCH:
            return self._payload[self._have :]
        return self._scratch

    def filled(self, count: int) -> Iterator[Frame]:
        """The frames completed by ``count`` bytes received into the last :meth:`buffer`.

        :raise ProtocolError: at the first breach
        """
        if self._head is not None and self._head.length - self._have >= self.SCRATCH:
            self._have += count
            if self._have == self._head.length:
                yield self._finish()
            return
        yield from self.feed(self._scratch[:count])

    def _finish(self) -> Frame:
        head = self._head
        assert head is not None
        if zlib.crc32(self._payload, head.seed) != head.crc:
            raise ProtocolError(f"{head.type.name} has a wrong checksum")
        frame = Frame(head.type, head.flags, head.epoch, head.crc, self._payload.toreadonly())
        self._head = None
        self._payload = memoryview(b"")
        return frame


# ---- JSON payloads ----


def encode_json(value: dict[str, Any]) -> bytes:
    """A JSON payload.

    :raise ValueError: when it is longer than the protocol allows, or holds NaN or infinity
    """
    payload = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    if len(payload) > MAX_JSON:
        raise ValueError(f"a JSON payload of {len(payload)} bytes, at most {MAX_JSON} are allowed")
    return payload


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is not finite")
    return value


def decode_json(frame: Frame) -> Fields:
    """The checked object of a JSON payload.

    :raise ProtocolError: when it is not UTF-8, not JSON, or not one object
    """
    try:
        value = json.loads(
            str(frame.payload, "utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{frame.type.name} holds no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"{frame.type.name} is not a JSON object")
    return Fields(frame.type.name, value)


# ---- WRITES, APPLIED and ISSUED ----

_WRITES_HEAD = struct.Struct("<II")
_OF_A_DISK = struct.Struct("<IIQ")


def pack_writes(disk: int, records: Buffer) -> bytes:
    """The payload of WRITES."""
    return _WRITES_HEAD.pack(disk, 0) + records


def parse_writes(frame: Frame) -> tuple[int, memoryview]:
    """(number of the disk, records, still untrusted) of WRITES.

    :raise ProtocolError: what is reserved is not 0
    """
    disk, reserved = _WRITES_HEAD.unpack_from(frame.payload)
    if reserved:
        raise ProtocolError("WRITES has a bit set that has no meaning")
    return disk, frame.payload[_WRITES_HEAD.size :]


def pack_applied(disk: int, batches: int) -> bytes:
    """The payload of APPLIED."""
    return _OF_A_DISK.pack(disk, 0, batches)


def parse_applied(frame: Frame) -> tuple[int, int]:
    """(number of the disk, WRITES frames of it on stable storage) of APPLIED.

    :raise ProtocolError: what is reserved is not 0
    """
    return _of_a_disk(frame)


def pack_issued(disk: int, position: int) -> bytes:
    """The payload of ISSUED."""
    return _OF_A_DISK.pack(disk, 0, position)


def parse_issued(frame: Frame) -> tuple[int, int]:
    """(number of the disk, bytes of its records that are on the shared target) of ISSUED.

    :raise ProtocolError: what is reserved is not 0
    """
    return _of_a_disk(frame)


def _of_a_disk(frame: Frame) -> tuple[int, int]:
    disk, reserved, number = _OF_A_DISK.unpack(frame.payload)
    if reserved:
        raise ProtocolError(f"{frame.type.name} has a bit set that has no meaning")
    return disk, number


# ---- COMMIT ----

_TOTALS = struct.Struct("<QQIIQ")
MAX_AGE_NS = 3600 * 10**9


@dataclass(slots=True)
class Totals:
    """What COMMIT says of an epoch; each end counts for itself with :meth:`add`.

    :ivar pages: pages in all PAGES frames
    :ivar size: bytes of payload of all PAGES, WRITES and STATE frames
    :ivar frames: number of those frames
    :ivar digest: CRC-32 over their crc32 fields
    """

    pages: int = 0
    size: int = 0
    frames: int = 0
    digest: int = 0

    @property
    def wire_bytes(self) -> int:
        """Bytes of those frames with their headers."""
        return self.size + self.frames * HEADER.size

    def add(self, length: int, crc: int, pages: int = 0) -> None:
        """Count one frame with ``length`` bytes of payload."""
        self.pages += pages
        self.size += length
        self.frames += 1
        self.digest = zlib.crc32(_CRC.pack(crc), self.digest)

    def pack(self, age_ns: int) -> bytes:
        """The payload of COMMIT; ``age_ns`` is the time since the guest was paused."""
        age_ns = min(age_ns, MAX_AGE_NS)
        return _TOTALS.pack(self.pages, self.size, self.frames, self.digest, age_ns)

    def compare(self, frame: Frame) -> int:
        """Check a COMMIT against what was counted; its ``age`` in nanoseconds.

        :raise ProtocolError: when they differ
        """
        *untrusted_totals, age = _TOTALS.unpack(frame.payload)
        mine = [self.pages, self.size, self.frames, self.digest]
        if untrusted_totals != mine:
            raise ProtocolError(
                f"COMMIT of epoch {frame.epoch} does not describe the frames that came: "
                f"{untrusted_totals} (pages, bytes, frames, digest), expected {mine}"
            )
        if age > MAX_AGE_NS:
            raise ProtocolError(f"COMMIT of epoch {frame.epoch} says that it is {age} ns old")
        return int(age)
