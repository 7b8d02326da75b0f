# SPDX-License-Identifier: Apache-2.0
"""The loops over guest pages in Python: same results and errors as ``checkpoint/_native.c``.

The tests compare the two.  It also serves where no compiler was at hand; it is some hundred times
slower.  ``checkpoint/native.py`` documents the functions.
"""

from __future__ import annotations

from array import array
from itertools import pairwise
from typing import Any

PAGE_SIZE = 4096
_PAGE_WORDS = 512
_GROUPS = 8
_RECORD_MOST = 8 + PAGE_SIZE
_ZERO_PAGE = bytes(PAGE_SIZE)

_GFN_MASK = (1 << 40) - 1
_KIND_ZERO, _KIND_RAW, _KIND_DELTA = range(3)
_DELTA_MOST = 256
_REF_NONE, _REF_SAME, _REF_WHOLE = range(3)
_REF_STATE, _REF_HELD, _REF_USED = 3, 4, 8

_GRANT_TYPE_MASK = 3
_GRANT_PERMIT_ACCESS = 1
_GRANT_WRITING = 1 << 4

_RX_SLOTS = 256
_RX_SLOTS_AT = 64
_RESERVED_GRANTS = 8


def _bytes(buffer: Any) -> memoryview:
    return memoryview(buffer).cast("B")


def _words(buffer: Any, name: str) -> memoryview:
    view = _bytes(buffer)
    if len(view) % 8:
        raise ValueError(f"{name} is not an aligned buffer of 64-bit items")
    return view.cast("Q")


def _bits(bitmap: Any, nbits: int) -> int:
    source = _bytes(bitmap)
    if not 0 <= nbits <= len(source) * 8:
        raise ValueError(f"a bitmap of {len(source)} bytes does not have {nbits} bits")
    return int.from_bytes(source[: (nbits + 7) // 8], "little") & ((1 << nbits) - 1)


def count_set(bitmap: Any, nbits: int) -> int:
    return _bits(bitmap, nbits).bit_count()


def scan_bitmap(bitmap: Any, nbits: int, out: Any, first: int = 0) -> int:
    bits = _bits(bitmap, nbits)
    target = _words(out, "out")
    total = bits.bit_count()
    if total > len(target):
        raise OverflowError(f"{total} bits are set, room for {len(target)}")
    used = 0
    for start in range(0, nbits, 64):
        word = (bits >> start) & 0xFFFFFFFFFFFFFFFF
        while word:
            target[used] = first + start + (word & -word).bit_length() - 1
            used += 1
            word &= word - 1
    return used


def _check_gfns(gfns: memoryview, count: int, pages: int) -> None:
    for gfn in gfns[:count]:
        if gfn >= pages:
            raise IndexError(f"frame {gfn} is outside of the guest's {pages} pages")


def gather(memory: Any, gfns: Any, count: int, out: Any) -> None:
    source, frames, target = _bytes(memory), _words(gfns, "gfns"), _bytes(out)
    if not 0 <= count <= min(len(frames), len(target) // PAGE_SIZE):
        raise ValueError(
            f"{count} pages asked for, {len(frames)} frame numbers and room for "
            f"{len(target) // PAGE_SIZE}"
        )
    _check_gfns(frames, count, len(source) // PAGE_SIZE)
    for place, gfn in enumerate(frames[:count]):
        at = gfn * PAGE_SIZE
        target[place * PAGE_SIZE : (place + 1) * PAGE_SIZE] = source[at : at + PAGE_SIZE]


def first_set(bitmap: Any, gfns: Any) -> int:
    bits, frames = _bytes(bitmap), _words(gfns, "gfns")
    for gfn in frames:
        if gfn < len(bits) * 8 and bits[gfn // 8] >> gfn % 8 & 1:
            return gfn
    return -1


def stage(
    memory: Any, bitmap: Any, nbits: int, also: Any, many: int, left_out: Any,
    gfns: Any, count: int, data: Any,
) -> int:  # fmt: skip
    bits, more, fewer = _bytes(bitmap), _words(also, "also"), _words(left_out, "left_out")
    frames, target, pages = _words(gfns, "gfns"), _bytes(data), len(_bytes(memory)) // PAGE_SIZE
    room = min(len(frames), len(target) // PAGE_SIZE)
    if (
        not 0 <= nbits <= min(len(bits) * 8, pages)
        or not 0 <= many <= len(more)
        or not 0 <= count <= room
    ):
        raise ValueError(
            f"{nbits} bits of {len(bits)} bytes for {pages} pages, {many} of {len(more)} frames, "
            f"{count} of {room} places"
        )
    if any(low >= high for low, high in pairwise(fewer)):
        raise ValueError("the frames to leave out do not ascend")
    without = set(fewer)
    for gfn in more[:many]:
        if gfn < nbits and gfn not in without:
            bits[gfn // 8] |= 1 << gfn % 8
    marked = [gfn for gfn in range(nbits) if bits[gfn // 8] >> gfn % 8 & 1]
    found = array("Q", (gfn for gfn in marked if gfn not in without))
    total = count + len(found)
    fits = min(len(found), room - count)
    frames[count : count + fits] = memoryview(found)[:fits]
    if total > room:
        raise OverflowError(f"{total} pages to copy (staging holds {room})")
    gather(memory, frames[count:total], total - count, target[count * PAGE_SIZE :])
    return total


def active_writable(entries: Any, out: Any) -> int:
    source, target = _bytes(entries), _words(out, "out")
    found = []
    for entry in source[: len(source) // 8 * 8].cast("Q"):
        if entry & _GRANT_TYPE_MASK == _GRANT_PERMIT_ACCESS and entry & _GRANT_WRITING:
            found.append(entry >> 32)
    if len(found) > len(target):
        raise OverflowError(f"{len(found)} grants are active, room for {len(target)}")
    target[: len(found)] = memoryview(array("Q", found))
    return len(found)


def receive_ring_whole(page: Any, grants: int) -> bool:
    view = _bytes(page)
    if len(view) < PAGE_SIZE or grants < 0:
        raise ValueError(f"a ring of {len(view)} bytes and {grants} grants")
    words = view[:_RX_SLOTS_AT].cast("I")
    waiting = (words[0] - words[2]) & 0xFFFFFFFF
    if waiting > _RX_SLOTS:
        return False
    slots = view[_RX_SLOTS_AT : _RX_SLOTS_AT + 8 * _RX_SLOTS].cast("Q")
    references = (slots[(words[2] + i) % _RX_SLOTS] >> 32 for i in range(waiting))
    return all(_RESERVED_GRANTS <= reference < grants for reference in references)


def first_unmet(memory: Any, conditions: Any) -> int:
    view, triples = _bytes(memory), _words(conditions, "conditions")
    if len(triples) % 3:
        raise ValueError(f"{len(triples) * 8} bytes are no whole number of conditions")
    if any(at + 8 > len(view) for at in triples[::3]):
        raise IndexError("a condition lies outside of the guest's memory")
    for index in range(0, len(triples), 3):
        at, mask, value = triples[index : index + 3]
        if int.from_bytes(view[at : at + 8], "little") & mask != value:
            return index // 3
    return -1


def xor(one: Any, other: Any, out: Any) -> None:
    left, right, target = _bytes(one), _bytes(other), _bytes(out)
    if not len(left) == len(right) == len(target):
        raise ValueError(
            f"{len(left)}, {len(right)} and {len(target)} bytes, expected as many each"
        )
    value = int.from_bytes(left, "little") ^ int.from_bytes(right, "little")
    target[:] = value.to_bytes(len(target), "little")


def subtract(gfns: Any, count: int, exclude: Any) -> int:
    frames, excluded = _words(gfns, "gfns"), _words(exclude, "exclude").tolist()
    if not 0 <= count <= len(frames):
        raise ValueError(f"{count} frame numbers asked for, there are {len(frames)}")
    if any(low >= high for low, high in pairwise(excluded)):
        raise ValueError("the frames to exclude do not ascend")
    members = set(excluded)
    kept = [gfn for gfn in frames[:count] if gfn not in members]
    frames[: len(kept)] = memoryview(array("Q", kept))
    return len(kept)


def _head(gfn: int, mask: int, words: int, kind: int) -> bytes:
    return (gfn | mask << 40 | words << 48 | kind << 60).to_bytes(8, "little")


def _delta(gfn: int, page: bytes, reference: memoryview) -> bytes | None:
    """The delta record for a page that differs, or None when it would be too long."""
    maps = [0] * _GROUPS
    differences: list[int] = []
    words = zip(memoryview(page).cast("Q"), reference.cast("Q"), strict=True)
    for place, (new, old) in enumerate(words):
        if new != old:
            maps[place // 64] |= 1 << place % 64
            differences.append(new ^ old)
    if len(differences) > _DELTA_MOST:
        return None
    mask = sum(1 << group for group in range(_GROUPS) if maps[group])
    body = array("Q", [map_ for map_ in maps if map_] + differences)
    return _head(gfn, mask, len(body), _KIND_DELTA) + body.tobytes()


def encode_pages(
    gfns: Any, count: int, data: Any, reference: Any, have: Any, out: Any
) -> tuple[int, int, int, int, int, int]:
    frames, pages = _words(gfns, "gfns"), _bytes(data)
    references, known, target = _bytes(reference), _bytes(have), _bytes(out)
    room = len(target) // _RECORD_MOST
    if not 0 <= count <= min(len(frames), len(pages) // PAGE_SIZE, room):
        raise ValueError(
            f"{count} pages asked for, {len(frames)} frame numbers, {len(pages) // PAGE_SIZE} "
            f"pages, room for {room}"
        )
    if len(references) // PAGE_SIZE != len(known):
        raise ValueError(
            f"a reference of {len(references) // PAGE_SIZE} pages with flags for {len(known)}"
        )
    _check_gfns(frames, count, len(known))
    used = unchanged = zero = deltas = raw = held = 0
    for place, gfn in enumerate(frames[:count]):
        page = bytes(pages[place * PAGE_SIZE : (place + 1) * PAGE_SIZE])
        old = references[gfn * PAGE_SIZE : (gfn + 1) * PAGE_SIZE]
        state = known[gfn] & _REF_STATE
        same = state == _REF_SAME
        if same and page == old:
            unchanged += 1
            if page != _ZERO_PAGE:
                known[gfn] |= _REF_USED
            continue
        record = _delta(gfn, page, old) if same and page != _ZERO_PAGE else None
        if page == _ZERO_PAGE:
            record = _head(gfn, 0, 0, _KIND_ZERO)
            zero += 1
        elif record is not None:
            deltas += 1
        else:
            record = _head(gfn, 0, _PAGE_WORDS, _KIND_RAW) + page
            raw += 1
        old[:] = page
        if page != _ZERO_PAGE:
            first = not known[gfn] & _REF_HELD
            held += first
            known[gfn] |= _REF_HELD if first else _REF_USED
        if state == _REF_NONE:
            known[gfn] |= _REF_SAME
        target[used : used + len(record)] = record
        used += len(record)
    return used, unchanged, zero, deltas, raw, held


def forget_pages(have: Any, hand: int, count: int, out: Any) -> tuple[int, int]:
    known, chosen = _bytes(have), _words(out, "out")
    pages = len(known)
    if not 0 <= hand < pages or not 0 <= count <= len(chosen):
        raise ValueError(
            f"the hand at {hand} of {pages} pages, {count} asked for, room for {len(chosen)}"
        )
    found = 0
    for _ in range(2 * pages):
        if found == count:
            break
        flags = known[hand]
        if flags & _REF_HELD and flags & _REF_USED:
            known[hand] = flags & ~_REF_USED
        elif flags & _REF_HELD:
            whole = flags & _REF_STATE == _REF_WHOLE
            known[hand] = _REF_WHOLE if whole else _REF_NONE
            chosen[found] = hand
            found += 1
        hand = (hand + 1) % pages
    return hand, found


def _record(body: memoryview, pages: int) -> tuple[int, int, int, list[int], memoryview] | None:
    """(length, gfn, kind, places of the words, words) of the first record; None when it is bad."""
    if len(body) < 8:
        return None
    head = int.from_bytes(body[:8], "little")
    gfn, mask, words, kind = head & _GFN_MASK, head >> 40 & 0xFF, head >> 48 & 0xFFF, head >> 60
    if gfn >= pages or len(body) - 8 < words * 8 or (mask and kind != _KIND_DELTA):
        return None
    content = body[8 : 8 + words * 8].cast("Q")
    length = 8 + words * 8
    if kind == _KIND_ZERO and words == 0:
        return length, gfn, kind, [], content
    if kind == _KIND_RAW and words == _PAGE_WORDS:
        return length, gfn, kind, [], content
    groups = [group for group in range(_GROUPS) if mask >> group & 1]
    if kind != _KIND_DELTA or not groups or len(groups) > words:
        return None
    places = []
    for group, bits in zip(groups, content, strict=False):
        if not bits:
            return None
        places += [group * 64 + bit for bit in range(64) if bits >> bit & 1]
    if words != len(groups) + len(places):
        return None
    return length, gfn, kind, places, content[len(groups) :]


def verify_batch(body: Any, pages: int) -> int:
    if pages < 0:
        raise ValueError("a guest cannot have fewer than 0 pages")
    view = _bytes(body)
    count = at = 0
    while at < len(view):
        record = _record(view[at:], pages)
        if record is None:
            raise ValueError(f"the record at byte {at} of a batch breaks the format")
        at += record[0]
        count += 1
    return count


def apply_batch(body: Any, memory: Any) -> int:
    view, target = _bytes(body), _bytes(memory)
    pages = len(target) // PAGE_SIZE
    count = verify_batch(view, pages)
    at = 0
    while at < len(view):
        record = _record(view[at:], pages)
        assert record is not None
        length, gfn, kind, places, words = record
        page = target[gfn * PAGE_SIZE : (gfn + 1) * PAGE_SIZE]
        if kind == _KIND_ZERO:
            page[:] = _ZERO_PAGE
        elif kind == _KIND_RAW:
            page[:] = words.cast("B")
        else:
            slots = page.cast("Q")
            for place, word in zip(places, words, strict=True):
                slots[place] ^= word
        at += length
    return count
