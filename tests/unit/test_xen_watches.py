# SPDX-License-Identifier: Apache-2.0
"""Watches set again through a shell's xenstore ring, with xenstored at its other end."""

from __future__ import annotations

import struct

import pytest

from checkpoint.errors import ReviveError
from checkpoint.xen.watches import WatchRequests
from tests.unit.xen_store_ring import RING, RingEnd

MOST_TURNS = 10_000


def converse(requests: WatchRequests, store: RingEnd) -> int:
    """Let both sides work in turns until all is done; how often xenstored was notified."""
    notified = 0
    for _ in range(MOST_TURNS):
        if requests.done:
            return notified
        if requests.pump():
            notified += 1
            store.notify()
        store.step()
    raise AssertionError("the conversation has come to a standstill")


def some(count: int, length: int = 20) -> list[tuple[str, str]]:
    """Watches with paths of that length."""
    return [(f"{index:0{length}}", f"FFFF8880{index:08X}") for index in range(count)]


@pytest.mark.parametrize("count", [0, 1, 10, 100])
@pytest.mark.parametrize("start", [0, 1000, 0xFFFFFFF0])
def test_every_watch_is_set_once_in_order(count: int, start: int) -> None:
    page = bytearray(4096)
    store = RingEnd(page, start)
    requests = WatchRequests(memoryview(page), some(count))
    converse(requests, store)
    assert store.watches == some(count)
    assert store.quiet
    req_cons, req_prod, rsp_cons, rsp_prod = struct.unpack_from("<4I", page, 2048)
    assert (req_cons, rsp_cons) == (req_prod, rsp_prod)


def test_nothing_is_written_outside_of_the_requests_and_two_indices() -> None:
    page = bytearray(b"\xaa" * 4096)
    store = RingEnd(page)
    WatchRequests(memoryview(page), some(3)).pump()
    assert page[RING:2048] == b"\xaa" * RING
    assert page[2064:] == b"\xaa" * (4096 - 2064)
    assert struct.unpack_from("<I", page, 2048) == (0,)
    store.notify()
    store.step()
    assert store.watches == some(3)


def test_it_is_done_only_when_each_watch_has_fired() -> None:
    page = bytearray(4096)
    answer = 16 + len("OK") + 1
    store = RingEnd(page, pieces=[answer] * 9)  # so that the event comes later than the answer
    requests = WatchRequests(memoryview(page), [("control/shutdown", "T")])
    assert requests.pump()
    store.notify()
    while not requests.answered:
        assert store.step()
        requests.pump()
    assert not requests.done
    while store.step():
        requests.pump()
    assert requests.done


def test_a_ring_that_xenstored_filled_is_told_to_have_room_again() -> None:
    # All requests fit at once, all answers and events do not: xenstored sleeps on a full ring.
    page = bytearray(4096)
    store = RingEnd(page)
    requests = WatchRequests(memoryview(page), some(18))
    assert requests.pump()
    store.notify()
    while store.step():
        pass
    assert not store.quiet
    assert requests.pump()
    store.notify()
    converse(requests, store)
    assert store.quiet


def test_the_longest_watch_that_fits_and_one_byte_more() -> None:
    token = "FFFF888000000000"
    length = RING - 16 - 2 - len(token)
    page = bytearray(4096)
    store = RingEnd(page, 77)
    converse(WatchRequests(memoryview(page), [("p" * length, token)] * 1), store)
    assert store.watches == [("p" * length, token)]
    with pytest.raises(ReviveError, match="needs 1025 bytes"):
        WatchRequests(memoryview(page), [("p" * (length + 1), token)]).pump()


def test_a_watch_that_is_refused_is_named() -> None:
    page = bytearray(4096)
    store = RingEnd(page, refuse=lambda path: "E2BIG" if path.endswith("7") else None)
    requests = WatchRequests(memoryview(page), some(9))
    with pytest.raises(ReviveError, match=r"refused a watch on 0+7: E2BIG"):
        converse(requests, store)


def test_indices_that_cannot_be_are_an_error_at_once() -> None:
    page = bytearray(4096)
    RingEnd(page)
    struct.pack_into("<I", page, 2060, 0x80000000)
    with pytest.raises(ReviveError, match="2147483648 bytes in a ring"):
        WatchRequests(memoryview(page), some(1)).pump()


def test_without_xenstored_nothing_is_done() -> None:
    page = bytearray(4096)
    RingEnd(page)
    requests = WatchRequests(memoryview(page), some(1))
    assert requests.pump()
    for _ in range(5):
        assert not requests.pump()
    assert not requests.done
    assert not requests.answered
