# SPDX-License-Identifier: Apache-2.0
"""FIFO event channels after a move: taken from the queues as Linux does, linked as Xen does."""

from __future__ import annotations

import pytest

from checkpoint.errors import UnsupportedGuest
from checkpoint.guest.events import (
    LINKED,
    MASKED,
    PENDING,
    event_pages,
    grant_frames,
    settle_fifo,
)
from checkpoint.guest.linux import read_layout
from tests.unit.guest_fifo import FifoGuest
from tests.unit.guest_kernel import Options, build


def test_every_raised_port_is_handled_once() -> None:
    guest = FifoGuest()
    guest.settle({0: [1, 5, 1023], 1: [4]})
    assert guest.handle(0) == [1, 5, 1023]
    assert guest.handle(1) == [4]
    assert guest.handle(0) == []


def test_what_xen_has_linked_meanwhile_is_handled_too() -> None:
    guest = FifoGuest()
    guest.send(0, 3)
    guest.send(0, 7)
    guest.settle({0: [1, 3, 5]})
    guest.send(0, 9)
    assert sorted(guest.handle(0)) == [1, 3, 5, 7, 9]


def test_links_of_the_old_host_are_forgotten() -> None:
    guest = FifoGuest()
    guest.captured[6] = PENDING | LINKED | 8
    guest.captured[8] = LINKED
    guest.kernel.poke(guest.kernel.percpu("cpu_queue", 0) + 4 * 7, 6, size=4)
    guest.kernel.poke(0x50000, 1 << 7, size=4)
    guest.settle({0: [6]})
    assert guest.handle(0) == [6]
    guest.send(0, 8)
    assert guest.handle(0) == [8]


def test_a_masked_port_comes_when_it_is_unmasked() -> None:
    guest = FifoGuest()
    guest.captured[2] = MASKED
    guest.settle({0: [2, 3]})
    assert guest.handle(0) == [3]
    assert guest.word(2) == PENDING | MASKED
    guest.unmask(0, 2)
    assert guest.handle(0) == [2]


def test_ports_that_were_never_bound_stay_masked() -> None:
    guest = FifoGuest()
    guest.captured[900] = MASKED
    guest.settle({})
    assert guest.word(900) == MASKED
    assert guest.handle(0) == []


def test_the_guest_may_have_added_pages() -> None:
    guest = FifoGuest(pages=2)
    assert event_pages(guest.kernel.memory, guest.layout) == [0x40000, 0x41000]
    guest.settle({1: [1024, 2047]})
    assert guest.handle(1) == [1024, 2047]


def test_what_is_not_there_is_refused() -> None:
    guest = FifoGuest()
    memory = guest.kernel.memory
    before = bytes(guest.kernel.ram)
    with pytest.raises(UnsupportedGuest, match="not set up virtual CPU 2"):
        settle_fifo(memory, guest.layout, {}, {2: [1]})
    for port in (0, 1024):
        with pytest.raises(UnsupportedGuest, match="ports 1 to 1023"):
            settle_fifo(memory, guest.layout, {}, {0: [1, port]})
    assert bytes(guest.kernel.ram) == before
    for count in (0, 129):
        guest.kernel.poke("event_array_pages", count, size=4)
        with pytest.raises(UnsupportedGuest, match=f"has {count} pages of FIFO events"):
            event_pages(memory, guest.layout)
    guest.kernel.poke("event_array_pages", 1, size=4)
    guest.kernel.poke("event_array", guest.kernel.peek("event_array") + 4)
    with pytest.raises(UnsupportedGuest, match="expected a whole page"):
        event_pages(memory, guest.layout)


def test_two_level_guests_have_no_event_pages() -> None:
    kernel = build(Options(fifo=False))
    layout = read_layout(kernel.memory, kernel.registers)
    assert event_pages(kernel.memory, layout) == []
    with pytest.raises(UnsupportedGuest, match="two-level"):
        settle_fifo(kernel.memory, layout, {}, {})


def test_grant_frames_are_those_in_use() -> None:
    kernel = build()
    layout = read_layout(kernel.memory, kernel.registers)
    assert grant_frames(kernel.memory, layout) == (0x7FFF, 0x7FFE)
    kernel.poke("nr_grant_frames", 4, size=4)
    assert grant_frames(kernel.memory, layout) == layout.grants.gfns
    kernel.poke("nr_grant_frames", 5, size=4)
    with pytest.raises(UnsupportedGuest, match="counts 5 grant frames in use, and has mapped 4"):
        grant_frames(kernel.memory, layout)


def test_pages_that_the_shell_never_had_are_without_links() -> None:
    guest = FifoGuest()
    guest.captured[3] = LINKED | 4
    guest.settle({0: [3]}, shell=False)
    assert guest.handle(0) == [3]
