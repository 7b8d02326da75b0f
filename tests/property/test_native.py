# SPDX-License-Identifier: Apache-2.0
"""The compiled loops and their Python twin do the same to any input."""

from __future__ import annotations

import random
import struct
from array import array
from collections.abc import Callable
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from checkpoint import _native as compiled
from checkpoint import _twin
from checkpoint.native import RECORD_MOST

PAGE = 4096
PAGES = 6


def outcome(call: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """Result or error of a call, and what it left in its writable arguments."""
    result: Any
    try:
        result = call(*arguments)
    except (ValueError, IndexError, OverflowError) as error:
        result = (type(error), str(error))
    return (result, *(bytes(a) for a in arguments if isinstance(a, bytearray | array)))


def same(name: str, make: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Call both with arguments of their own; the outcome, which must be equal."""
    mine = outcome(getattr(_twin, name), *make())
    theirs = outcome(getattr(compiled, name), *make())
    assert mine == theirs
    return mine


def frames(most: int = PAGES) -> st.SearchStrategy[list[int]]:
    return st.lists(st.one_of(st.integers(0, most), st.integers(0, 2**64 - 1)), max_size=8)


@given(st.binary(max_size=80), st.integers(-1, 660), st.integers(0, 100), st.integers(0, 2**60))
def test_scan_bitmap(bitmap: bytes, nbits: int, room: int, first: int) -> None:
    same("scan_bitmap", lambda: (bitmap, nbits, array("Q", bytes(8 * room)), first))


@given(st.binary(max_size=80), st.integers(-1, 660))
def test_count_set(bitmap: bytes, nbits: int) -> None:
    same("count_set", lambda: (bitmap, nbits))


@given(frames(), st.integers(-1, 9), st.integers(0, 8), st.integers(0, 100))
def test_gather(gfns: list[int], count: int, room: int, seed: int) -> None:
    memory = random.Random(seed).randbytes(PAGES * PAGE)
    same("gather", lambda: (memory, array("Q", gfns), count, bytearray(room * PAGE)))


@given(st.binary(max_size=120), st.integers(0, 16))
@example(b"\x11\0\0\0\1\0\0\0" * 3, 2)
def test_active_writable(entries: bytes, room: int) -> None:
    mine, theirs = array("Q", bytes(8 * room)), array("Q", bytes(8 * room))
    result = outcome(_twin.active_writable, entries, mine)[0]
    assert result == outcome(compiled.active_writable, entries, theirs)[0]
    if isinstance(result, int):
        assert mine[:result] == theirs[:result]


near = st.lists(st.integers(0, PAGES * 8 + 3), max_size=6)


@given(st.binary(max_size=12), near)
def test_first_set(bitmap: bytes, gfns: list[int]) -> None:
    same("first_set", lambda: (bitmap, array("Q", gfns)))


@given(
    st.binary(max_size=10), st.integers(-1, 70), near, st.integers(-1, 4),
    near, st.booleans(), st.integers(-1, 3), st.integers(0, 12), st.integers(0, 12),
)  # fmt: skip
@example(b"\xff" * 10, 70, [2, 69], 2, [0, 1, 64, 66], True, 1, 12, 12)
def test_stage(
    bitmap: bytes, nbits: int, also: list[int], many: int, left_out: list[int], ascend: bool,
    count: int, room: int, pages: int,
) -> None:  # fmt: skip
    memory = random.Random(len(also)).randbytes(70 * PAGE)
    if ascend:
        left_out = sorted(set(left_out))
    result, marked, _, _, gfns, data = same(
        "stage",
        lambda: (
            memory, bytearray(bitmap), nbits, array("Q", also), many, array("Q", left_out),
            array("Q", bytes(8 * room)), count, bytearray(pages * PAGE),
        ),
    )  # fmt: skip
    bits = {gfn for gfn in range(len(bitmap) * 8) if bitmap[gfn // 8] >> gfn % 8 & 1}
    if isinstance(result, int) or result[0] is OverflowError:
        bits |= {gfn for gfn in also[:many] if gfn < nbits and gfn not in left_out}
    assert {gfn for gfn in range(len(marked) * 8) if marked[gfn // 8] >> gfn % 8 & 1} == bits
    if isinstance(result, int):
        expected = sorted(gfn for gfn in bits if gfn < nbits and gfn not in left_out)
        assert list(struct.unpack(f"<{room}Q", gfns)[count:result]) == expected
        for place, gfn in enumerate(expected, count):
            page = data[place * PAGE : (place + 1) * PAGE]
            assert page == memory[gfn * PAGE : (gfn + 1) * PAGE]


@given(st.binary(max_size=30), st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1), max_size=9))
@example(bytes(24), [0, 1, 0, 16, 2**64 - 1, 0, 8, 1, 1])
def test_first_unmet(memory: bytes, conditions: list[int]) -> None:
    same("first_unmet", lambda: (memory, array("Q", conditions)))


@st.composite
def receive_rings(draw: st.DrawFn) -> bytes:
    """Rings of netif requests, some of them answered or broken."""
    answered = draw(st.one_of(st.integers(0, 300), st.integers(2**32 - 300, 2**32 - 1)))
    waiting = draw(st.one_of(st.integers(0, 257), st.integers(0, 2**32 - 1)))
    page = bytearray(PAGE)
    struct.pack_into("<4I", page, 0, (answered + waiting) % 2**32, 0, answered, 0)
    good = draw(st.integers(0, 40))
    for slot in range(256):
        struct.pack_into("<HHI", page, 64 + 8 * slot, slot, 0, good)
    for slot, reference in draw(st.dictionaries(st.integers(0, 255), st.integers(0, 40))).items():
        struct.pack_into("<HHI", page, 64 + 8 * slot, slot, 0, reference)
    return bytes(page[: draw(st.sampled_from([PAGE, PAGE, PAGE - 1]))])


@given(receive_rings(), st.integers(-1, 40))
def test_receive_ring_whole(page: bytes, grants: int) -> None:
    same("receive_ring_whole", lambda: (page, grants))


@given(st.binary(max_size=50), st.binary(max_size=50), st.booleans(), st.integers(-1, 1))
def test_xor(one: bytes, other: bytes, even: bool, more: int) -> None:
    if even:
        one, other = one[: len(other)], other[: len(one)]
    result = same("xor", lambda: (one, other, bytearray(max(0, len(one) + more))))
    if even and more == 0:
        assert result[-1] == bytes(a ^ b for a, b in zip(one, other, strict=True))


small = st.lists(st.integers(0, 30), max_size=20)


@given(small, small, st.booleans(), st.integers(-1, 21))
def test_subtract(gfns: list[int], exclude: list[int], ascend: bool, count: int) -> None:
    if ascend:
        gfns, exclude = sorted(gfns), sorted(set(exclude))
    mine, theirs = array("Q", gfns), array("Q", gfns)
    result = outcome(_twin.subtract, mine, count, array("Q", exclude))[0]
    assert result == outcome(compiled.subtract, theirs, count, array("Q", exclude))[0]
    if isinstance(result, int):
        assert mine[:result] == theirs[:result]
        assert list(mine[:result]) == [gfn for gfn in gfns[:count] if gfn not in exclude]


def change(draw: st.DrawFn, page: bytes) -> bytes:
    """A page after a guest wrote to it: not at all, a few words, much, zero, or anything."""
    kind = draw(st.sampled_from(["same", "words", "stretch", "zero", "random"]))
    content = bytearray(page)
    if kind == "words":
        for place in draw(st.lists(st.integers(0, 511), max_size=6)):
            content[place * 8 + draw(st.integers(0, 7))] ^= draw(st.integers(0, 255))
    elif kind == "stretch":
        first, last = sorted(draw(st.tuples(st.integers(0, PAGE), st.integers(0, PAGE))))
        content[first:last] = bytes([draw(st.integers(0, 255))]) * (last - first)
    elif kind == "zero":
        content = bytearray(PAGE)
    elif kind == "random":
        content[:] = random.Random(draw(st.integers(0, 9))).randbytes(PAGE)
    return bytes(content)


@st.composite
def histories(draw: st.DrawFn) -> list[list[tuple[int, bytes]]]:
    """Rounds of (frame, content), each frame at most once in a round."""
    guest = [bytes(PAGE)] * PAGES
    rounds = []
    for _ in range(draw(st.integers(1, 4))):
        touched = draw(st.lists(st.integers(0, PAGES - 1), unique=True))
        for gfn in touched:
            guest[gfn] = change(draw, guest[gfn])
        rounds.append([(gfn, guest[gfn]) for gfn in touched])
    return rounds


@given(histories(), st.binary(min_size=PAGES, max_size=PAGES))
def test_any_history_arrives_and_both_encode_it_alike(
    rounds: list[list[tuple[int, bytes]]], have: bytes
) -> None:
    have = bytes(2 if flag > 200 else 0 for flag in have)
    references = [bytearray(PAGES * PAGE), bytearray(PAGES * PAGE)]
    flags = [bytearray(have), bytearray(have)]
    shells = [bytearray(b"\x5a" * PAGES * PAGE), bytearray(b"\x5a" * PAGES * PAGE)]
    guest: dict[int, bytes] = {}
    for changes in rounds:
        guest |= dict(changes)
        gfns = array("Q", [gfn for gfn, _ in changes])
        data = b"".join(content for _, content in changes)
        bodies = []
        for which, loops in enumerate([_twin, compiled]):
            out = bytearray(RECORD_MOST * len(gfns))
            figures = loops.encode_pages(
                gfns, len(gfns), data, references[which], flags[which], out
            )
            assert sum(figures[1:5]) == len(gfns)
            bodies.append((figures, bytes(out[: figures[0]])))
        assert bodies[0] == bodies[1]
        assert references[0] == references[1]
        assert flags[0] == flags[1]
        # each applies what the other encoded
        for which, loops in enumerate([compiled, _twin]):
            body = bodies[which][1]
            assert loops.verify_batch(body, PAGES) == sum(bodies[which][0][2:5])
            loops.apply_batch(body, shells[which])
        for shell in shells:
            for gfn, content in guest.items():
                assert shell[gfn * PAGE : (gfn + 1) * PAGE] == content


@given(
    st.lists(st.integers(0, 15), min_size=1, max_size=60),
    st.integers(-1, 60),
    st.integers(-1, 20),
    st.integers(0, 20),
)
def test_forget_pages(have: list[int], hand: int, count: int, room: int) -> None:
    same("forget_pages", lambda: (bytearray(have), hand, count, array("Q", bytes(8 * room))))


def near_bodies() -> st.SearchStrategy[bytes]:
    """Batch bodies, most of them nearly right."""
    heads = st.builds(
        lambda gfn, mask, words, kind: (gfn | mask << 40 | words << 48 | kind << 60).to_bytes(
            8, "little"
        ),
        st.integers(0, PAGES),
        st.sampled_from([0, 0, 1, 3, 0x80, 0xFF]),
        st.sampled_from([0, 1, 2, 3, 4, 511, 512, 513, 4095]),
        st.integers(0, 3),
    )
    small_words = st.integers(0, 3).map(lambda value: value.to_bytes(8, "little"))
    pieces = st.one_of(heads, small_words, st.binary(max_size=16), st.just(bytes(PAGE)))
    return st.lists(pieces, max_size=10).map(b"".join)


@given(near_bodies())
def test_any_body_is_judged_alike_and_applied_whole_or_not_at_all(body: bytes) -> None:
    result, memory = same("apply_batch", lambda: (body, bytearray(b"\x33" * PAGES * PAGE)))
    assert same("verify_batch", lambda: (body, PAGES))[0] == result
    if not isinstance(result, int):
        assert memory == b"\x33" * PAGES * PAGE
