# SPDX-License-Identifier: Apache-2.0
"""The dirty log of a guest, and other programs that use it, against the fake libraries."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from checkpoint.driver import PAGE_SIZE
from checkpoint.errors import HypervisorError, LogTaken, UnsupportedGuest
from checkpoint.xen.dirty import _WINDOW as WINDOW
from checkpoint.xen.dirty import MARK_FRAME, DirtyLog, left_behind, switch_off
from checkpoint.xen.libs import ffi
from tests.unit.xen_fakes import FakeDomain, FakeXen

DOMID = 5
PAGES = 600
OFF, ENABLE, CLEAN = 0, 2, 11


@pytest.fixture
def xen() -> Any:
    """A host with one guest."""
    made = FakeXen()
    made.add(DOMID, PAGES)
    return made


@pytest.fixture
def guest(xen: Any) -> FakeDomain:
    found: FakeDomain = xen.domains[DOMID]
    return found


def written(log: DirtyLog) -> set[int]:
    """What was read, but for the mark, which is always there."""
    found = {gfn for gfn in range(8 * len(log.bitmap)) if log.bitmap[gfn // 8] >> gfn % 8 & 1}
    assert MARK_FRAME in found
    return found - {MARK_FRAME}


class Saving:
    """``xl save`` as it uses the log (``xg_sr_save.c`` of libxenguest)."""

    def __init__(self, xen: Any) -> None:
        self._xen = xen
        self._buffer = ffi.new("xc_hypercall_buffer_t *")
        self._memory = xen.xc.xc__hypercall_buffer_alloc_pages(xen.xch, self._buffer, 1)

    def begin(self) -> None:
        """Have the log, whoever has it now."""
        if self._ask(ENABLE) < 0:
            assert self._ask(OFF) == 0
            assert self._ask(ENABLE) == 0

    def round(self) -> set[int]:
        """What was written since the last one."""
        assert self._ask(CLEAN, self._buffer, PAGES) == PAGES
        bits = int.from_bytes(ffi.buffer(self._memory, PAGES // 8), "little")
        return {gfn for gfn in range(PAGES) if bits >> gfn & 1}

    def end(self) -> None:
        """Give the log up."""
        assert self._ask(OFF) == 0

    def _ask(self, operation: int, buffer: Any = ffi.NULL, pages: int = 0) -> int:
        result: int = self._xen.xc.xc_logdirty_control(
            self._xen.xch, DOMID, operation, buffer, pages, 0, ffi.NULL
        )
        return result


# ---- Section: alone ----


def test_the_log_is_moved_into_the_bitmap_and_cleaned(xen: Any, guest: FakeDomain) -> None:
    log = DirtyLog(DOMID, PAGES, xen)
    log.enable()
    guest.write(1, b"x")
    guest.write(599, b"x")
    log.read_and_clean()
    assert len(log.bitmap) == 80  # whole 64-bit words
    assert written(log) == {1, 599}
    log.read_and_clean()
    assert written(log) == set()
    log.close()
    log.close()
    assert not guest.logging
    assert not xen.buffers


def test_a_log_of_few_frames_is_left_as_it_is(xen: Any, guest: FakeDomain) -> None:
    log = DirtyLog(DOMID, PAGES, xen)
    log.enable()
    for gfn in (1, 599):
        guest.write(gfn, b"x")
    log.read(keep=3)  # with the mark
    assert written(log) == {1, 599}
    log.read(keep=3)
    assert written(log) == {1, 599}
    guest.write(7, b"x")
    log.read(keep=3)
    assert written(log) == {1, 7, 599}
    log.mark()
    guest.write(8, b"x")
    log.read(keep=3)
    assert written(log) == {8}
    log.close()


def test_what_is_written_between_looking_and_cleaning_is_not_lost(
    xen: Any, guest: FakeDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend copies to a guest that is paused."""
    log = DirtyLog(DOMID, PAGES, xen)
    log.enable()
    guest.write(1, b"x")

    def counted(bitmap: memoryview, nbits: int) -> int:
        guest.write(7, b"late")
        return int.from_bytes(bitmap, "little").bit_count()

    monkeypatch.setattr("checkpoint.native.count_set", counted)
    log.read(keep=1)
    assert written(log) == {1, 7}
    log.close()


@pytest.mark.parametrize("pages", [1, 64, 65, 32768, 32769])
def test_the_bitmap_fits_its_hypercall_buffer(xen: Any, pages: int) -> None:
    log = DirtyLog(DOMID, pages, xen)
    (buffer,) = xen.buffers.values()
    assert len(buffer) % PAGE_SIZE == 0
    assert pages / 8 <= len(log.bitmap) <= len(buffer)
    log.close()


def test_a_guest_without_a_dirty_log(xen: Any) -> None:
    log = DirtyLog(DOMID, PAGES, xen)
    xen.failing["xc_logdirty_control"] = (0, errno.EOPNOTSUPP)
    with pytest.raises(UnsupportedGuest, match="hardware-assisted paging"):
        log.enable()
    calls = len(xen.calls)
    log.close()  # was never on: nothing to switch off
    assert "xc_logdirty_control" not in xen.calls[calls:]
    assert not xen.buffers


def test_other_refusals_keep_their_reason(xen: Any) -> None:
    log = DirtyLog(DOMID, PAGES, xen)
    xen.failing["xc_logdirty_control"] = (0, errno.ENOMEM)
    for action in (log.enable, log.marked):
        with pytest.raises(HypervisorError) as caught:
            action()
        assert caught.value.errno == errno.ENOMEM
    log.close()


def test_a_log_that_covers_fewer_frames_than_asked_for_is_an_error(
    xen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = DirtyLog(DOMID, PAGES, xen)
    log.enable()
    monkeypatch.setattr(FakeXen, "_xc_logdirty_control", lambda *_: 599)
    with pytest.raises(HypervisorError, match="read and clean"):
        log.read_and_clean()
    monkeypatch.undo()
    log.close()


def test_switching_off_what_is_off_or_gone(xen: Any) -> None:
    switch_off(DOMID, xen)
    switch_off(99, xen)
    xen.failing["xc_logdirty_control"] = (0, errno.EPERM)
    with pytest.raises(HypervisorError, match="switch off"):
        switch_off(DOMID, xen)


def test_a_guest_in_which_no_mark_can_be_kept(xen: Any) -> None:
    guest = xen.add(6, PAGES, holes=(MARK_FRAME,))
    log = DirtyLog(6, PAGES, xen)
    with pytest.raises(UnsupportedGuest, match="keeps no mark"):
        log.enable()
    log.close()
    assert not guest.logging


def test_a_mark_that_cannot_be_set_ends_it(xen: Any, guest: FakeDomain) -> None:
    log = DirtyLog(DOMID, PAGES, xen)
    log.enable()
    xen.failing["xendevicemodel_modified_memory"] = (0, errno.EFAULT)
    with pytest.raises(HypervisorError, match="xendevicemodel_modified_memory"):
        log.read_and_clean()
    xen.failing.clear()
    with pytest.raises(LogTaken):
        log.read_and_clean()
    log.close()


def test_an_answer_without_a_bitmap_is_none(xen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Xen 4.17 gives it of a domain that is being destroyed."""
    log = DirtyLog(DOMID, PAGES, xen)
    log.enable()
    log.read_and_clean()
    with monkeypatch.context() as patch:
        patch.setattr(FakeXen, "_xc_logdirty_control", lambda *_: PAGES)
        with pytest.raises(LogTaken):
            log.read_and_clean()
    log.close()


# ---- Section: with others ----


@pytest.mark.parametrize(
    "steps",
    [("begin",), ("begin", "round"), ("begin", "round", "end"), ("round",), ("end",)],
    ids="-".join,
)
@pytest.mark.parametrize("keep", [0, PAGES])
def test_whatever_another_program_does_with_the_log_is_noticed(
    xen: Any, guest: FakeDomain, steps: tuple[str, ...], keep: int
) -> None:
    log, saving = DirtyLog(DOMID, PAGES, xen), Saving(xen)
    log.enable()
    log.read_and_clean()
    guest.write(7, b"missed")
    for step in steps:
        getattr(saving, step)()
    theirs = guest.logging
    with pytest.raises(LogTaken, match="xl save"):
        log.read(keep)
    guest.write(MARK_FRAME, b"not a mark")
    with pytest.raises(LogTaken):
        log.read(keep)
    log.close()
    assert guest.logging == theirs, "what is not ours is not switched off"


@pytest.mark.parametrize("keep", [0, PAGES])
def test_another_program_gets_back_what_was_read(xen: Any, guest: FakeDomain, keep: int) -> None:
    log, saving = DirtyLog(DOMID, PAGES, xen), Saving(xen)
    log.enable()
    saving.begin()
    for gfn in (7, 8, 599):
        guest.write(gfn, b"theirs")
    with pytest.raises(LogTaken):
        log.read(keep)
    assert saving.round() == {7, 8, 599}
    log.close()


def begin(xen: Any) -> DirtyLog:
    """A daemon that will be killed."""
    log = DirtyLog(DOMID, PAGES, xen)
    log.enable()
    return log


def read(xen: Any) -> DirtyLog:
    log = begin(xen)
    log.read_and_clean()
    return log


@pytest.mark.parametrize("before", [begin, read])
def test_a_log_that_a_killed_daemon_left_on_begins_anew(
    xen: Any, guest: FakeDomain, before: Callable[[Any], DirtyLog]
) -> None:
    before(xen)
    guest.write(7, b"before")
    log = DirtyLog(DOMID, PAGES, xen)
    log.enable()
    log.read_and_clean()
    assert written(log) == set()
    log.close()
    assert not guest.logging


def test_a_log_that_is_another_programs_is_left_alone(xen: Any, guest: FakeDomain) -> None:
    saving = Saving(xen)
    saving.begin()
    guest.write(7, b"theirs")
    log = DirtyLog(DOMID, PAGES, xen)
    with pytest.raises(LogTaken):
        log.enable()
    log.close()
    assert saving.round() == {7}


def test_whose_log_it_is(xen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint.xen.dirty.libraries", lambda: xen)
    found = [left_behind(DOMID)]
    log = begin(xen)
    found.append(left_behind(DOMID))
    log.close()
    Saving(xen).begin()
    found.append(left_behind(DOMID))
    assert found == [False, True, False]
    assert len(xen.buffers) == 1, "that of the other program"


def test_frames_of_a_large_guest_come_some_at_a_time(xen: Any) -> None:
    pages = 3 * WINDOW + 11
    xen.add(DOMID + 1, pages)
    log = DirtyLog(DOMID + 1, pages, xen)
    log.enable()
    wanted = [MARK_FRAME, 7, WINDOW - 1, WINDOW, 3 * WINDOW, pages - 1]
    for gfn in wanted:
        log.bitmap[gfn // 8] |= 1 << gfn % 8
    parts = list(log.frames())
    assert [gfn for part in parts for gfn in part] == wanted
    assert len(parts) == 4
