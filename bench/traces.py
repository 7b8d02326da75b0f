# SPDX-License-Identifier: Apache-2.0
"""Page traces: what a guest changed between two checkpoints, as it was and as it became.

Two kinds.  *Recorded* ones come from a real guest (``bench/record.py`` in a Dom0); *synthetic* ones
are made here and carry that in their name.

A trace file is one zstd frame around the little-endian form that ``bench/loops.c`` reads, in which
each page "as it became" is XORed with the page "as it was", and each page "as it was" with what the
trace last said of that frame: almost all of it is then zero.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import zstandard

PAGE: Final = 4096
_HEAD = struct.Struct("<QQ")
_COUNT = struct.Struct("<Q")
_MAGIC: Final = b"KTRACE01"
#: Bytes of the largest trace that is read.
_MOST: Final = 1 << 30

Change = tuple[int, bytes, bytes]
"""Frame number, the page as it was, the page as it became."""


@dataclass(slots=True)
class Trace:
    """What a guest changed.

    :ivar pages: the guest's size
    :ivar epochs: the changes of each epoch, ascending by frame
    """

    pages: int
    epochs: list[list[Change]] = field(default_factory=list)

    @property
    def changes(self) -> int:
        """Pages in all epochs together."""
        return sum(map(len, self.epochs))

    def plain(self) -> bytes:
        """The form that ``bench/loops.c`` reads."""
        return self._form(lambda gfn, old, new: (old, new))

    def save(self, path: Path) -> None:
        """Write the trace, compressed as well as it can be."""
        last: dict[int, bytes] = {}

        def differences(gfn: int, old: bytes, new: bytes) -> tuple[bytes, bytes]:
            was = last.get(gfn)
            last[gfn] = new
            return (old if was is None else _xor(old, was)), _xor(new, old)

        path.write_bytes(
            zstandard.ZstdCompressor(level=19).compress(_MAGIC + self._form(differences))
        )

    def _form(self, pair: Callable[[int, bytes, bytes], tuple[bytes, bytes]]) -> bytes:
        out = [_HEAD.pack(self.pages, len(self.epochs))]
        for epoch in self.epochs:
            out.append(_COUNT.pack(len(epoch)))
            out += [_COUNT.pack(gfn) for gfn, _, _ in epoch]
            pairs = [pair(*change) for change in epoch]
            out += [old for old, _ in pairs]
            out += [new for _, new in pairs]
        return b"".join(out)


def load(path: Path) -> Trace:
    """Read a trace file.

    :raise ValueError: it is none
    """
    try:
        raw = zstandard.ZstdDecompressor().decompress(path.read_bytes(), max_output_size=_MOST)
    except zstandard.ZstdError as error:
        raise ValueError(f"{path} is no trace: {error}") from error
    if raw[:8] != _MAGIC:
        raise ValueError(f"{path} is no trace: it begins with {raw[:8]!r}, expected {_MAGIC!r}")
    pages, epochs = _HEAD.unpack_from(raw, 8)
    trace, at = Trace(pages), 8 + _HEAD.size
    last: dict[int, bytes] = {}
    for _ in range(epochs):
        (count,) = _COUNT.unpack_from(raw, at)
        at += 8
        gfns = struct.unpack_from(f"<{count}Q", raw, at)
        at += 8 * count
        epoch: list[Change] = []
        for place, gfn in enumerate(gfns):
            old = raw[at + place * PAGE : at + (place + 1) * PAGE]
            if gfn in last:
                old = _xor(old, last[gfn])
            new = _xor(raw[at + (count + place) * PAGE : at + (count + place + 1) * PAGE], old)
            last[gfn] = new
            epoch.append((gfn, old, new))
        at += 2 * count * PAGE
        trace.epochs.append(epoch)
    if at != len(raw):
        raise ValueError(f"{path} is no trace: {len(raw)} bytes, expected {at}")
    return trace


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(
        len(one), "little"
    )


# ---- Synthetic traces ----

_Maker = Callable[[random.Random], tuple[bytes, bytes]]


def _same(noise: random.Random) -> tuple[bytes, bytes]:
    page = noise.randbytes(PAGE)
    return page, page


def _one_byte(noise: random.Random) -> tuple[bytes, bytes]:
    old = noise.randbytes(PAGE)
    new = bytearray(old)
    new[noise.randrange(PAGE)] ^= 0x11
    return old, bytes(new)


EXAMPLE_OLD: Final = bytes.fromhex("05060708090a0b0c0d0e0f101112136800006b006d")
EXAMPLE_NEW: Final = bytes.fromhex("0102030405060708090a0b0c0d0e0f680000670069")


def example() -> tuple[bytes, bytes]:
    """The page that QEMU's description of XBZRLE has as its example; 24 bytes in that format."""
    return (bytes(1001) + EXAMPLE_OLD + bytes(3074), bytes(1001) + EXAMPLE_NEW + bytes(3074))


def _run(noise: random.Random) -> tuple[bytes, bytes]:
    old, new = bytearray(PAGE), bytearray(PAGE)
    length = noise.randrange(PAGE - 1006)
    old[1000 : 1000 + length] = noise.randbytes(length)
    new[1000 : 1000 + length] = bytes((byte + 4) % 256 for byte in old[1000 : 1000 + length])
    return bytes(old), bytes(new)


def _every_second_byte(noise: random.Random) -> tuple[bytes, bytes]:
    return bytes(PAGE), b"\1\0" * (PAGE // 2)


def _words(noise: random.Random) -> tuple[bytes, bytes]:
    old = noise.randbytes(PAGE)
    new = bytearray(old)
    for _ in range(noise.randrange(1, 24)):
        at = noise.randrange(PAGE // 8) * 8
        new[at : at + 8] = noise.randbytes(8)
    return old, bytes(new)


def _all(noise: random.Random) -> tuple[bytes, bytes]:
    return noise.randbytes(PAGE), noise.randbytes(PAGE)


def _zeroed(noise: random.Random) -> tuple[bytes, bytes]:
    return noise.randbytes(PAGE), bytes(PAGE)


SYNTHETIC: Final[dict[str, Sequence[_Maker]]] = {
    # The kinds of pages in QEMU's own description and tests of XBZRLE, as many of each: unchanged,
    # one byte, the example, one run of any length, and one that overflows.
    "synthetic-qemu-examples": (
        _same, _one_byte, lambda noise: example(), _run, _every_second_byte,
    ),
    "synthetic-few-words": (_words,),
    "synthetic-rewritten": (_all,),
    "synthetic-zeroed": (_zeroed,),
}  # fmt: skip


def synthetic(name: str, pages: int = 1 << 18, changes: int = 2048, epochs: int = 8) -> Trace:
    """A trace made by one of :data:`SYNTHETIC`, the same each time.

    :raise KeyError: there is none of that name
    """
    makers, noise = SYNTHETIC[name], random.Random(name)
    trace = Trace(pages)
    for _ in range(epochs):
        gfns = sorted(noise.sample(range(pages), changes // epochs))
        trace.epochs.append(
            [(gfn, *makers[place % len(makers)](noise)) for place, gfn in enumerate(gfns)]
        )
    return trace
