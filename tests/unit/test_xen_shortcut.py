# SPDX-License-Identifier: Apache-2.0
"""When a standstill is left to native code, and what comes of it when that gives up half-way."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from checkpoint import native
from checkpoint.driver import Staging
from checkpoint.errors import HypervisorError, UnsupportedGuest
from checkpoint.xen import shortcut, source
from checkpoint.xen.shortcut import ShortStandstill
from checkpoint.xen.standstill import Standstill
from tests.unit.xen_fakes import save_file
from tests.unit.xen_guest import (
    BUFFER,
    BUFFER_REFERENCE,
    DATA,
    STORE_GFN,
    TX_REFERENCE,
    VIF,
    Rig,
    tracked,
)

STEPS = ("judge", "await_backends", "copy_shared", "read_log", "copy_dirty", "let_go")
#: more frames than are ever in the log, so that it is not cleaned
PLENTY = 1 << 20
GTF_WRITING = 0x10


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A guest whose course is known: it has had two checkpoints."""
    monkeypatch.setattr(source, "implementation", lambda: ShortStandstill)
    made = tracked(monkeypatch)
    made.capture(keep=PLENTY)
    made.capture(keep=PLENTY)
    return made


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that are made in Python from now on."""
    made: list[str] = []

    def noting(step: str, original: Callable[..., None]) -> Callable[..., None]:
        def noted(*arguments: Any, **named: Any) -> None:
            made.append(step)
            original(*arguments, **named)

        return noted

    for step in STEPS:
        monkeypatch.setattr(Standstill, step, noting(step, getattr(Standstill, step)))
    return made


def test_native_code_is_used_where_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "BACKEND", "native")
    assert shortcut.implementation() is ShortStandstill
    monkeypatch.setattr(native, "BACKEND", "twin")
    assert shortcut.implementation() is Standstill


def test_an_ordinary_checkpoint_is_native_throughout(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = watched(monkeypatch)
    rig.guest.write(DATA, b"changed")
    rig.guest.grant(BUFFER_REFERENCE, BUFFER, 1 | GTF_WRITING)
    rig.xen.calls.clear()
    state = rig.capture(keep=PLENTY)
    assert made == []
    assert rig.copies()[DATA].startswith(b"changed")
    assert BUFFER in rig.copies()
    assert state.context == rig.guest.context
    assert [event.port for event in state.events] == [1, 2, 3, 4]
    assert rig.guest.pauses == 0
    assert rig.xen.calls.count("xencall2") == 2
    assert rig.xen.calls.count("xc_logdirty_control") == 1


def a_vcpu_goes_down(rig: Rig) -> None:
    rig.guest.context = save_file((0,), down=(1,))


def a_port_is_bound(rig: Rig) -> None:
    rig.guest.ports[5] = (5, 1, 0, 0)


def many_ports_are_bound(rig: Rig) -> None:
    rig.guest.ports |= dict.fromkeys(range(5, 200), (5, 1, 0, 0))


def the_grant_table_grows(rig: Rig) -> None:
    rig.guest.grant_frames += 1


def a_device_comes(rig: Rig) -> None:
    rig.add_disk()


@pytest.mark.parametrize(
    ("happens", "steps"),
    [
        (a_vcpu_goes_down, ["judge", "await_backends"]),
        (a_port_is_bound, ["copy_shared", "copy_dirty"]),
        (many_ports_are_bound, ["copy_shared", "copy_dirty"]),
        (the_grant_table_grows, ["copy_shared", "copy_dirty"]),
        (a_device_comes, []),
    ],
)
def test_what_is_new_is_left_to_python_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, happens: Callable[[Rig], None], steps: list[str]
) -> None:
    made = watched(monkeypatch)
    happens(rig)
    rig.guest.write(DATA, b"changed")
    first = rig.capture(keep=PLENTY)
    assert made == steps
    assert first.context == rig.guest.context
    assert [event.port for event in first.events] == sorted(rig.guest.ports)
    assert len(first.grants) == rig.guest.grant_frames
    assert rig.copies()[DATA].startswith(b"changed")
    assert rig.capture(keep=PLENTY) == first
    assert made == steps


def test_a_log_that_is_to_be_cleaned_is_read_once_more(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = watched(monkeypatch)
    rig.guest.write(DATA, b"changed")
    rig.xen.calls.clear()
    rig.capture(keep=1)
    assert rig.xen.calls.count("xc_logdirty_control") == 2
    assert made == []
    assert DATA in rig.copies()
    rig.capture(keep=PLENTY)
    assert DATA not in rig.copies()


@pytest.mark.parametrize(
    ("function", "answer"),
    [
        ("kemari_stop", 1),
        ("kemari_copy_shared", 1),
        ("kemari_read_log", 1),
        ("kemari_copy_dirty", (1 << 64) - 1),
        ("kemari_let_go", 1),
    ],
)
def test_a_native_step_that_gives_up_when_all_is_done_has_done_no_harm(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, function: str, answer: int
) -> None:
    """Python begins it anew."""
    rig.guest.write(DATA, b"changed")
    expected = rig.capture(keep=PLENTY), rig.copies()
    core = shortcut._load()

    class GivesUp:
        def __getattr__(self, name: str) -> Callable[..., int]:
            def call(*arguments: Any) -> int:
                result = int(getattr(core, name)(*arguments))
                return answer if name == function else result

            return call

    monkeypatch.setattr(rig.source._still, "_core", GivesUp())
    assert (rig.capture(keep=PLENTY), rig.copies()) == expected
    assert rig.guest.pauses == 0


@pytest.mark.parametrize("call", ["xc_domain_pause", "xencall2"])
def test_the_error_of_a_stop_that_failed_is_that_of_xen(rig: Rig, call: str) -> None:
    rig.xen.failing[call] = (0, errno.EPERM)
    with pytest.raises(HypervisorError) as caught:
        rig.capture(keep=PLENTY)
    assert caught.value.errno == errno.EPERM
    rig.xen.failing.clear()
    assert rig.guest.pauses == 0
    rig.capture(keep=PLENTY)


def test_a_ring_that_the_guest_says_to_be_beyond_its_memory(rig: Rig) -> None:
    rig.guest.grant(TX_REFERENCE, rig.pages)
    rig.store.set(f"{VIF}/tx-ring-ref", str(TX_REFERENCE))
    with pytest.raises(UnsupportedGuest, match="pages that it does not have"):
        rig.capture(keep=PLENTY)
    assert rig.guest.pauses == 0


def test_a_larger_staging_buffer_is_used_from_then_on(rig: Rig) -> None:
    rig.guest.write(DATA, b"changed")
    small, rig.staging = rig.staging, Staging(512)
    small.close()
    rig.capture(keep=PLENTY)
    assert rig.copies()[DATA].startswith(b"changed")


def test_the_copy_of_the_xenstore_ring_is_of_this_standstill(rig: Rig) -> None:
    rig.guest.page(STORE_GFN)[:4] = b"then"
    assert rig.capture(keep=PLENTY).pages[STORE_GFN].startswith(b"then")
