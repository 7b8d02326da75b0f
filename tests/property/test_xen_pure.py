# SPDX-License-Identifier: Apache-2.0
"""Save records and machine states: any of them come back, damaged ones give the right error."""

from __future__ import annotations

import struct
from bisect import bisect_right

from hypothesis import given
from hypothesis import strategies as st

from checkpoint import native
from checkpoint.driver import PAGE_SIZE
from checkpoint.errors import CheckpointError, ProtocolError
from checkpoint.guest.conditions import Condition, words
from checkpoint.guest.memory import RamView
from checkpoint.xen.context import Context
from checkpoint.xen.rest import borders
from checkpoint.xen.state import EventChannel, MachineState
from tests.unit.xen_fakes import save_file

WORD = st.integers(0, (1 << 32) - 1)
LONG = st.integers(0, (1 << 64) - 1)
PAGE = st.integers(0, 255).map(lambda byte: bytes([byte]) * PAGE_SIZE)
STATES = st.builds(
    MachineState,
    context=st.binary(max_size=200),
    events=st.lists(st.builds(EventChannel, WORD, WORD, WORD, WORD), max_size=5),
    grants=st.lists(PAGE, max_size=2),
    pages=st.dictionaries(LONG, PAGE, max_size=2),
    params=st.dictionaries(LONG, LONG, max_size=4),
    store=st.dictionaries(st.text(), st.text(), max_size=4),
)


@given(STATES)
def test_states_come_back(state: MachineState) -> None:
    raw = state.to_bytes()
    assert MachineState.from_bytes(raw) == state
    assert len(raw) % 8 == 0


@st.composite
def damaged(draw: st.DrawFn, raw: bytes) -> bytes:
    """``raw`` with some bytes changed, taken out, doubled or put in."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        action = draw(st.sampled_from(("change", "header", "cut", "insert", "end")))
        if action == "change" and data:
            data[at] = draw(st.integers(0, 255))
        elif action == "header":
            place = at & ~7
            data[place : place + 8] = struct.pack("<II", draw(st.integers(0, 8)), draw(WORD))
        elif action == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        elif action == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        else:
            del data[at:]
    return bytes(data)


@given(st.data())
def test_damaged_states_are_refused_or_whole(data: st.DataObject) -> None:
    raw = data.draw(STATES).to_bytes()
    untrusted = data.draw(damaged(raw))
    try:
        state = MachineState.from_bytes(untrusted)
    except ProtocolError:
        return
    assert all(len(page) == PAGE_SIZE for page in [*state.grants, *state.pages.values()])
    assert all(isinstance(value, str) for value in state.store.values())
    assert MachineState.from_bytes(state.to_bytes()) == state


@given(st.binary(max_size=300))
def test_any_bytes_after_the_magic_number_are_refused_or_a_state(tail: bytes) -> None:
    try:
        MachineState.from_bytes(b"KMST0001" + tail)
    except ProtocolError:
        pass


@given(st.data(), st.sets(st.integers(0, 5), min_size=1))
def test_damaged_save_files_give_a_plain_error(data: st.DataObject, vcpus: set[int]) -> None:
    untrusted = data.draw(damaged(save_file(tuple(sorted(vcpus)), down=(6,))))
    try:
        context = Context(untrusted)
        for number in context.vcpus():
            context.vcpu(number)
            context.instruction_pointers_at()
        copy = Context(context.only_boot_vcpu())
    except CheckpointError:
        return
    assert set(copy.vcpus()) <= {0}
    assert untrusted.startswith(context.to_bytes())


points = st.integers(0, 30)


@given(st.lists(st.tuples(points, points), max_size=6), points)
def test_a_number_is_in_a_range_when_an_odd_number_of_borders_is_at_or_below_it(
    ranges: list[tuple[int, int]], number: int
) -> None:
    found = borders(ranges)
    assert found == sorted(set(found))
    inside = any(first <= number < end for first, end in ranges)
    assert bool(bisect_right(found, number) & 1) is inside


@given(st.data(), st.binary(min_size=32, max_size=32), st.sampled_from([4, 8]))
def test_conditions_hold_or_not_however_they_are_written(
    data: st.DataObject, ram: bytes, size: int
) -> None:
    number = st.integers(0, (1 << 8 * size) - 1)
    pa, mask = data.draw(st.integers(0, 32 - size)), data.draw(number)
    there = int.from_bytes(ram[pa : pa + size], "little")
    condition = Condition(pa, size, mask, data.draw(st.just(there & mask) | number))
    compiled = words([condition], RamView(ram))
    assert (native.first_unmet(ram, compiled) < 0) is condition.holds(RamView(ram))
