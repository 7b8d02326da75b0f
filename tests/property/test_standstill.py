# SPDX-License-Identifier: Apache-2.0
"""A standstill in native code and one in Python make the same checkpoints of the same guest."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint.driver import Staging
from checkpoint.errors import CheckpointError
from checkpoint.xen import source
from checkpoint.xen.shortcut import ShortStandstill
from checkpoint.xen.standstill import Standstill
from tests.unit.xen_fakes import save_file
from tests.unit.xen_guest import BUFFER, RX, STORE_GFN, TX, Rig, tracked

Event = Callable[[Rig], object]


def _write(gfn: int, data: int) -> Event:
    return lambda rig: rig.guest.write(gfn, bytes([data]) * 16, data)


def _grant(reference: int, gfn: int, flags: int) -> Event:
    return lambda rig: rig.guest.grant(reference, gfn, flags)


def _grants_grow(rig: Rig) -> None:
    rig.guest.grant_frames = min(8, rig.guest.grant_frames + 1)


def _bind(port: int, status: int) -> Event:
    return lambda rig: rig.guest.ports.__setitem__(port, (status, 0, 0, 0))


def _transmit(requests: int, answers: int) -> Event:
    return lambda rig: rig.indices(TX, requests, answers)


def _receive(requests: int, answers: int) -> Event:
    return lambda rig: rig.indices(RX, requests, answers)


def _slot(slot: int, reference: int) -> Event:
    return lambda rig: rig.slot(RX, slot, reference)


def _talk(requests: int, answers: int) -> Event:
    return lambda rig: rig.guest.backend_writes(
        STORE_GFN, struct.pack("<4I", requests, 4, answers, 9), 2048
    )


def _run(place: int, *, second: bool) -> Event:
    """vCPUs are somewhere else, around the code that reads the clock, or one goes down."""

    def go(rig: Rig) -> None:
        first, _end = rig.layout.clock.code[0]
        rig.guest.context = save_file((0, 1) if second else (0,), rip=first + place)

    return go


def _clock(sequence: int) -> Event:
    def tick(rig: Rig) -> None:
        at = rig.layout.clock.sequence
        rig.guest.write(at // 4096, sequence.to_bytes(4, "little"), at % 4096)

    return tick


def _staging(pages: int) -> Event:
    return lambda rig: setattr(rig, "staging", Staging(pages))


_frames = st.integers(0x10, 0x320)
_granted = st.sampled_from([BUFFER, 0, 0x10, 0x44, TX, 0xFFFFFFFF])
EVENTS = st.one_of(
    st.builds(_write, _frames, st.integers(0, 255)),
    st.builds(_grant, st.integers(12, 600), _granted, st.sampled_from([0, 1, 0x11, 0x13])),
    st.just(_grants_grow),
    st.builds(_bind, st.integers(4, 70), st.sampled_from([0, 4, 5])),
    st.builds(_transmit, st.integers(7, 9), st.just(9)),
    st.builds(_receive, st.integers(285, 300), st.integers(280, 290)),
    st.builds(_slot, st.integers(280, 300), st.integers(0, 700)),
    st.builds(_talk, st.integers(4, 5), st.integers(9, 10)),
    st.builds(_run, st.sampled_from([-1, 0, 1, 4, 1000]), second=st.booleans()),
    st.builds(_clock, st.integers(0, 3)),
    st.builds(_staging, st.sampled_from([2, 20, 64, 256])),
)  # fmt: skip
ROUNDS = st.lists(
    st.tuples(st.lists(EVENTS, max_size=4), st.sampled_from([0, 3, 1000]), st.booleans()),
    min_size=1,
    max_size=6,
)


def _outcome(rig: Rig, keep: int, *, leave_paused: bool) -> object:
    try:
        state = rig.capture(keep=keep, leave_paused=leave_paused)
    except (CheckpointError, OverflowError) as error:
        return type(error), str(error), rig.guest.pauses, rig.guest.logged
    paused = rig.guest.pauses
    rig.source.unpause()
    return state, rig.copies(), paused, rig.guest.logged


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rounds=ROUNDS)
def test_both_make_the_same_of_every_course(
    monkeypatch: pytest.MonkeyPatch, rounds: list[tuple[list[Event], int, bool]]
) -> None:
    outcomes = []
    for implementation in (Standstill, ShortStandstill):
        with monkeypatch.context() as patch:
            patch.setattr(source, "implementation", lambda kind=implementation: kind)
            rig = tracked(patch)
            seen = []
            for events, keep, leave_paused in rounds:
                for event in events:
                    event(rig)
                seen.append(_outcome(rig, keep, leave_paused=leave_paused))
            rig.source.untrack()
            outcomes.append(seen)
    python, short = outcomes
    assert short == python
