# SPDX-License-Identifier: Apache-2.0
"""Records of a disk's changes, without I/O: the format of ``docs/disk.md``.

What comes from another host is hostile: every length is checked before it is used, and a batch is
checked whole before any of it is shown to anyone.
"""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from diskbuffer.errors import RecordError

Buffer = bytes | bytearray | memoryview

HEAD = struct.Struct("<BBHIQQII")
"""kind, flags, reserved, length, offset, extent, reserved, crc32."""

MAX_PAYLOAD = 1 << 20
"""Bytes of payload of one record."""

EPOCH_BYTES: Final = 128 << 20
"""Bytes of records of one disk in one epoch, at most."""

QUEUE_BYTES: Final = EPOCH_BYTES // 2
"""Bytes that a server's queue may have: one epoch may have all of it, and what is in the socket."""

_CRC_OFFSET = HEAD.size - 4
_CRC = struct.Struct("<I")


class Kind(IntEnum):
    """What a record says."""

    #: The payload is written.
    WRITE = 1
    #: The range becomes zeros.
    ZERO = 2
    #: What came before is on stable storage before what comes after is done.
    FLUSH = 3
    #: No change: the payload is what a shared target holds there.
    SEEN = 4


class Flags(IntFlag):
    """How a record is meant."""

    #: The zeros may be a hole.
    PUNCH = 1
    #: Copied because the standby lacked it, not written by the guest.
    SYNC = 2


_ALLOWED = {Kind.WRITE: 2, Kind.ZERO: 3, Kind.FLUSH: 0, Kind.SEEN: 0}
_WITH_PAYLOAD = (Kind.WRITE, Kind.SEEN)
_BY_NUMBER = {int(kind): kind for kind in Kind}


class Record(NamedTuple):
    """One change.

    :ivar offset: byte of the disk at which it begins
    :ivar extent: bytes of the disk that change
    :ivar payload: what is written, or was read, there; empty unless ``kind`` is WRITE or SEEN
    """

    kind: Kind
    flags: int
    offset: int
    extent: int
    payload: Buffer = b""


def encode(record: Record) -> bytes:
    """A record as bytes.

    :raise RecordError: it would break the format
    """
    head = HEAD.pack(
        record.kind, record.flags, 0, len(record.payload), record.offset, record.extent, 0, 0
    )[:_CRC_OFFSET]
    crc = zlib.crc32(record.payload, zlib.crc32(head))
    data = head + _CRC.pack(crc) + bytes(record.payload)
    parse(data, record.offset + record.extent, shared=True)
    return data


def parse(untrusted_batch: Buffer, size: int, *, shared: bool = False) -> list[Record]:
    """The records of a batch, all of them checked; their payloads are views of it.

    :param size: of the disk, bytes
    :param shared: whether the disk is in shared mode, which alone has SEEN records
    :raise RecordError: at the first that is not as the format says, or not whole
    """
    view = memoryview(untrusted_batch).toreadonly()
    records = []
    at = 0
    while at < len(view):
        if len(view) - at < HEAD.size:
            raise RecordError(f"a batch ends with {len(view) - at} bytes that are no record")
        number, flags, reserved, length, offset, extent, more, crc = HEAD.unpack_from(view, at)
        kind = _BY_NUMBER.get(number)
        if kind is None or (kind is Kind.SEEN and not shared):
            raise RecordError(f"a record has the unknown kind {number}")
        if reserved or more or flags & ~_ALLOWED[kind]:
            raise RecordError(f"a {kind.name} record has a bit set that has no meaning")
        if length != (extent if kind in _WITH_PAYLOAD else 0) or length > MAX_PAYLOAD:
            raise RecordError(f"a {kind.name} record of {extent} bytes has {length} of payload")
        if kind is Kind.FLUSH:
            if offset or extent:
                raise RecordError("a FLUSH record has a range, expected none")
        elif extent == 0 or offset + extent > size:
            raise RecordError(
                f"a {kind.name} record is of {extent} bytes at {offset}, on a disk of {size}"
            )
        end = at + HEAD.size + length
        if end > len(view):
            raise RecordError(f"a {kind.name} record is cut short")
        payload = view[at + HEAD.size : end]
        if zlib.crc32(payload, zlib.crc32(view[at : at + _CRC_OFFSET])) != crc:
            raise RecordError(f"a {kind.name} record at byte {offset} has a wrong checksum")
        records.append(Record(kind, flags, offset, extent, payload))
        at = end
    return records


def whole(data: Buffer) -> int:
    """How many bytes at the beginning of ``data`` are whole records; their contents unchecked.

    :raise RecordError: a length is impossible, so that no boundary can be told any more
    """
    at = 0
    while len(data) - at >= HEAD.size:
        length = HEAD.unpack_from(data, at)[3]
        if length > MAX_PAYLOAD:
            raise RecordError(f"a record has {length} bytes of payload, at most {MAX_PAYLOAD}")
        if at + HEAD.size + length > len(data):
            break
        at += HEAD.size + length
    return at
