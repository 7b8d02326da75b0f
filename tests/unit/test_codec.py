# SPDX-License-Identifier: Apache-2.0
"""Pages and states, coded and decoded."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable
from pathlib import Path

import lz4.block
import pytest
import zstandard

from checkpoint.codec import COMPRESSIONS, MAX_BATCH_PAGES, Coded, Decoder, Encoder
from checkpoint.driver import PAGE_SIZE, Staging
from checkpoint.errors import ProtocolError
from checkpoint.wire import MAX_PAGES, MAX_STATE

PAGES = 64
NOISE = random.Random(7)


def staged(pages: Iterable[tuple[int, bytes]]) -> Staging:
    content = list(pages)
    staging = Staging(max(1, len(content)))
    for place, (gfn, page) in enumerate(content):
        staging.gfns[place] = gfn
        staging.data[place * PAGE_SIZE : (place + 1) * PAGE_SIZE] = page.ljust(PAGE_SIZE, b"\0")
    staging.count = len(content)
    return staging


def shell(pages: int = PAGES) -> memoryview:
    """Memory as a toolstack leaves it: not zero."""
    return memoryview(bytearray(b"\xcc" * (pages * PAGE_SIZE)))


def take(decoder: Decoder, batches: Iterable[Coded], memory: memoryview) -> int:
    pages = 0
    for coded in batches:
        batch = decoder.verify(coded.flags, coded.payload)
        assert batch.pages == coded.pages
        decoder.apply(batch, memory)
        pages += batch.pages
    return pages


def page_of(memory: memoryview, gfn: int) -> bytes:
    return bytes(memory[gfn * PAGE_SIZE : (gfn + 1) * PAGE_SIZE])


# ---- Pages ----


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("batch_pages", [1, 7, 256])
def test_pages_arrive_whatever_their_content(compression: str, batch_pages: int) -> None:
    encoder, decoder, memory = Encoder(PAGES, compression=compression), Decoder(PAGES), shell()
    guest = [b"", b"text " * 800, NOISE.randbytes(PAGE_SIZE), b"\0" * 4095 + b"\1"] * 16
    guest = [page.ljust(PAGE_SIZE, b"\0") for page in guest]
    for gfns in (range(PAGES), range(0, PAGES, 3), [5, 4, 3]):
        for gfn in gfns:
            page = bytearray(guest[gfn])
            page[gfn % 500 * 8] ^= 0xFF
            guest[gfn] = bytes(page)
        staging = staged((gfn, guest[gfn]) for gfn in gfns)
        assert take(decoder, encoder.encode(staging, batch_pages), memory) == len(gfns)
        for gfn in gfns:
            assert page_of(memory, gfn) == guest[gfn]
    figures = encoder.figures
    assert figures.raw_bytes == (64 + 22 + 3) * PAGE_SIZE
    assert figures.zero + figures.delta + figures.raw == 64 + 22 + 3


def test_unchanged_pages_cost_nothing() -> None:
    encoder = Encoder(PAGES)
    pages = [(gfn, NOISE.randbytes(PAGE_SIZE)) for gfn in range(PAGES)]
    assert len(list(encoder.encode(staged(pages)))) == 1
    before = encoder.figures.copy()
    assert list(encoder.encode(staged(pages))) == []
    assert encoder.figures.unchanged == before.unchanged + PAGES
    assert encoder.figures.coded_bytes == before.coded_bytes


def test_an_empty_staging_gives_no_batches() -> None:
    assert list(Encoder(PAGES).encode(staged([]))) == []


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("batch_pages", [1, 16, MAX_BATCH_PAGES])
def test_incompressible_pages_cost_at_most_two_per_cent_more(
    compression: str, batch_pages: int
) -> None:
    pages = MAX_BATCH_PAGES
    encoder = Encoder(pages, compression=compression)
    staging = Staging(pages)
    staging.data[:] = NOISE.randbytes(pages * PAGE_SIZE)
    for gfn in range(pages):
        staging.gfns[gfn] = gfn
    staging.count = pages
    size = 0
    for coded in encoder.encode(staging, batch_pages):
        assert coded.flags == 0
        assert len(coded.payload) <= MAX_PAGES
        assert len(coded.payload) <= coded.pages * (PAGE_SIZE + 8) + 32
        size += len(coded.payload) + 24
    assert size <= 1.02 * pages * PAGE_SIZE


def test_small_changes_cost_little() -> None:
    encoder = Encoder(PAGES)
    content = [NOISE.randbytes(PAGE_SIZE) for _ in range(PAGES)]
    list(encoder.encode(staged(enumerate(content))))
    changed = [page[:800] + NOISE.randbytes(16) + page[816:] for page in content]
    (coded,) = encoder.encode(staged(enumerate(changed)))
    assert len(coded.payload) <= PAGES * 40 + 8
    assert encoder.figures.delta == PAGES


def test_a_reference_that_is_smaller_than_the_guest_forgets_what_is_of_no_use() -> None:
    pages, room, busy = 64, 16, 4
    encoder, decoder = Encoder(pages, reference_pages=room), Decoder(pages)
    memory = shell(pages)
    for epoch in range(1, 12):
        # Some pages change a little in each epoch, all others now and then, and some are zero.
        others = range(busy + epoch % 4, pages, 4)
        written = {gfn: NOISE.randbytes(PAGE_SIZE) if gfn % 8 else b"" for gfn in others}
        written |= {gfn: b"busy" * 900 + bytes([epoch]) for gfn in range(busy)}
        take(decoder, encoder.encode(staged(written.items()), batch_pages=8), memory)
        for gfn, page in written.items():
            assert page_of(memory, gfn) == page.ljust(PAGE_SIZE, b"\0")
        assert encoder.held <= room
        kept = (page_of(encoder._reference, gfn) for gfn in range(pages))
        assert sum(any(page) for page in kept) <= room
    assert encoder.figures.forgotten > 0
    assert encoder.figures.delta > 8 * busy


def test_zero_pages_take_no_memory() -> None:
    encoder = Encoder(PAGES)
    list(encoder.encode(staged((gfn, b"") for gfn in range(PAGES))))
    assert encoder.held == 0
    assert encoder.figures.zero == PAGES


def test_a_guest_may_have_more_memory_than_this_host() -> None:
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    pages = 2 * sum(int(memory[name].split()[0]) for name in ("MemTotal", "SwapTotal")) // 4
    encoder = Encoder(pages, reference_pages=10)
    content = random.Random(1).randbytes(PAGE_SIZE)
    assert sum(coded.pages for coded in encoder.encode(staged([(pages - 1, content)]))) == 1
    assert list(encoder.encode(staged([(pages - 1, content)]))) == []
    encoder.close()


def test_a_reference_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        Encoder(PAGES, reference_pages=0)


def test_pages_that_backends_write_too_are_sent_whole() -> None:
    encoder, decoder, memory = Encoder(PAGES, whole=[3]), Decoder(PAGES), shell()
    for counter in range(3):
        memory[3 * PAGE_SIZE : 3 * PAGE_SIZE + 6] = b"writes"
        page = b"ring" + bytes([counter])
        take(decoder, encoder.encode(staged([(3, page)])), memory)
        assert page_of(memory, 3) == page.ljust(PAGE_SIZE, b"\0")
    assert encoder.figures.raw == 3


@pytest.mark.parametrize("gfn", [-1, PAGES])
def test_a_whole_page_outside_of_the_guest_is_refused(gfn: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        Encoder(PAGES, whole=[gfn])


def test_a_staged_frame_outside_of_the_guest_is_refused() -> None:
    with pytest.raises(IndexError, match="frame 64 is outside"):
        list(Encoder(PAGES).encode(staged([(PAGES, b"x")])))


def test_unknown_compression_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of none, lz4, zstd"):
        Encoder(PAGES, compression="gzip")


@pytest.mark.parametrize("batch_pages", [0, MAX_BATCH_PAGES + 1])
def test_batches_beyond_the_limit_are_refused(batch_pages: int) -> None:
    with pytest.raises(ValueError, match="1 to 2040"):
        list(Encoder(PAGES).encode(staged([(0, b"x")]), batch_pages))


def test_levels_of_zstd() -> None:
    page = b"".join(str(number).encode() for number in range(2000))[:PAGE_SIZE]
    sizes = [
        len(next(Encoder(PAGES, compression="zstd", level=level).encode(staged([(0, page)])))[1])
        for level in (1, 19)
    ]
    assert sizes[1] < sizes[0] < PAGE_SIZE / 2


# ---- Hostile batches ----


def batch(count: int, length: int, coded: bytes) -> bytes:
    return struct.pack("<II", count, length) + coded


ZERO_0 = bytes(8)
RAW_0 = (512 << 48 | 1 << 60).to_bytes(8, "little") + b"r" * PAGE_SIZE
NO_SIZE = zstandard.ZstdCompressor(write_content_size=False)

BAD_BATCHES = {
    "no prefix": (0, b"\1\0\0\0\0\0\0"),
    "no pages": (0, batch(0, 0, b"")),
    "too many pages": (0, batch(2041, 2041 * 8, bytes(2041 * 8))),
    "body too short for its pages": (0, batch(2, 8, ZERO_0)),
    "body too long for its pages": (0, batch(1, 4105, bytes(4105))),
    "stored body shorter than it says": (0, batch(1, 16, ZERO_0)),
    "stored body longer than it says": (0, batch(2, 16, ZERO_0 * 3)),
    "fewer records than it says": (0, batch(2, len(RAW_0), RAW_0)),
    "more records than it says": (0, batch(1, 16, ZERO_0 * 2)),
    "a record against the format": (0, batch(1, 8, b"\xff" * 8)),
    "unknown compression": (3, batch(1, 8, ZERO_0)),
    "no lz4": (1, batch(1, 8, b"\xff" * 20)),
    "lz4 of nothing": (1, batch(1, 8, b"")),
    "lz4 that is longer": (1, batch(1, 8, lz4.block.compress(bytes(9000), store_size=False))),
    "lz4 that is shorter": (1, batch(2, 24, lz4.block.compress(bytes(16), store_size=False))),
    "lz4 with a length prefix": (1, batch(1, 4000, lz4.block.compress(bytes(4000)))),
    "no zstd": (2, batch(1, 8, b"\xff" * 20)),
    "zstd of another length": (2, batch(1, 8, zstandard.compress(bytes(9000)))),
    "zstd without its length": (2, batch(1, 8, NO_SIZE.compress(bytes(8)))),
    "zstd cut short": (2, batch(1, 4104, zstandard.compress(RAW_0)[:-3])),
    "zstd bomb": (2, batch(1, 4104, zstandard.compress(bytes(1 << 28)))),
}


@pytest.mark.parametrize(("flags", "payload"), BAD_BATCHES.values(), ids=BAD_BATCHES.keys())
def test_bad_batch_is_refused(flags: int, payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        Decoder(PAGES).verify(flags, payload)


def test_good_batches_by_hand() -> None:
    decoder = Decoder(PAGES)
    assert decoder.verify(0, batch(2, 8 + len(RAW_0), ZERO_0 + RAW_0)).pages == 2
    packed = lz4.block.compress(RAW_0, store_size=False)
    assert decoder.verify(1, batch(1, len(RAW_0), packed)).body == RAW_0
    assert decoder.verify(2, batch(1, len(RAW_0), zstandard.compress(RAW_0))).body == RAW_0


def test_memory_of_another_size_is_refused() -> None:
    decoder = Decoder(PAGES)
    verified = decoder.verify(0, batch(1, 8, ZERO_0))
    with pytest.raises(ValueError, match="for a guest of 64 pages"):
        decoder.apply(verified, shell(PAGES - 1))


# ---- States ----


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_states_arrive(compression: str) -> None:
    encoder, decoder = Encoder(1, compression=compression), Decoder(1)
    base = NOISE.randbytes(6000)
    states = [base, base[:-1] + b"x", b"", b"", b"short", base, base]
    for state in states:
        coded = encoder.encode_state(state)
        assert decoder.decode_state(coded.flags, coded.payload) == state


def test_a_state_that_changed_little_costs_little() -> None:
    encoder = Encoder(1)
    base = NOISE.randbytes(6000)
    assert len(encoder.encode_state(base).payload) > 6000
    coded = encoder.encode_state(base[:100] + b"change" + base[106:])
    assert len(coded.payload) < 100


def test_a_state_that_is_too_long_is_not_coded() -> None:
    with pytest.raises(ValueError, match="at most 16777208"):
        Encoder(1).encode_state(bytes(MAX_STATE))


@pytest.mark.parametrize(
    ("flags", "payload"),
    [
        (0, b"\0" * 7),
        (0, struct.pack("<II", MAX_STATE + 1, 0)),
        (1, struct.pack("<II", 2**32 - 1, 0) + b"\0"),
        (0, struct.pack("<II", 0, 1)),
        (0, struct.pack("<II", 5, 0) + b"four"),
        (4, struct.pack("<II", 4, 0) + b"four"),
        (3, struct.pack("<II", 4, 0) + b"four"),
    ],
)
def test_bad_state_is_refused(flags: int, payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        Decoder(1).decode_state(flags, payload)


def test_a_difference_to_a_state_of_another_length_is_refused() -> None:
    decoder = Decoder(1)
    decoder.decode_state(0, struct.pack("<II", 4, 0) + b"four")
    with pytest.raises(ProtocolError, match="never came"):
        decoder.decode_state(4, struct.pack("<II", 5, 0) + b"fives")
