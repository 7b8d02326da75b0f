# SPDX-License-Identifier: Apache-2.0
"""The order of a capture, what it waits for, and what is left after each way it can fail."""

from __future__ import annotations

import errno
import os
import struct
import time

import pytest

from checkpoint import native
from checkpoint.driver import PAGE_SIZE, Staging
from checkpoint.errors import HypervisorError, LogTaken
from checkpoint.guest.layout import LinuxLayout
from checkpoint.xen import rings, source, standstill
from checkpoint.xen.dirty import MARK_FRAME
from checkpoint.xen.rings import Kind
from checkpoint.xen.shortcut import ShortStandstill
from checkpoint.xen.standstill import Standstill
from checkpoint.xen.state import StateEncoder
from tests.unit.guest_fifo import WORDS
from tests.unit.xen_fakes import save_file
from tests.unit.xen_guest import (
    BLOCK,
    BUFFER,
    BUFFER_REFERENCE,
    CONSOLE_GFN,
    DATA,
    DOMID,
    RX,
    STORE_GFN,
    TX,
    Rig,
    tracked,
)

CLEAN = 11
#: calls, and what is made by them: by the control library's names, or the device model's
PAUSE = ("xencall2", "xc_domain_pause", "xc_domain_hvm_getcontext")
LET_GO = ("xencall2", "xendevicemodel_modified_memory", "xc_domain_unpause")
GTF_WRITING = 0x10


@pytest.fixture(params=[Standstill, ShortStandstill])
def rig(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Rig:
    """A guest that is tracked, its first copy done."""
    monkeypatch.setattr(source, "implementation", lambda: request.param)
    return tracked(monkeypatch)


def on_clean(rig: Rig, action: object) -> None:
    """Do ``action`` just before Xen hands out and cleans the log."""

    def before(_xch: object, _domid: int, operation: int, *_rest: object) -> None:
        if operation == CLEAN:
            action()  # type: ignore[operator]

    rig.xen.before["xc_logdirty_control"] = before


def lasting(layout: LinuxLayout) -> set[int]:
    """Frames that Xen writes behind the log's back."""
    places = [layout.shared_info, WORDS]
    for cpu in layout.cpus:
        places += [cpu.vcpu_info, cpu.runstate, cpu.control_block or 0]
    return {place // PAGE_SIZE for place in places}


# ---- Section: the order ----


def test_calls_of_a_capture_are_made_in_this_order(rig: Rig) -> None:
    rig.capture()
    assert rig.xen.calls == [
        "close_output", *PAUSE, "close_writes", "xc_logdirty_control", *LET_GO,
    ]  # fmt: skip
    assert rig.guest.pauses == 0


def test_calls_of_a_capture_that_leaves_the_guest_paused(rig: Rig) -> None:
    """Nothing that it has sent may be left over for an epoch that will not come."""
    rig.capture(leave_paused=True)
    assert rig.xen.calls == [
        *PAUSE, "close_writes", "close_output", "xc_logdirty_control",
        "xendevicemodel_modified_memory",
    ]  # fmt: skip


def test_calls_of_a_capture_of_a_guest_that_is_paused(rig: Rig) -> None:
    rig.source.pause()
    rig.xen.calls.clear()
    rig.capture()
    assert rig.xen.calls == [
        "xencall2", "xc_domain_hvm_getcontext", "close_writes", "close_output",
        "xc_logdirty_control", *LET_GO,
    ]  # fmt: skip
    assert rig.guest.pauses == 0


def test_rings_are_copied_before_the_log_is_read_and_data_after(rig: Rig) -> None:
    rig.guest.write(DATA, b"old data")

    def backend_at_work() -> None:
        rig.guest.write(DATA, b"new data")  # marked in the log by Xen, as a grant copy is
        rig.guest.backend_writes(RX, b"answered", 64)

    on_clean(rig, backend_at_work)
    rig.capture()
    copies = rig.copies()
    assert copies[DATA].startswith(b"new data")
    assert copies[RX][64:72] != b"answered"
    assert bytes(rig.guest.page(RX)[64:72]) == b"answered"


def test_what_backends_write_until_the_output_is_closed_is_in_the_copy(rig: Rig) -> None:
    def answered() -> None:
        rig.guest.backend_writes(RX, b"in time!", 64 + 8 * 200)

    rig.capture(answered)
    assert rig.copies()[RX][64 + 8 * 200 :][:8] == b"in time!"


@pytest.mark.parametrize("leave_paused", [False, True])
def test_a_capture_is_of_the_moment_of_the_pause(rig: Rig, leave_paused: bool) -> None:
    output, writes = [], []
    captured = rig.source.capture(
        rig.staging,
        lambda: output.append(time.monotonic_ns()),
        lambda: writes.append(time.monotonic_ns()),
        leave_paused=leave_paused,
    )
    assert captured.at_ns <= writes[0] <= captured.at_ns + captured.settle_ns
    assert (output[0] <= captured.at_ns) is not leave_paused
    in_pause = captured.close_ns if leave_paused else 0
    assert captured.settle_ns + in_pause + captured.copy_ns == captured.pause_ns


@pytest.mark.parametrize("leave_paused", [False, True])
def test_writes_are_closed_after_backends_answered_and_before_the_log_is_read(
    rig: Rig, leave_paused: bool
) -> None:
    """So is the output of a guest that stays paused: no later epoch will take what is left."""
    rig.indices(TX, 9, 7)
    looks = []

    def answer(page: memoryview) -> bool:
        looks.append((rig.closed, "close_writes" in rig.xen.calls))
        if len(looks) == 3:
            rig.indices(TX, 9, 9)
        return len(looks) >= 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rings, "answered", answer)
        patch.setattr(standstill, "_QUIET_BOUND", dict.fromkeys(Kind, 60.0))
        on_clean(rig, lambda: looks.append((rig.closed + 10, "close_writes" in rig.xen.calls)))
        rig.capture(leave_paused=leave_paused)
    closed_before = 0 if leave_paused else 1
    assert looks == [(closed_before, False)] * 3 + [(11, True)]


def test_every_lasting_mapping_is_copied_each_time(rig: Rig) -> None:
    expected = lasting(rig.layout) | {TX, RX, MARK_FRAME}
    for _ in range(2):
        rig.capture()
        assert set(rig.copies()) == expected
    rig.guest.write(DATA, b"x")
    rig.guest.write(RX, b"x", 100)
    rig.capture()
    assert set(rig.copies()) == expected | {DATA}


def test_pages_under_an_active_writable_grant_are_copied_though_clean(rig: Rig) -> None:
    rig.guest.grant(BUFFER_REFERENCE, BUFFER, 1 | GTF_WRITING)
    rig.guest.backend_writes(BUFFER, b"by grant")
    rig.capture()
    assert rig.copies()[BUFFER].startswith(b"by grant")
    rig.guest.grant(BUFFER_REFERENCE, BUFFER, 1)
    rig.capture()
    assert BUFFER not in rig.copies()


def test_pages_under_an_active_writable_grant_are_copied_after_rings_and_log(rig: Rig) -> None:
    """The backend is at it: what the log says of such a page must not be taken for copied."""
    rig.guest.grant(BUFFER_REFERENCE, BUFFER, 1 | GTF_WRITING)
    on_clean(rig, lambda: rig.guest.write(BUFFER, b"just now"))
    rig.capture()
    assert rig.copies()[BUFFER].startswith(b"just now")


def test_writable_grants_of_frames_outside_ram_are_left_out(rig: Rig) -> None:
    rig.guest.grant(BUFFER_REFERENCE, 0xFFFFFFFF, 1 | GTF_WRITING)
    rig.capture()
    assert max(rig.copies()) < rig.pages


def test_the_state_is_what_the_guest_had(rig: Rig) -> None:
    rig.guest.page(CONSOLE_GFN)[:5] = b"login"
    rig.guest.grant(20, 0x123, 5)
    state = rig.capture()
    assert state.context == rig.guest.context
    assert [(e.port, e.status, e.vcpu) for e in state.events] == [
        (1, 2, 0), (2, 2, 0), (3, 4, 0), (4, 5, 1),
    ]  # fmt: skip
    assert state.params == {0: 2 << 56 | 0xF3}
    assert state.store == rig.store.nodes
    assert state.pages[CONSOLE_GFN].startswith(b"login")
    assert set(state.pages) == {STORE_GFN, CONSOLE_GFN}
    assert state.grants == [bytes(rig.guest.grants[:PAGE_SIZE])]


def test_a_capture_may_leave_the_guest_paused(rig: Rig) -> None:
    rig.capture(leave_paused=True)
    assert rig.guest.pauses == 1
    rig.source.unpause()
    rig.source.unpause()
    assert rig.guest.pauses == 0


# ---- Section: pause points that will not do ----


def test_a_transmit_ring_that_stays_unanswered(rig: Rig) -> None:
    rig.indices(TX, 9, 7)
    rig.refused("has not answered")
    assert "close_writes" not in rig.xen.calls
    rig.indices(TX, 9, 9)
    rig.capture()
    assert DATA in rig.copies()


def test_a_disk_that_stays_busy(rig: Rig) -> None:
    rig.add_disk()
    rig.capture()
    assert rig.source.prepared()
    assert BLOCK in rig.copies()
    rig.indices(BLOCK, 41, 40)
    assert not rig.source.prepared()  # its answer may take a while: not in the loop's thread
    rig.refused("a disk backend has not answered")
    assert rig.xen.calls.count("close_writes") == 1
    rig.indices(BLOCK, 41, 41)
    assert rig.source.prepared()
    rig.capture()
    assert {DATA, BLOCK} <= set(rig.copies())


def test_a_disk_is_given_more_time_than_a_network(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.add_disk()
    rig.indices(BLOCK, 41, 40)
    bounds = {Kind.TRANSMIT: 0.0, Kind.RECEIVE: 0.0, Kind.DISK: 30.0}
    monkeypatch.setattr(standstill, "_QUIET_BOUND", bounds)
    monkeypatch.setattr(os, "sched_yield", lambda: rig.indices(BLOCK, 41, 41))
    rig.capture()
    requests, _, responses, _ = struct.unpack_from("<4I", rig.copies()[BLOCK])
    assert (requests, responses) == (41, 41)


def test_a_half_written_answer_on_a_receive_ring(rig: Rig) -> None:
    rig.guest.backend_writes(RX, struct.pack("<HHHh", 290 % 256, 0, 0, 1514), 64 + 8 * (290 % 256))
    rig.refused("batch of answers open")
    rig.indices(RX, 300, 291)
    rig.capture()
    assert {DATA, RX} <= set(rig.copies())


def test_a_receive_ring_is_copied_again_until_it_is_unambiguous(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = 64 + 8 * (290 % 256)
    rig.guest.backend_writes(RX, struct.pack("<HHHh", 290 % 256, 0, 0, 1514), at)
    monkeypatch.setattr(standstill, "_QUIET_BOUND", dict.fromkeys(Kind, 30.0))
    monkeypatch.setattr(os, "sched_yield", lambda: rig.indices(RX, 300, 291))
    rig.capture()
    requests, _, responses, _ = struct.unpack_from("<4I", rig.copies()[RX])
    assert (requests, responses) == (300, 291)


def test_a_vcpu_that_reads_its_clock(rig: Rig) -> None:
    first, _end = rig.layout.clock.code[0]
    rig.guest.context = save_file((0, 1), rip=first + 4)
    rig.refused("while it read its clock")


def test_a_vcpu_that_came_up_since_is_looked_at(rig: Rig) -> None:
    rig.guest.context = save_file((0,), down=(1,))
    rig.capture()
    first, _end = rig.layout.clock.code[0]
    context = bytearray(save_file((0, 1)))
    at = context.rindex(struct.pack("<HHI", 2, 1, 1032)) + 8 + 640
    context[at : at + 8] = first.to_bytes(8, "little")
    rig.guest.context = bytes(context)
    rig.refused("while it read its clock")


def test_a_clock_that_is_being_set(rig: Rig) -> None:
    sequence = rig.layout.clock.sequence
    rig.guest.write(sequence // PAGE_SIZE, b"\x05", sequence % PAGE_SIZE)
    rig.refused("while it updated its clock")


@pytest.mark.parametrize("indices", [(5, 6, 9, 9), (5, 5, 9, 10)], ids=["request", "answer"])
def test_a_message_in_the_xenstore_ring(rig: Rig, indices: tuple[int, ...]) -> None:
    rig.store_ring(*indices)
    rig.refused("conversation with xenstore")


def test_an_event_that_xenstored_writes_during_the_capture_is_not_in_the_copy(rig: Rig) -> None:
    state = rig.capture(lambda: rig.store_ring(0, 0, 0, 40))
    assert struct.unpack_from("<4I", state.pages[STORE_GFN], 2048) == (0, 0, 0, 0)


def test_a_node_of_the_guest_that_changed_just_before_the_pause(rig: Rig) -> None:
    rig.xen.before["xc_domain_pause"] = lambda *_: rig.store.set("control/feature", "1")
    rig.refused("has just changed")
    del rig.xen.before["xc_domain_pause"]
    assert rig.capture().store["control/feature"] == "1"


def test_a_log_that_another_program_has_taken_gives_no_checkpoint(rig: Rig) -> None:
    rig.guest.write(DATA, b"missed")
    rig.guest.logged.clear()  # as xl save does, which then waits for what comes
    rig.guest.write(BUFFER, b"theirs")
    for _ in range(2):
        with pytest.raises(LogTaken):
            rig.capture()
        assert rig.guest.pauses == 0
    assert rig.guest.logged == {BUFFER}
    rig.source.untrack()
    assert rig.guest.logging, "the other program goes on"


# ---- Section: errors ----

STEPS = {
    "xc_domain_pause": HypervisorError,
    "xc_domain_hvm_getcontext": HypervisorError,
    "xencall2": HypervisorError,
    "xc_logdirty_control": HypervisorError,
    "xc_domain_unpause": HypervisorError,
}


@pytest.mark.parametrize("step", STEPS)
def test_each_call_that_fails_leaves_the_guest_running_and_the_log_whole(
    rig: Rig, step: str
) -> None:
    rig.capture()
    rig.guest.write(DATA, b"kept")
    rig.xen.failing[step] = (0, errno.EIO)
    # Xen that refuses once, and not the second time, when the guest is let go:
    if step == "xc_domain_unpause":
        rig.xen.before[step] = lambda *_: rig.xen.before.__setitem__(
            step, lambda *_: rig.xen.failing.pop(step, None)
        )
    with pytest.raises(STEPS[step]):
        rig.capture()
    assert rig.guest.pauses == 0
    rig.xen.failing.clear()
    rig.capture()
    assert rig.copies()[DATA].startswith(b"kept")


def test_a_guest_that_was_let_go_without_the_mark_ends_the_protection(rig: Rig) -> None:
    """What another program takes from the log from then on would not be noticed."""
    rig.capture()
    rig.xen.failing["xendevicemodel_modified_memory"] = (0, errno.EFAULT)
    with pytest.raises(HypervisorError, match="XEN_DMOP_modified_memory"):
        rig.capture()
    assert rig.guest.pauses == 0
    rig.xen.failing.clear()
    with pytest.raises(LogTaken):
        rig.capture()
    assert rig.guest.pauses == 0


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (native, "active_writable"),
        (native, "gather"),
        (native, "stage"),
        (native, "first_set"),
        (native, "first_unmet"),
        (rings, "xenstore_empty"),
        (rings, "answered"),
        (rings, "receive_unambiguous"),
        (StateEncoder, "encode"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_each_step_of_ours_that_fails_leaves_the_guest_running_and_the_log_whole(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    monkeypatch.setattr(source, "implementation", lambda: Standstill)
    rig = tracked(monkeypatch)
    rig.capture()
    rig.guest.write(DATA, b"kept")

    def broken(*_: object, **__: object) -> None:
        raise MemoryError(name)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, broken)
        with pytest.raises(MemoryError, match=name):
            rig.capture()
    assert rig.guest.pauses == 0
    rig.capture()
    assert rig.copies()[DATA].startswith(b"kept")


def test_an_output_buffer_that_cannot_be_closed(rig: Rig) -> None:
    def broken() -> None:
        raise RuntimeError("no plug")

    with pytest.raises(RuntimeError, match="no plug"):
        rig.source.capture(rig.staging, broken, lambda: None)
    assert rig.guest.pauses == 0


def test_an_error_also_ends_a_pause_that_was_to_stay(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StateEncoder, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rig.capture(leave_paused=True)
    assert rig.guest.pauses == 0


def test_more_dirty_pages_than_staging_holds_stay_dirty_over_several_attempts(rig: Rig) -> None:
    shared = len(lasting(rig.layout) | {TX, RX, MARK_FRAME})
    rig.staging = Staging(shared + 3)
    first, second = range(DATA, DATA + 6), range(DATA + 3, DATA + 12)
    for gfn in first:
        rig.guest.write(gfn, b"first")
    with pytest.raises(OverflowError, match=rf"^{shared + 6} pages .* {shared + 3}\)"):
        rig.capture()
    for gfn in second:
        rig.guest.write(gfn, b"second")
    with pytest.raises(OverflowError, match=f"^{shared + 12} pages"):
        rig.capture()
    assert rig.guest.pauses == 0
    rig.staging = Staging(shared + 12)
    rig.capture()
    copies = rig.copies()
    assert set(copies) >= {*first, *second}
    assert copies[DATA].startswith(b"first")
    assert copies[DATA + 4].startswith(b"second")
    rig.capture()
    assert DATA not in rig.copies()


def test_what_is_left_in_the_log_is_copied_again(rig: Rig) -> None:
    rig.guest.write(DATA, b"first")
    rig.capture(keep=len(rig.copies()) + 100)
    assert DATA in rig.copies()
    rig.guest.write(DATA + 1, b"then")
    rig.capture(keep=1)
    assert {DATA, DATA + 1} <= set(rig.copies())
    rig.capture(keep=100)
    assert {DATA, DATA + 1}.isdisjoint(rig.copies())


@pytest.mark.parametrize("keep", [0, 100])
def test_an_attempt_that_failed_loses_nothing_wherever_it_left_the_log(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    rig.guest.write(DATA, b"first")
    with monkeypatch.context() as patch:
        patch.setattr(StateEncoder, "encode", lambda *_: 1 / 0)
        for gfn in (DATA + 1, DATA + 2):
            with pytest.raises(ZeroDivisionError):
                rig.capture(keep=keep)
            rig.guest.write(gfn, b"then")
            keep = 100 - keep
    rig.capture(keep=keep)
    assert {DATA, DATA + 1, DATA + 2} <= set(rig.copies())


def test_shared_pages_alone_that_do_not_fit(rig: Rig) -> None:
    rig.guest.write(DATA, b"kept")
    rig.staging = Staging(2)
    with pytest.raises(OverflowError, match="staging holds 2"):
        rig.capture()
    rig.staging = Staging(64)
    rig.capture()
    assert DATA in rig.copies()


def test_a_guest_that_is_gone(rig: Rig) -> None:
    del rig.xen.domains[DOMID]
    assert not rig.source.alive()
    with pytest.raises(HypervisorError):
        rig.capture()
