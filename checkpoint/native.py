# SPDX-License-Identifier: Apache-2.0
"""The hot loops over guest memory: compiled where the extension is there, else in Python.

Arguments are anything with the buffer protocol, contiguous.  Frame numbers are ``array('Q')`` or an
aligned view of 64-bit integers.  Guest memory and grant frames may be mapped from a running guest
and change meanwhile: no function trusts a second look.  The compiled loops release the GIL.

Setting ``KEMARI_NATIVE=0`` in the environment forces Python; :data:`BACKEND` says which it is.
Every function checks its arguments before it changes anything.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

from checkpoint import _twin


class Loops(Protocol):
    """What ``checkpoint._native`` and ``checkpoint._twin`` both are."""

    def scan_bitmap(self, bitmap: Any, nbits: int, out: Any, first: int = 0, /) -> int: ...
    def count_set(self, bitmap: Any, nbits: int, /) -> int: ...
    def gather(self, memory: Any, gfns: Any, count: int, out: Any, /) -> None: ...
    def first_set(self, bitmap: Any, gfns: Any, /) -> int: ...
    def stage(
        self, memory: Any, bitmap: Any, nbits: int, also: Any, many: int, left_out: Any,
        gfns: Any, count: int, data: Any, /,
    ) -> int: ...  # fmt: skip
    def active_writable(self, entries: Any, out: Any, /) -> int: ...
    def receive_ring_whole(self, page: Any, grants: int, /) -> bool: ...
    def first_unmet(self, memory: Any, conditions: Any, /) -> int: ...
    def xor(self, one: Any, other: Any, out: Any, /) -> None: ...
    def subtract(self, gfns: Any, count: int, exclude: Any, /) -> int: ...
    def encode_pages(
        self, gfns: Any, count: int, data: Any, reference: Any, have: Any, out: Any, /
    ) -> tuple[int, int, int, int, int, int]: ...
    def forget_pages(self, have: Any, hand: int, count: int, out: Any, /) -> tuple[int, int]: ...
    def verify_batch(self, body: Any, pages: int, /) -> int: ...
    def apply_batch(self, body: Any, memory: Any, /) -> int: ...


def _load() -> tuple[str, Loops]:
    if os.environ.get("KEMARI_NATIVE", "1") == "0":
        return "twin", _twin
    try:
        from checkpoint import _native
    except ImportError:
        return "twin", _twin
    return "native", _native


BACKEND, _loops = _load()
"""``native`` or ``twin``, and its functions."""

REF_NONE, REF_SAME, REF_WHOLE = range(3)
"""What bits 0 and 1 of ``have`` say of a page of the reference: what the standby has is not known;
it is this page; the standby may have changed it, so it is always sent whole."""

REF_STATE = 3
"""Mask of these bits."""

REF_HELD, REF_USED = 4, 8
"""Bits of ``have``: the page of the reference takes memory; it was of use lately."""

RECORD_MOST = 8 + 4096
"""Greatest number of bytes that :func:`encode_pages` writes for a page."""


def scan_bitmap(bitmap: Any, nbits: int, out: Any, first: int = 0) -> int:
    """Write the numbers of the set bits among the first ``nbits`` to ``out``, ascending.

    :param bitmap: bit i is bit ``i % 8`` of byte ``i // 8``, as in Xen's dirty log
    :param out: ``array('Q')``
    :param first: the number of bit 0
    :return: how many they are
    :raise OverflowError: ``out`` is too small; it is unchanged, the message has the number
    :raise ValueError: the bitmap has not so many bits
    """
    return _loops.scan_bitmap(bitmap, nbits, out, first)


def count_set(bitmap: Any, nbits: int) -> int:
    """How many of the first ``nbits`` bits are set.

    :raise ValueError: the bitmap has not so many bits
    """
    return _loops.count_set(bitmap, nbits)


def gather(memory: Any, gfns: Any, count: int, out: Any) -> None:
    """Copy page ``gfns[i]`` of ``memory`` to place ``i`` of ``out``, for ``i`` below ``count``.

    :raise IndexError: a frame lies outside of ``memory``; nothing was copied
    :raise ValueError: ``gfns`` or ``out`` has not so many
    """
    _loops.gather(memory, gfns, count, out)


def first_set(bitmap: Any, gfns: Any) -> int:
    """The first of some frame numbers whose bit is set, -1 if none is; numbers beyond the bitmap
    are passed over.
    """
    return _loops.first_set(bitmap, gfns)


def stage(
    memory: Any, bitmap: Any, nbits: int, also: Any, many: int, left_out: Any,
    gfns: Any, count: int, data: Any,
) -> int:  # fmt: skip
    """Put the pages that a bitmap names, and some more, behind those that are staged already.

    :param memory: of the guest
    :param bitmap: of its first ``nbits`` frames; it gets the bits of the first ``many`` frames of
        ``also``, those from ``nbits`` on and those of ``left_out`` passed over, and loses none
    :param left_out: frames that are not staged, strictly ascending; the others of the bitmap are,
        each once, ascending
    :param gfns: ``array('Q')``: frame numbers; ``data``: the pages; ``count``: how many there are
    :return: how many there are then
    :raise OverflowError: there is not so much room; what was staged before still is, and the
        bitmap has what it would have had
    :raise ValueError: a buffer is too small, or ``left_out`` does not ascend; nothing was changed
    """
    return _loops.stage(memory, bitmap, nbits, also, many, left_out, gfns, count, data)


def active_writable(grant_frames: Any, out: Any) -> int:
    """Write guest frames that somebody holds mapped for writing to ``out``, as often and in the
    order in which they are granted; how many that is.

    :param grant_frames: entries of version 1: {u16 flags, u16 domid, u32 frame}; those count whose
        type is ``GTF_permit_access`` and whose ``GTF_writing`` bit Xen has set
        (xen/include/public/grant_table.h)
    :param out: ``array('Q')``
    :raise OverflowError: ``out`` is too small; the message has the number
    """
    return _loops.active_writable(grant_frames, out)


def receive_ring_whole(page: Any, grants: int) -> bool:
    """Whether every slot that waits on a network interface's receive ring holds its request.

    :param page: a copy of the ring (xen/include/public/io/ring.h, io/netif.h)
    :param grants: entries of the guest's grant table: a request names one of them
    :raise ValueError: ``page`` is less than a page
    """
    return _loops.receive_ring_whole(page, grants)


def first_unmet(memory: Any, conditions: Any) -> int:
    """The first condition on 64-bit words of ``memory`` that does not hold; -1 when all do.

    :param conditions: ``array('Q')`` of (offset in bytes, mask, value) each: the word's bits in the
        mask must be the value; the offset need not be aligned
    :return: its number, the first one's is 0
    :raise IndexError: an offset lies outside of ``memory``
    :raise ValueError: ``conditions`` ends within one
    """
    return _loops.first_unmet(memory, conditions)


def xor(one: Any, other: Any, out: Any) -> None:
    """Write the exclusive or of two buffers to a third; one of the first two may be it.

    :raise ValueError: they are not of one length; nothing was changed
    """
    _loops.xor(one, other, out)


def subtract(gfns: Any, count: int, exclude: Any) -> int:
    """Remove from the first ``count`` of ``gfns`` those that ``exclude`` holds, in place.

    :param exclude: strictly ascending; fastest when ``gfns`` ascends too
    :return: how many are left; their order stays
    :raise ValueError: ``exclude`` does not ascend, or ``gfns`` has not so many
    """
    return _loops.subtract(gfns, count, exclude)


def encode_pages(
    gfns: Any, count: int, data: Any, reference: Any, have: Any, out: Any
) -> tuple[int, int, int, int, int, int]:
    """Encode pages as a batch body (docs/protocol.md) and bring the reference up to date.

    :param data: ``count`` pages; page ``i`` is frame ``gfns[i]``
    :param reference: what the standby has, all pages of the guest; ``have``: one byte per page,
        :data:`REF_NONE`, :data:`REF_SAME` or :data:`REF_WHOLE`, with :data:`REF_HELD` and
        :data:`REF_USED`
    :param out: room for ``count * RECORD_MOST`` bytes
    :return: (bytes used of ``out``, pages unchanged and left out, zero, delta, raw, pages of the
        reference that were written for the first time)
    :raise IndexError: a frame lies outside of the reference; nothing was changed
    :raise ValueError: a buffer is too small; nothing was changed
    """
    return _loops.encode_pages(gfns, count, data, reference, have, out)


def forget_pages(have: Any, hand: int, count: int, out: Any) -> tuple[int, int]:
    """Choose pages that the reference shall hold no more, those first that were of no use lately.

    They lose :data:`REF_HELD`, and are sent whole the next time.  The choice is the clock
    algorithm's: a page that was of use since the hand passed it is spared once.

    :param have: as for :func:`encode_pages`
    :param hand: where the last call ended, a frame number; 0 at first
    :param count: how many at most
    :param out: ``array('Q')``, their frame numbers, in the order in which the hand met them
    :return: (the hand, how many they are: less than ``count`` if no more are held)
    :raise ValueError: ``hand`` is no frame of the guest, or ``out`` has no room for ``count``
    """
    return _loops.forget_pages(have, hand, count, out)


def verify_batch(body: Any, pages: int) -> int:
    """Check an untrusted batch body for a guest of ``pages`` pages.

    :return: its number of records
    :raise ValueError: it breaks the format
    """
    return _loops.verify_batch(body, pages)


def apply_batch(body: Any, memory: Any) -> int:
    """Apply an untrusted batch body to ``memory``, which is also the base of its deltas.

    :return: its number of records
    :raise ValueError: it breaks the format; ``memory`` is unchanged
    """
    return _loops.apply_batch(body, memory)
