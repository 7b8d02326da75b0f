# SPDX-License-Identifier: Apache-2.0
"""The bitmap of what may differ between two hosts: ``docs/disk.md`` has format and argument.

While a disk is served, its server writes the file; this module makes it, reads it when a disk is
to be copied anew, and turns bits into runs for the other host.
"""

from __future__ import annotations

import re
import struct
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from diskbuffer import durable
from diskbuffer.errors import BitmapError

SHIFT = 16
"""A chunk has 64 KiB unless the header says otherwise."""

HEADER_BYTES = 4096
BLOCK_BYTES = 4096
MAX_RUNS = 10_000
"""Runs that a host sends at most."""

_HEADER = struct.Struct("<8sIIQQ16s16sI")
_CRC = struct.Struct("<I")
_MAGIC = b"KMRIBMAP"
_VERSION = 1
_RUN = re.compile(rb"\xff+|[^\x00\xff]")

Run = tuple[int, int]
"""First chunk and number of chunks."""


@dataclass(slots=True)
class Bitmap:
    """A bitmap in memory.

    :ivar size: of the disk, bytes
    :ivar pair: UUID of the pair of copies that it compares, as text
    :ivar peer: UUID of the other host, as text
    :ivar generation: of the guest, when it was made
    :ivar bits: lowest bit of the first byte first, a whole number of blocks
    """

    size: int
    pair: str
    peer: str
    generation: int = 0
    shift: int = SHIFT
    bits: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        if not self.bits:
            self.bits = bytearray(body_bytes(self.size, self.shift))

    @property
    def chunks(self) -> int:
        """How many chunks the disk has."""
        return chunk_count(self.size, self.shift)

    def fill(self) -> None:
        """Set all bits: everything has to be copied."""
        self.add([(0, self.chunks)])

    def add(self, runs: Iterable[Run]) -> None:
        """Set the bits of ``runs``.

        :raise BitmapError: one is not of this disk
        """
        for first, count in runs:
            if count < 1 or first < 0 or first + count > self.chunks:
                raise BitmapError(
                    f"a run of {count} chunks at {first} is not of a disk of {self.chunks}"
                )
            end = first + count
            whole_first, whole_end = -(-first // 8), end // 8
            if whole_first < whole_end:
                self.bits[whole_first:whole_end] = b"\xff" * (whole_end - whole_first)
            for number in (
                *range(first, min(end, whole_first * 8)),
                *range(max(first, whole_end * 8), end),
            ):
                self.bits[number // 8] |= 1 << number % 8

    def runs(self, most: int = MAX_RUNS) -> list[Run]:
        """All set bits as runs, ascending; above ``most`` those nearest to each other join."""
        found: list[list[int]] = []
        for match in _RUN.finditer(self.bits):
            byte = self.bits[match.start()]
            start, length = match.start() * 8, len(match.group()) * 8
            pieces = (
                [(start, start + length)]
                if byte == 0xFF
                else [(start + bit, start + bit + 1) for bit in range(8) if byte >> bit & 1]
            )
            for first, end in pieces:
                if found and found[-1][1] == first:
                    found[-1][1] = end
                else:
                    found.append([first, end])
        found = [[first, min(end, self.chunks)] for first, end in found if first < self.chunks]
        if len(found) > most:
            found = _join(found, most)
        return [(first, end - first) for first, end in found]

    def count(self) -> int:
        """How many bits are set."""
        return sum(count for _, count in self.runs(self.chunks + 1))

    def save(self, path: Path) -> None:
        """Write the file, durably, in the place of the one that is there.

        :raise BitmapError: it cannot be written
        """
        head = _HEADER.pack(
            _MAGIC,
            _VERSION,
            self.shift,
            self.size,
            self.generation,
            uuid.UUID(self.pair).bytes,
            uuid.UUID(self.peer).bytes,
            0,
        )
        head += _CRC.pack(zlib.crc32(head))
        try:
            durable.replace(path, [head.ljust(HEADER_BYTES, b"\0"), self.bits])
        except OSError as error:
            raise BitmapError(f"{path} cannot be written: {error.strerror}") from error


def chunk_count(size: int, shift: int) -> int:
    """How many chunks a disk of ``size`` bytes has."""
    return (size + (1 << shift) - 1) >> shift


def body_bytes(size: int, shift: int) -> int:
    """Bytes of bits in the file."""
    return -(-chunk_count(size, shift) // (8 * BLOCK_BYTES)) * BLOCK_BYTES


def load(path: Path, size: int) -> Bitmap | None:
    """The bitmap in a file; None when there is none.

    :param size: of the disk that it must be of, bytes
    :raise BitmapError: it is damaged, or of another disk
    """
    try:
        with path.open("rb") as file:
            untrusted_head = file.read(HEADER_BYTES)
            bits = bytearray(file.read(body_bytes(size, 12) + 1))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BitmapError(f"{path} cannot be read: {error.strerror}") from error
    if len(untrusted_head) != HEADER_BYTES:
        raise BitmapError(f"{path} is too short for a bitmap")
    magic, version, shift, told, generation, pair, peer, _ = _HEADER.unpack_from(untrusted_head)
    crc = zlib.crc32(untrusted_head[: _HEADER.size])
    if (
        magic != _MAGIC
        or version != _VERSION
        or _CRC.unpack_from(untrusted_head, _HEADER.size) != (crc,)
    ):
        raise BitmapError(f"The header of {path} is damaged")
    if not 12 <= shift <= 30:
        raise BitmapError(f"{path} has chunks of 2^{shift} bytes, expected 2^12 to 2^30")
    if told != size:
        raise BitmapError(f"{path} is of a disk of {told} bytes, expected {size}")
    if len(bits) != body_bytes(size, shift):
        raise BitmapError(f"{path} has {len(bits)} bytes of bits, expected another number")
    return Bitmap(
        size, str(uuid.UUID(bytes=pair)), str(uuid.UUID(bytes=peer)), generation, shift, bits
    )


def _join(runs: list[list[int]], most: int) -> list[list[int]]:
    """Join neighbours, smallest gaps first, until ``most`` are left."""
    gaps = sorted(range(len(runs) - 1), key=lambda i: runs[i + 1][0] - runs[i][1])
    joined = set(gaps[: len(runs) - most])
    result = [list(runs[0])]
    for place, (_, after) in enumerate(pairwise(runs)):
        if place in joined:
            result[-1][1] = after[1]
        else:
            result.append(list(after))
    return result
