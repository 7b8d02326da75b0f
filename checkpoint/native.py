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
from array import array
from typing import Any, Protocol

from checkpoint import _twin


class Loops(Protocol):
    """What ``checkpoint._native`` and ``checkpoint._twin`` both are."""

    def scan_bitmap(self, bitmap: Any, nbits: int, out: Any, /) -> int: ...
    def gather(self, memory: Any, gfns: Any, count: int, out: Any, /) -> None: ...
    def active_writable(self, entries: Any, out: Any, /) -> int: ...
    def receive_ring_whole(self, page: Any, grants: int, /) -> bool: ...
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


def scan_bitmap(bitmap: Any, nbits: int, out: Any) -> int:
    """Write the numbers of the set bits among the first ``nbits`` to ``out``, ascending.

    :param bitmap: bit i is bit ``i % 8`` of byte ``i // 8``, as in Xen's dirty log
    :param out: ``array('Q')``
    :return: how many they are
    :raise OverflowError: ``out`` is too small; it is unchanged, the message has the number
    :raise ValueError: the bitmap has not so many bits
    """
    return _loops.scan_bitmap(bitmap, nbits, out)


def gather(memory: Any, gfns: Any, count: int, out: Any) -> None:
    """Copy page ``gfns[i]`` of ``memory`` to place ``i`` of ``out``, for ``i`` below ``count``.

    :raise IndexError: a frame lies outside of ``memory``; nothing was copied
    :raise ValueError: ``gfns`` or ``out`` has not so many
    """
    _loops.gather(memory, gfns, count, out)


def active_writable(grant_frames: Any) -> array[int]:
    """Guest frames that somebody holds mapped for writing, ascending, each once.

    :param grant_frames: entries of version 1: {u16 flags, u16 domid, u32 frame}; those count whose
        type is ``GTF_permit_access`` and whose ``GTF_writing`` bit Xen has set
        (xen/include/public/grant_table.h)
    """
    found = array("Q", bytes(memoryview(grant_frames).nbytes // 8 * 8))
    count = _loops.active_writable(grant_frames, found)
    return array("Q", sorted(set(found[:count])))


def receive_ring_whole(page: Any, grants: int) -> bool:
    """Whether every slot that waits on a network interface's receive ring holds its request.

    :param page: a copy of the ring (xen/include/public/io/ring.h, io/netif.h)
    :param grants: entries of the guest's grant table: a request names one of them
    :raise ValueError: ``page`` is less than a page
    """
    return _loops.receive_ring_whole(page, grants)


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
