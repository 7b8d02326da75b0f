# SPDX-License-Identifier: Apache-2.0
"""What grows while a guest is protected, holes, the first copy, and the life of a source."""

from __future__ import annotations

import errno

import pytest

from checkpoint.driver import PAGE_SIZE
from checkpoint.errors import (
    CheckpointError,
    HypervisorError,
    UnsupportedGuest,
)
from checkpoint.xen import toolstack
from checkpoint.xen.dirty import MARK_FRAME
from tests.unit.guest_fifo import WORDS
from tests.unit.xen_guest import (
    BUFFER,
    BUFFER_REFERENCE,
    DATA,
    DOMID,
    HOLE,
    RX,
    TX,
    VIF,
    Rig,
    tracked,
    with_hole,
)

GTF_WRITING = 0x10


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A guest that is tracked, its first copy done."""
    return tracked(monkeypatch)


# ---- Section: what grows ----


def test_a_grant_table_that_grew(rig: Rig) -> None:
    rig.guest.grant_frames = 3
    rig.guest.grant(512 * 2 + 7, BUFFER, 1 | GTF_WRITING)
    state = rig.capture()
    assert len(state.grants) == 3
    assert BUFFER in rig.copies()
    assert list(rig.xen.resources.values()) == [3]
    rig.slot(RX, 295, 512 * 2 + 9)  # a reference that one frame would not have had
    rig.capture()


def test_a_grant_table_that_cannot_be_mapped_anew_stays_mapped(rig: Rig) -> None:
    rig.guest.grant_frames = 2
    rig.xen.failing["xenforeignmemory_map_resource"] = (0, errno.ENOMEM)
    for _ in range(2):
        with pytest.raises(HypervisorError, match="grant table of domain 3"):
            rig.capture()
        rig.store.changed = True  # has the old table read again
    assert list(rig.xen.resources.values()) == [1]
    rig.xen.failing.clear()
    assert len(rig.capture().grants) == 2


def test_rings_granted_by_a_table_that_grew(rig: Rig) -> None:
    new_tx = 0x320
    rig.guest.grant_frames = 2
    rig.guest.grant(600, new_tx)
    rig.store.set(f"{VIF}/tx-ring-ref", "600")
    rig.capture()
    assert new_tx in rig.copies()
    assert TX not in rig.copies()


def test_a_ring_that_could_not_be_found_is_looked_for_again(rig: Rig) -> None:
    rig.store.set(f"{VIF}/tx-ring-ref", "60000")
    with pytest.raises(CheckpointError, match="has no valid grant"):
        rig.capture()
    with pytest.raises(CheckpointError, match="has no valid grant"):
        rig.capture()
    rig.store.set(f"{VIF}/tx-ring-ref", "10")
    rig.capture()
    assert BUFFER in rig.copies()


def test_a_page_of_fifo_events_that_came_is_copied_with_the_others(rig: Rig) -> None:
    pages = rig.layout.fifo
    assert pages is not None
    new = WORDS // PAGE_SIZE + 1
    rig.capture()
    assert new not in rig.copies()

    def grow(*_: object) -> None:
        rig.guest.write(pages.pages // PAGE_SIZE, b"\x02", pages.pages % PAGE_SIZE)

    rig.xen.before["xc_domain_pause"] = grow
    rig.refused("added a page of event channels")
    rig.xen.before.clear()
    rig.capture()
    rig.guest.backend_writes(new, b"\x01\x02\x03")
    rig.capture()
    assert rig.copies()[new].startswith(b"\x01\x02\x03")


def test_a_guest_that_takes_memory_back_is_refused(rig: Rig) -> None:
    # Its own old pages are still mapped here, and no longer those of the guest.
    rig.guest.extra_pages = 1
    with pytest.raises(UnsupportedGuest, match="has grown from 2050 to 2051 pages"):
        rig.capture()
    assert rig.guest.pauses == 0


# ---- Section: holes ----

HOLES = (0x340, 0x341, 0x7F0)


@pytest.fixture
def holey(monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A guest with holes in its RAM; touching one of them ends the test run."""
    made = Rig(monkeypatch, holes=HOLES)
    made.source.track()
    assert set(range(made.pages)) - set(HOLES) == {
        gfn for batch in made.source.base_round() for gfn in batch
    }
    return made


def test_holes_are_never_touched(holey: Rig) -> None:
    holey.guest.grant(BUFFER_REFERENCE, HOLES[0], 1 | GTF_WRITING)
    holey.capture()
    assert not set(HOLES) & set(holey.copies())


def test_what_is_no_ram_below_4_gib_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with_hole(monkeypatch)
    rig = Rig(monkeypatch)
    rig.source.track()
    first = [gfn for batch in rig.source.base_round() for gfn in batch]
    assert first == [gfn for gfn in range(rig.pages) if gfn not in HOLE]
    for gfn in (HOLE.start, HOLE.stop, DATA):
        rig.guest.write(gfn, b"written")
    rig.capture()
    assert HOLE.start not in rig.copies()
    assert {HOLE.stop, DATA} <= set(rig.copies())


def test_a_hole_that_was_filled_is_refused_and_nothing_is_lost(holey: Rig) -> None:
    holey.guest.logged |= {HOLES[1], DATA}
    with pytest.raises(UnsupportedGuest, match=r"given memory at frame 0x341"):
        holey.capture()
    assert holey.guest.pauses == 0
    holey.guest.logged |= {HOLES[1]}
    with pytest.raises(UnsupportedGuest, match=r"given memory at frame 0x341"):
        list(holey.source.base_round())


def test_a_hole_that_the_grant_table_grew_into_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch, holes=HOLES)
    kept = rig.layout.grants
    object.__setattr__(rig.layout, "grants", type(kept)(HOLES, kept.used, 1))
    rig.source.track()
    rig.guest.logged |= {HOLES[1], DATA}
    rig.capture()
    assert DATA in rig.copies()
    assert HOLES[1] not in rig.copies()


def test_memory_that_came_while_the_shell_was_built_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    rig.source.description.detail["holes"] = [HOLES[0]]
    with pytest.raises(UnsupportedGuest, match=r"given memory at frame 0x340"):
        rig.source.track()
    assert nothing_left(rig)


def test_grant_frames_that_came_while_the_shell_was_built_are_never_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    kept = rig.layout.grants
    object.__setattr__(rig.layout, "grants", type(kept)(HOLES, kept.used, 1))
    rig.source.description.detail["holes"] = list(HOLES)
    rig.source.track()
    assert not {gfn for batch in rig.source.base_round() for gfn in batch} & set(HOLES)
    rig.guest.write(HOLES[0], b"a grant")
    assert [list(batch) for batch in rig.source.base_round()] == [[MARK_FRAME]]
    rig.guest.write(HOLES[0], b"a grant")
    rig.capture()
    assert HOLES[0] not in rig.copies()


def test_a_ring_in_a_hole_is_refused(holey: Rig) -> None:
    holey.guest.grant(BUFFER_REFERENCE, HOLES[2])
    holey.store.set(f"{VIF}/tx-ring-ref", str(BUFFER_REFERENCE))
    with pytest.raises(UnsupportedGuest, match="shares pages that it does not have"):
        holey.capture()


def test_page_tables_that_lead_into_a_hole_are_an_error(holey: Rig) -> None:
    fifo = holey.layout.fifo
    assert fifo is not None
    table = holey.layout.page_table
    holey.guest.page(table // PAGE_SIZE)[:] = (HOLES[0] << 12 | 3).to_bytes(8, "little") * 512
    holey.store.changed = True
    with pytest.raises(UnsupportedGuest, match="in a hole of guest RAM"):
        holey.capture()


# ---- Section: the first copy ----


def test_the_first_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    rig.source.track()
    batches = list(rig.source.base_round())
    assert [len(batch) for batch in batches] == [1024, 1024]
    rig.guest.write(DATA, b"live")
    rig.guest.write(5, b"live")
    batches = list(rig.source.base_round())
    assert [list(batch) for batch in batches] == [[MARK_FRAME, 5, DATA]]
    rig.source.copy_live(batches[0], rig.staging)
    assert {gfn for gfn, copy in rig.copies().items() if copy.startswith(b"live")} == {5, DATA}
    assert [list(batch) for batch in rig.source.base_round()] == [[MARK_FRAME]]
    assert "xc_domain_pause" not in rig.xen.calls


# ---- Section: life cycle ----


def nothing_left(rig: Rig) -> bool:
    """Whether every mapping, buffer and connection was given back, and the log is off."""
    left = (rig.xen.mapped, rig.xen.resources, rig.xen.buffers, rig.store.open)
    return not any(left) and not rig.guest.logging


def test_untracking_gives_everything_back(rig: Rig) -> None:
    before = rig.source.tracking
    rig.source.pause()
    rig.source.untrack()
    assert (before, rig.source.tracking) == (True, False)
    assert nothing_left(rig)
    assert rig.guest.pauses == 0
    rig.source.untrack()


def test_untracking_a_fresh_source_lets_the_guest_run_and_its_log_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    rig.guest.logging, rig.guest.pauses = True, 1
    rig.source.untrack()
    assert (rig.guest.logging, rig.guest.pauses) == (True, 0)


def test_a_log_that_cannot_be_ended_does_not_keep_the_guest_paused(rig: Rig) -> None:
    rig.source.pause()
    rig.xen.failing["xc_logdirty_control"] = (0, errno.EBUSY)
    with pytest.raises(HypervisorError, match="switch off"):
        rig.source.untrack()
    assert rig.guest.pauses == 0
    assert not any((rig.xen.mapped, rig.xen.resources, rig.xen.buffers, rig.store.open))


TRACK_CALLS = (
    "xc__hypercall_buffer_alloc_pages",
    "xencall_alloc_buffer_pages",
    "xencall2",
    "xenforeignmemory_map2",
    "xenforeignmemory_map_resource",
    "xc_hvm_param_get",
    "xc_logdirty_control",
)


@pytest.mark.parametrize("step", TRACK_CALLS)
def test_tracking_that_fails_gives_everything_back(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    rig = Rig(monkeypatch)
    rig.xen.failing[step] = (0, errno.EPERM)
    with pytest.raises(HypervisorError):
        rig.source.track()
    assert nothing_left(rig)
    rig.xen.failing.clear()
    rig.source.untrack()
    rig.source.track()
    rig.capture()


def test_a_guest_that_another_host_runs_stays_paused(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.capture(leave_paused=True)

    def broken(_domid: int) -> None:
        raise CheckpointError("xl destroy did not end within 120 s")

    with monkeypatch.context() as patch:
        patch.setattr(toolstack, "destroy", broken)
        with pytest.raises(CheckpointError, match="did not end"):
            rig.source.destroy()
    rig.source.unpause()
    rig.source.untrack()
    assert rig.guest.pauses == 1
    assert nothing_left(rig)
    rig.source.destroy()
    rig.source.destroy()
    assert rig.destroyed == [DOMID]
    assert rig.guest.pauses == 1


def test_a_running_guest_is_destroyed_without_being_let_go(rig: Rig) -> None:
    rig.source.pause()
    rig.source.destroy()
    assert "xc_domain_unpause" not in rig.xen.calls
    assert rig.destroyed == [DOMID]


def test_pauses_do_not_nest(rig: Rig) -> None:
    rig.source.pause()
    rig.source.pause()
    assert rig.guest.pauses == 1
    rig.capture()
    assert rig.guest.pauses == 0


def test_alive(rig: Rig) -> None:
    assert rig.source.alive()
    for reason, alive in enumerate((False, False, True, False, False)):
        rig.guest.flags = 0x106 | reason << 16
        assert rig.source.alive() is alive, "suspended is not over"
    rig.guest.flags = 0x102 | 1
    assert not rig.source.alive()
