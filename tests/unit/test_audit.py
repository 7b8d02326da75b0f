# SPDX-License-Identifier: Apache-2.0
"""Looks at whole checkpoints: a change that no epoch has is found, and only such a one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from checkpoint import audit
from checkpoint.codec import Encoder
from checkpoint.driver import PAGE_SIZE, Staging
from tests.unit.kemari_pair import Pair

PAGES = 700


class Guest:
    """Memory, and the encoder of its protection; all of it was sent."""

    def __init__(self, absent: Iterable[int] = (), reference_pages: int | None = None) -> None:
        self.absent = sorted(absent)
        self.memory = bytearray(PAGES * PAGE_SIZE)
        self.encoder = Encoder(PAGES, reference_pages=reference_pages)
        self.staging = Staging(PAGES)
        for gfn in range(0, PAGES, 3):
            self.write(gfn, 1)
        self.send(gfn for gfn in range(PAGES) if gfn not in self.absent)

    def write(self, gfn: int, value: int) -> None:
        self.memory[gfn * PAGE_SIZE + 77] = value

    def stage(self, frames: Iterable[int]) -> None:
        self.staging.clear()
        for place, gfn in enumerate(frames):
            self.staging.gfns[place] = gfn
            page = self.memory[gfn * PAGE_SIZE : (gfn + 1) * PAGE_SIZE]
            self.staging.data[place * PAGE_SIZE : (place + 1) * PAGE_SIZE] = page
            self.staging.count = place + 1

    def send(self, frames: Iterable[int], look: audit.Audit | None = None) -> None:
        """One epoch."""
        self.stage(frames)
        if look is not None:
            look(memoryview(self.memory), self.staging, self.absent)
        list(self.encoder.encode(self.staging))


def test_what_is_in_the_epochs_is_not_lost() -> None:
    guest = Guest()
    look = audit.Audit("web", guest.encoder, 0.0)
    for value, frames in enumerate(([], [3], [3, 4, 256, PAGES - 1], range(PAGES)), 2):
        for gfn in frames:
            guest.write(gfn, value)
        guest.send(frames, look)
    guest.send([], look)
    assert (look.looks, look.lost) == (5, 0)


@pytest.mark.parametrize("gfn", [0, 255, 256, 300, PAGES - 1])
def test_a_change_that_no_epoch_has_is_lost(gfn: int, caplog: pytest.LogCaptureFixture) -> None:
    guest = Guest(absent=[5, 254, 512])
    look = audit.Audit("web", guest.encoder, 0.0)
    guest.write(gfn, 9)
    guest.send([7], look)
    assert look.lost == 0  # a backend may have written it just now
    guest.send([7], look)
    assert look.lost == 1
    assert f"web: the change of page {gfn:#x} was LOST" in caplog.text


def test_a_change_that_the_next_epoch_has_is_not() -> None:
    guest = Guest()
    look = audit.Audit("web", guest.encoder, 3600.0)
    guest.write(42, 9)
    guest.send([], look)
    guest.send([42], look)
    guest.write(43, 9)
    guest.send([], look)
    guest.send([], look)
    assert (look.looks, look.lost) == (1, 0)  # no second look within the interval


def test_pages_of_which_the_standby_may_have_anything_are_left_out() -> None:
    guest = Guest(reference_pages=1)
    look = audit.Audit("web", guest.encoder, 0.0)
    forgotten = [gfn for gfn in range(0, PAGES, 3) if not guest.encoder._have[gfn]]
    assert forgotten
    guest.write(forgotten[0], 9)
    guest.send([], look)
    guest.send([], look)
    assert look.lost == 0


@pytest.mark.parametrize("absent", [[], [0], [PAGES - 1], [0, 1, 2, 300, 301, PAGES + 5], [256]])
def test_frames_without_memory_are_not_touched(absent: list[int]) -> None:
    parts = list(audit._present(PAGES, absent))
    assert all(0 < last - first <= 256 for first, last in parts)
    frames = [gfn for first, last in parts for gfn in range(first, last)]
    assert frames == [gfn for gfn in range(PAGES) if gfn not in absent]


@pytest.fixture
def armed() -> Iterator[None]:
    audit.arm(0.0)
    yield
    audit.arm(None)


@pytest.mark.usefixtures("armed")
def test_a_protected_guest_is_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="checkpoint.audit")
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(5)
        assert "web: look 3 at an epoch" in caplog.text
        assert "LOST" not in caplog.text
        pair.guest.memory[30 * PAGE_SIZE] ^= 1  # and nobody notes it
        pair.talk(5)
        assert "was LOST" in caplog.text


def test_nobody_looks_unasked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="checkpoint.audit")
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(5)
    assert caplog.text == ""
