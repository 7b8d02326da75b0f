# SPDX-License-Identifier: Apache-2.0
"""Any history of a guest arrives; anything else is refused without harm."""

from __future__ import annotations

import random
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.codec import COMPRESSIONS, Coded, Decoder, Encoder, Verified
from checkpoint.driver import PAGE_SIZE, Staging
from checkpoint.errors import ProtocolError
from checkpoint.wire import MAX_PAGES, MAX_STATE

PAGES = 12
KINDS = ("same", "word", "stretch", "zero", "noise")


def changed(page: bytes, kind: str, seed: int) -> bytes:
    noise = random.Random(seed)
    content = bytearray(page)
    if kind == "word":
        content[noise.randrange(PAGE_SIZE)] ^= noise.randrange(256)
    elif kind == "stretch":
        first = noise.randrange(PAGE_SIZE)
        content[first : first + noise.randrange(PAGE_SIZE - first)] = b""
        content += noise.randbytes(PAGE_SIZE - len(content))
    elif kind == "zero":
        content = bytearray(PAGE_SIZE)
    elif kind == "noise":
        content = bytearray(noise.randbytes(PAGE_SIZE))
    return bytes(content)


touches = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.sampled_from(KINDS), st.integers(0, 99)),
    max_size=PAGES,
    unique_by=lambda touch: touch[0],
)


@settings(max_examples=60)
@given(
    st.lists(touches, min_size=1, max_size=5),
    st.lists(st.binary(max_size=40), min_size=5, max_size=5),
    st.sampled_from(COMPRESSIONS),
    st.integers(1, PAGES),
    st.sets(st.integers(0, PAGES - 1), max_size=2),
    st.integers(0, 4),
)
def test_any_history_arrives_epoch_by_epoch(
    history: list[list[tuple[int, str, int]]],
    states: list[bytes],
    compression: str,
    batch_pages: int,
    whole: set[int],
    cut: int,
) -> None:
    """Epochs are verified first and applied whole; the one at ``cut`` is dropped halfway."""
    guest = [bytes(PAGE_SIZE)] * PAGES
    encoder = Encoder(PAGES, compression=compression, whole=whole)
    decoder = Decoder(PAGES)
    memory = memoryview(bytearray(b"\xee" * (PAGES * PAGE_SIZE)))
    staging = Staging(PAGES)
    sent: set[int] = set()
    for epoch, epoch_touches in enumerate(history):
        for place, (gfn, kind, seed) in enumerate(epoch_touches):
            guest[gfn] = changed(guest[gfn], kind, seed)
            staging.gfns[place] = gfn
            staging.data[place * PAGE_SIZE : (place + 1) * PAGE_SIZE] = guest[gfn]
        staging.count = len(epoch_touches)
        before = bytes(memory)
        staged: list[Verified] = [
            decoder.verify(coded.flags, coded.payload)
            for coded in encoder.encode(staging, batch_pages)
        ]
        state = encoder.encode_state(states[epoch])
        assert decoder.decode_state(state.flags, state.payload) == states[epoch]
        assert memory == before
        if epoch == cut:
            return
        for batch in staged:
            decoder.apply(batch, memory)
        sent |= {gfn for gfn, _, _ in epoch_touches}
        for gfn in sent:
            assert memory[gfn * PAGE_SIZE : (gfn + 1) * PAGE_SIZE] == guest[gfn]
        for gfn in set(range(PAGES)) - sent:
            assert memory[gfn * PAGE_SIZE : (gfn + 1) * PAGE_SIZE] == b"\xee" * PAGE_SIZE


def sample(compression: str) -> Coded:
    """A batch with every kind of record."""
    noise = random.Random(3)
    encoder = Encoder(PAGES, compression=compression)
    staging = Staging(4)
    staging.data[:] = b"text" * 1024 + b"more" * 1024 + noise.randbytes(4096) + bytes(4096)
    for gfn in range(4):
        staging.gfns[gfn] = gfn
    staging.count = 3
    list(encoder.encode(staging))
    staging.data[5] ^= 1
    staging.data[4096 * 2 :] = bytes(8192)
    staging.count = 4
    (coded,) = encoder.encode(staging)
    return coded


SAMPLES = [sample(compression) for compression in COMPRESSIONS]


def judged(flags: int, payload: bytes) -> None:
    """Refused, or applied without a crash; never beyond the memory it may take."""
    memory = memoryview(bytearray(PAGES * PAGE_SIZE))
    decoder = Decoder(PAGES)
    tracemalloc.start()
    try:
        batch = decoder.verify(flags, payload)
    except ProtocolError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MAX_PAGES + MAX_STATE
    decoder.apply(batch, memory)


@given(st.sampled_from(SAMPLES), st.lists(st.integers(0, 2**32), min_size=1, max_size=4))
def test_flipped_bits(coded: Coded, flips: list[int]) -> None:
    payload = bytearray(coded.payload)
    for flip in flips:
        bit = flip % (len(payload) * 8)
        payload[bit // 8] ^= 1 << bit % 8
    judged(coded.flags, bytes(payload))


@given(st.sampled_from(SAMPLES), st.integers(0, 2**32), st.binary(max_size=8))
def test_cut_and_extended(coded: Coded, cut: int, more: bytes) -> None:
    judged(coded.flags, coded.payload[: cut % len(coded.payload)] + more)


@given(st.integers(0, 3), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.binary())
def test_lying_prefixes_and_noise(flags: int, count: int, length: int, noise: bytes) -> None:
    payload = count.to_bytes(4, "little") + length.to_bytes(4, "little") + noise
    judged(flags, payload)
    state = Decoder(PAGES)
    for number in (flags, flags | 4):
        try:
            assert len(state.decode_state(number, payload)) == count
        except ProtocolError:
            pass
