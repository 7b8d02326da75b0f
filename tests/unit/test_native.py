# SPDX-License-Identifier: Apache-2.0
"""The loops over guest pages, in both implementations."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from array import array

import pytest

from checkpoint import _native, _twin
from checkpoint.native import (
    RECORD_MOST,
    REF_HELD,
    REF_NONE,
    REF_SAME,
    REF_STATE,
    REF_USED,
    REF_WHOLE,
    Loops,
)

PAGE = 4096
KIND_ZERO, KIND_RAW, KIND_DELTA = range(3)


BACKENDS: dict[str, Loops] = {"twin": _twin, "native": _native}


@pytest.fixture(params=BACKENDS)
def loops(request: pytest.FixtureRequest) -> Loops:
    return BACKENDS[request.param]


def words(*values: int) -> array[int]:
    return array("Q", values)


def head(gfn: int, mask: int, count: int, kind: int) -> bytes:
    return struct.pack("<Q", gfn | mask << 40 | count << 48 | kind << 60)


def page(**changes: int) -> bytearray:
    """A page with word ``w<N>`` set."""
    content = bytearray(PAGE)
    for name, value in changes.items():
        struct.pack_into("<Q", content, 8 * int(name[1:]), value)
    return content


class Reference:
    """A guest of some pages: encoder's reference and flags, shell's memory."""

    def __init__(self, loops: Loops, pages: int, shell: bytes = b"\xaa") -> None:
        self.loops = loops
        self.reference = bytearray(pages * PAGE)
        self.have = bytearray(pages)
        self.shell = bytearray(shell * (pages * PAGE))

    def send(self, gfn: int, content: bytes | bytearray) -> bytes:
        out = bytearray(RECORD_MOST)
        used, *_ = self.loops.encode_pages(words(gfn), 1, content, self.reference, self.have, out)
        body = bytes(out[:used])
        assert self.loops.apply_batch(body, self.shell) == (1 if body else 0)
        assert self.shell[gfn * PAGE : (gfn + 1) * PAGE] == content
        return body


# ---- scan_bitmap ----


@pytest.mark.parametrize("nbits", [0, 1, 7, 8, 63, 64, 65, 128, 200])
def test_scan_finds_every_bit_and_none_beyond(loops: Loops, nbits: int) -> None:
    out = array("Q", bytes(8 * nbits))
    assert loops.scan_bitmap(b"\xff" * 32, nbits, out) == nbits
    assert list(out) == list(range(nbits))


def test_scan_of_a_sparse_bitmap_ascends(loops: Loops) -> None:
    bitmap = bytearray(1024)
    for bit in (3, 64, 4095, 4096, 8191):
        bitmap[bit // 8] |= 1 << bit % 8
    out = array("Q", bytes(8 * 8))
    assert loops.scan_bitmap(bitmap, 8192, out) == 5
    assert list(out[:5]) == [3, 64, 4095, 4096, 8191]


def test_scan_into_too_little_room_says_how_much_is_needed_and_writes_nothing(
    loops: Loops,
) -> None:
    out = words(7, 7)
    with pytest.raises(OverflowError, match="3 bits are set, room for 2"):
        loops.scan_bitmap(b"\x07", 8, out)
    assert list(out) == [7, 7]


@pytest.mark.parametrize("nbits", [-1, 9])
def test_scan_beyond_the_bitmap_is_refused(loops: Loops, nbits: int) -> None:
    with pytest.raises(ValueError, match="does not have"):
        loops.scan_bitmap(b"\xff", nbits, array("Q", bytes(80)))
    with pytest.raises(ValueError, match="does not have"):
        loops.count_set(b"\xff", nbits)


@pytest.mark.parametrize(("nbits", "count"), [(0, 0), (8, 8), (9, 8), (24, 8), (25, 9), (88, 16)])
def test_bits_are_counted_up_to_the_end_and_not_beyond(
    loops: Loops, nbits: int, count: int
) -> None:
    assert loops.count_set(b"\xff\0\0\xff" + bytes(7) + b"\xff", nbits) == count


# ---- gather ----


def test_gather_copies_pages_in_the_order_asked_for(loops: Loops) -> None:
    memory = b"".join(bytes([n]) * PAGE for n in range(4))
    out = bytearray(3 * PAGE)
    loops.gather(memory, words(2, 0, 3, 9), 3, out)
    assert out == b"\2" * PAGE + b"\0" * PAGE + b"\3" * PAGE


def test_gather_outside_of_memory_copies_nothing(loops: Loops) -> None:
    out = bytearray(b"x" * 2 * PAGE)
    with pytest.raises(IndexError, match="frame 4 is outside of the guest's 4 pages"):
        loops.gather(bytes(4 * PAGE), words(0, 4), 2, out)
    with pytest.raises(IndexError, match="frame 18446744073709551615 is"):
        loops.gather(bytes(4 * PAGE), words(0, 2**64 - 1), 2, out)
    assert out == b"x" * 2 * PAGE


@pytest.mark.parametrize("count", [-1, 2, 3])
def test_gather_of_more_than_there_is_is_refused(loops: Loops, count: int) -> None:
    with pytest.raises(ValueError, match="pages asked for"):
        loops.gather(bytes(4 * PAGE), words(0, 1), count, bytearray(PAGE))


# ---- active_writable ----


def grant(flags: int, frame: int) -> bytes:
    return struct.pack("<HHI", flags, 0, frame)


def test_active_writable_takes_accesses_that_are_mapped_for_writing(loops: Loops) -> None:
    table = b"".join(
        [
            grant(0, 1),  # free
            grant(1, 2),  # offered, not mapped
            grant(1 | 1 << 3, 3),  # mapped for reading
            grant(1 | 1 << 3 | 1 << 4, 9),  # mapped for writing
            grant(1 | 1 << 4, 5),
            grant(2 | 1 << 4, 6),  # a transfer
            grant(1 | 1 << 4, 9),  # the same frame again
        ]
    )
    out = words(0, 0, 0, 7)
    assert loops.active_writable(table, out) == 3
    assert list(out) == [9, 5, 9, 7]


def test_active_writable_into_too_little_room(loops: Loops) -> None:
    with pytest.raises(OverflowError, match="2 grants are active, room for 1"):
        loops.active_writable(grant(0x11, 1) * 2, words(0))


# ---- first_set, stage ----


def test_the_first_of_some_frames_that_is_set(loops: Loops) -> None:
    assert loops.first_set(b"\x05\x80", words(1, 15, 2, 0)) == 15
    assert loops.first_set(b"\x05\x80", words(1, 16, 2**64 - 1)) == -1
    assert loops.first_set(b"", words()) == -1


def staged(
    loops: Loops, bitmap: bytearray, also: array[int], left_out: array[int], room: int
) -> tuple[list[int], bytes]:
    """Frames and the first byte of each page, one page being staged already."""
    memory = b"".join(bytes([gfn]) * PAGE for gfn in range(16))
    gfns, data = words(99, *[0] * (room - 1)), bytearray(b"\xee" * room * PAGE)
    count = loops.stage(memory, bitmap, 16, also, 2, left_out, gfns, 1, data)
    return list(gfns[:count]), bytes(data[: count * PAGE : PAGE])


def test_stage_takes_what_is_set_and_granted_once_and_leaves_out_what_is_shared(
    loops: Loops,
) -> None:
    bitmap = bytearray(b"\x16\x80")  # 1 2 4 15
    frames, pages = staged(loops, bitmap, words(7, 2, 3), words(4, 9), 8)
    assert frames == [99, 1, 2, 7, 15]
    assert pages == b"\xee\x01\x02\x07\x0f"
    assert bitmap == b"\x96\x80"


def test_what_is_granted_and_left_out_or_beyond_the_guest_is_not_marked(loops: Loops) -> None:
    bitmap = bytearray(3)
    assert staged(loops, bitmap, words(4, 16), words(4), 8)[0] == [99]
    assert bitmap == bytes(3)


def test_what_does_not_fit_is_still_marked(loops: Loops) -> None:
    bitmap = bytearray(b"\x16\x80")
    with pytest.raises(OverflowError, match=r"^5 pages to copy \(staging holds 4\)$"):
        staged(loops, bitmap, words(7, 7), words(4, 9), 4)
    assert bitmap == b"\x96\x80"


def test_stage_of_frames_that_do_not_ascend_is_refused(loops: Loops) -> None:
    with pytest.raises(ValueError, match="do not ascend"):
        staged(loops, bytearray(2), words(0, 0), words(9, 4), 8)


# ---- first_unmet ----


def test_the_first_condition_that_does_not_hold(loops: Loops) -> None:
    memory = struct.pack("<3Q", 0x1234, 7, 0)
    good = (0, 0xFF00, 0x1200, 8, 2**64 - 1, 7)
    assert loops.first_unmet(memory, words()) == -1
    assert loops.first_unmet(memory, words(*good)) == -1
    assert loops.first_unmet(memory, words(*good, 16, 0, 1)) == 2
    assert loops.first_unmet(memory, words(0, 1, 1, *good)) == 0


def test_conditions_beyond_memory_or_cut_off_are_refused(loops: Loops) -> None:
    for offset in (17, 2**64 - 1):
        with pytest.raises(IndexError, match="outside of the guest's memory"):
            loops.first_unmet(bytes(24), words(0, 0, 0, offset, 0, 0))
    with pytest.raises(ValueError, match="16 bytes are no whole number"):
        loops.first_unmet(bytes(24), words(0, 0))


# ---- subtract ----


@pytest.mark.parametrize(
    ("gfns", "exclude", "left"),
    [
        ([1, 2, 3], [], [1, 2, 3]),
        ([1, 2, 3], [2], [1, 3]),
        ([1, 2, 3], [1, 2, 3], []),
        ([5, 1, 9, 1], [1, 7], [5, 9]),
        ([], [4], []),
        ([9, 3, 3, 10], [3, 9, 10], []),
    ],
)
def test_subtract(loops: Loops, gfns: list[int], exclude: list[int], left: list[int]) -> None:
    frames = words(*gfns, 77)
    assert loops.subtract(frames, len(gfns), words(*exclude)) == len(left)
    assert list(frames[: len(left)]) == left


def test_subtract_of_frames_that_do_not_ascend_is_refused(loops: Loops) -> None:
    with pytest.raises(ValueError, match="do not ascend"):
        loops.subtract(words(1, 2), 2, words(2, 2))


# ---- encode, verify, apply ----


def test_first_sending_of_a_page_is_never_left_out_nor_a_delta(loops: Loops) -> None:
    guest = Reference(loops, 2)
    assert guest.send(1, bytes(PAGE)) == head(1, 0, 0, KIND_ZERO)
    content = page(w3=5)
    assert guest.send(0, content) == head(0, 0, 512, KIND_RAW) + content


def test_unchanged_page_is_left_out(loops: Loops) -> None:
    guest = Reference(loops, 1)
    guest.send(0, page(w1=1))
    assert guest.send(0, page(w1=1)) == b""


def test_delta_holds_the_words_that_differ(loops: Loops) -> None:
    guest = Reference(loops, 4)
    guest.send(2, page(w0=1, w70=2, w511=3))
    body = guest.send(2, page(w0=1, w70=6, w511=0xFF))
    assert (
        body
        == head(2, 0b10000010, 4, KIND_DELTA) + words(1 << 6, 1 << 63, 2 ^ 6, 3 ^ 0xFF).tobytes()
    )


def test_page_that_became_zero_is_a_flag(loops: Loops) -> None:
    guest = Reference(loops, 1)
    guest.send(0, page(w5=1))
    assert guest.send(0, bytes(PAGE)) == head(0, 0, 0, KIND_ZERO)
    assert len(guest.send(0, page(w5=1))) == 24


def test_page_with_many_changes_goes_raw(loops: Loops) -> None:
    guest = Reference(loops, 1)
    guest.send(0, page(w0=1))
    half = page(w0=1)
    half[PAGE // 2 :] = b"\1" * (PAGE // 2)
    assert len(guest.send(0, half)) == 8 + 4 * 8 + 256 * 8
    other = bytearray(half)
    other[: PAGE // 2 + 8] = b"\2" * (PAGE // 2 + 8)
    assert len(guest.send(0, other)) == RECORD_MOST


def test_whole_page_is_sent_whole_each_time(loops: Loops) -> None:
    guest = Reference(loops, 1)
    guest.have[0] = REF_WHOLE
    for _ in range(2):
        guest.shell[:8] = b"someone!"
        assert len(guest.send(0, page(w9=9))) == RECORD_MOST
    assert guest.have[0] & REF_STATE == REF_WHOLE
    assert guest.send(0, bytes(PAGE)) == head(0, 0, 0, KIND_ZERO)


def test_encode_counts_each_kind(loops: Loops) -> None:
    guest = Reference(loops, 8)
    for gfn, content in enumerate([page(w1=1), page(w2=2), page(w3=3)]):
        guest.send(gfn, content)
    data = page(w1=1) + page(w2=7) + bytes(PAGE) + b"\3" * PAGE
    out = bytearray(4 * RECORD_MOST)
    figures = loops.encode_pages(words(0, 1, 2, 3), 4, data, guest.reference, guest.have, out)
    assert figures == (24 + 8 + RECORD_MOST, 1, 1, 1, 1, 1)
    held = REF_SAME | REF_HELD
    # The first was unchanged and the second changed: of use; a page of zeros is no base for much.
    used = [held | REF_USED, held | REF_USED, held, held]
    assert list(guest.have) == used + [REF_NONE] * 4


def test_encode_of_a_frame_outside_changes_nothing(loops: Loops) -> None:
    reference, have = bytearray(2 * PAGE), bytearray(2)
    with pytest.raises(IndexError, match="frame 2 is outside"):
        loops.encode_pages(
            words(0, 2), 2, b"\1" * (2 * PAGE), reference, have, bytearray(2 * RECORD_MOST)
        )
    assert not any(reference)
    assert not any(have)


@pytest.mark.parametrize(
    ("gfns", "data", "have", "out"),
    [(1, 2, 2, 2), (2, 1, 2, 2), (2, 2, 1, 2), (2, 2, 3, 2), (2, 2, 2, 1)],
)
def test_encode_with_a_buffer_too_small_is_refused(
    loops: Loops, gfns: int, data: int, have: int, out: int
) -> None:
    with pytest.raises(ValueError, match=r"asked for|flags for"):
        loops.encode_pages(
            array("Q", bytes(8 * gfns)),
            2,
            bytes(PAGE * data),
            bytearray(2 * PAGE),
            bytearray(have),
            bytearray(RECORD_MOST * out),
        )


def test_a_zero_page_takes_no_memory_of_the_reference(loops: Loops) -> None:
    guest = Reference(loops, 1)
    assert guest.send(0, bytes(PAGE)) == head(0, 0, 0, KIND_ZERO)
    assert guest.have[0] == REF_SAME
    assert guest.send(0, bytes(PAGE)) == b""
    assert len(guest.send(0, page(w1=1))) == 24  # zeros are a base like any other
    assert guest.have[0] == REF_SAME | REF_HELD


# ---- forget_pages ----


HELD = REF_SAME | REF_HELD


def test_what_was_of_use_since_the_hand_came_by_is_spared_once(loops: Loops) -> None:
    have = bytearray([HELD | REF_USED, HELD, REF_SAME, REF_NONE] * 5)
    out = words(*[99] * 6)
    assert loops.forget_pages(have, 0, 2, out) == (6, 2)
    assert list(out[:3]) == [1, 5, 99]
    assert list(have[:8]) == [HELD, REF_NONE, REF_SAME, REF_NONE] * 2
    assert loops.forget_pages(have, 6, 6, out) == (9, 6)
    assert list(out) == [9, 13, 17, 0, 4, 8]


def test_what_is_sent_whole_stays_so_when_it_is_forgotten(loops: Loops) -> None:
    have = bytearray([REF_WHOLE | REF_HELD])
    assert loops.forget_pages(have, 0, 1, words(9)) == (0, 1)
    assert have[0] == REF_WHOLE


def test_no_more_is_forgotten_than_is_held(loops: Loops) -> None:
    have = bytearray(20)
    have[11] = HELD | REF_USED
    out = words(*[99] * 3)
    assert loops.forget_pages(have, 5, 3, out) == (5, 1)
    assert list(out) == [11, 99, 99]


@pytest.mark.parametrize(("hand", "count"), [(-1, 1), (4, 1), (0, -1), (0, 3)])
def test_forgetting_out_of_bounds_is_refused(loops: Loops, hand: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"the hand at {hand} of 4 pages"):
        loops.forget_pages(bytearray([HELD] * 4), hand, count, words(9, 9))


BAD_BODIES = {
    "shorter than a head": b"\0" * 7,
    "frame outside": head(4, 0, 0, KIND_ZERO),
    "frame far outside": head((1 << 40) - 1, 0, 0, KIND_ZERO),
    "unknown kind": head(0, 0, 0, 3),
    "kind with the top bit": head(0, 0, 0, 15),
    "zero with words": head(0, 0, 1, KIND_ZERO) + bytes(8),
    "zero with a mask": head(0, 1, 0, KIND_ZERO),
    "raw with too few words": head(0, 0, 511, KIND_RAW) + bytes(511 * 8),
    "raw with too many words": head(0, 0, 513, KIND_RAW) + bytes(513 * 8),
    "raw with a mask": head(0, 1, 512, KIND_RAW) + bytes(PAGE),
    "raw cut short": head(0, 0, 512, KIND_RAW) + bytes(PAGE - 1),
    "delta without a mask": head(0, 0, 1, KIND_DELTA) + words(1).tobytes(),
    "delta without words": head(0, 1, 0, KIND_DELTA),
    "delta with an empty map": head(0, 1, 1, KIND_DELTA) + words(0).tobytes(),
    "delta that lacks a word": head(0, 1, 2, KIND_DELTA) + words(3, 9).tobytes(),
    "delta with a word too many": head(0, 1, 3, KIND_DELTA) + words(1, 9, 9).tobytes(),
    "delta cut short": head(0, 1, 2, KIND_DELTA) + words(1).tobytes(),
    "delta whose maps exceed its words": head(0, 0xFF, 7, KIND_DELTA) + words(*[1] * 7).tobytes(),
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_bad_body_is_refused_and_changes_nothing(loops: Loops, body: bytes) -> None:
    good = head(1, 0, 0, KIND_ZERO)
    memory = bytearray(b"x" * (4 * PAGE))
    with pytest.raises(ValueError, match="record at byte 8 of a batch breaks the format"):
        loops.verify_batch(good + body, 4)
    with pytest.raises(ValueError, match="record at byte 8 of a batch breaks the format"):
        loops.apply_batch(good + body, memory)
    assert memory == b"x" * (4 * PAGE)


def test_loops_refuse_frame_numbers_that_are_no_words(loops: Loops) -> None:
    with pytest.raises(ValueError, match="64-bit items"):
        loops.gather(bytes(PAGE), b"\0" * 9, 1, bytearray(PAGE))


# ---- choosing ----


@pytest.mark.parametrize(("setting", "backend"), [("0", "twin"), ("1", "native")])
def test_environment_chooses_the_backend(setting: str, backend: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from checkpoint import native; print(native.BACKEND)"],
        env=os.environ | {"KEMARI_NATIVE": setting},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == backend
