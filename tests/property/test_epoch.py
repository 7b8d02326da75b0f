# SPDX-License-Identifier: Apache-2.0
"""The epoch machines in a hostile world: any order of events, and a fault at every step."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kemari.actions import Actions, EpochError
from kemari.epoch import Primary, PrimaryState
from kemari.successor import Standby, StandbyState
from tests.property.epoch_world import World, possible, settle, step

#: A run in which everything works: two checkpoints by output, one by the timer.
NORMAL = (
    "begin",
    "finish_capture",
    "deliver_to_b",
    "deliver_to_a",
    "produce",
    "finish_capture",
    "deliver_to_b",
    "produce",
    "deliver_to_a",
    "finish_capture",
    "deliver_to_b",
    "deliver_to_a",
    "elapse",
    "finish_capture",
    "deliver_to_b",
    "deliver_to_a",
)
#: A planned failover.
PLANNED = (
    "begin",
    "finish_capture",
    "deliver_to_b",
    "deliver_to_a",
    "produce",
    "hand_over",
    "finish_capture",
    "deliver_to_b",
    "deliver_to_a",
    "finish_capture",
    "deliver_to_b",
    "deliver_to_a",
    "deliver_to_b",
    "revive",
    "deliver_to_a",
)
FAULTS = (
    "cut_a",
    "cut_b",
    "kill_daemon_a",
    "kill_daemon_b",
    "break_link",
    "partition",
    "fail_capture",
    "fail_revival",
    "fill_buffer",
    "be_late",
    "stop",
    "hand_over",
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), policy_release=st.booleans())
def test_any_history(data: st.DataObject, policy_release: bool) -> None:
    """Whatever happens in whatever order: nothing is seen too early, nobody is seen twice."""
    world = World(policy_release=policy_release)
    for _ in range(data.draw(st.integers(1, 40))):
        names = possible(world)
        if not names:
            break
        step(world, data.draw(st.sampled_from(names)))


@pytest.mark.parametrize("policy_release", [False, True])
@pytest.mark.parametrize("run", [NORMAL, PLANNED], ids=["normal", "planned"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_after_every_step(run: tuple[str, ...], fault: str, policy_release: bool) -> None:
    """Every prefix of a run, then a fault, then what happens by itself: one owner, nothing lost."""
    hits = 0
    for length in range(len(run) + 1):
        world = World(policy_release=policy_release)
        for name in run[:length]:
            step(world, name)
        if fault not in possible(world):
            continue
        hits += 1
        step(world, fault)
        settle(world, heal=False)
        settle(world)
        _judge(world)
    possible_here = fault not in ("partition", "fail_revival") or run is PLANNED
    assert hits or not possible_here


@pytest.mark.parametrize("run", [NORMAL, PLANNED], ids=["normal", "planned"])
def test_two_faults_after_every_step(run: tuple[str, ...]) -> None:
    """As above with two faults in a row, settled or not in between; safety only."""
    for length in range(len(run) + 1):
        for first in FAULTS:
            for second in FAULTS:
                for settled in (False, True):
                    world = World(policy_release=False)
                    for name in run[:length]:
                        step(world, name)
                    if first not in possible(world):
                        continue
                    step(world, first)
                    if settled:
                        settle(world)
                    if second in possible(world):
                        step(world, second)
                    settle(world)


def _judge(world: World) -> None:
    """After a single fault everybody must be better off than without a standby."""
    if not world.begun:
        return  # the base copy was not there yet: the guest shares its host's fate
    alive = world.guest_on_a or world.b_visible
    # May be lost: a guest without a complete epoch, and one that had moved to the host that died.
    unprotected = world.acked == 0 or (world.survivor_epoch is not None and not world.power["b"])
    assert alive or unprotected, "the guest was lost although a complete epoch existed"
    assert not (world.guest_on_a and world.b_visible), "the stale copy was not destroyed"
    if world.primary and world.primary.state is PrimaryState.HOLDING:
        assert not world.power["b"], "output is held although the standby could be asked"
        assert not world.policy_release or world.primary.handed
    if world.guest_on_a and world.primary:
        assert not world.paused or world.primary.state is PrimaryState.HOLDING


def test_output_leaves_only_by_ack() -> None:
    world = World(policy_release=False)
    for name in NORMAL[:8]:
        step(world, name)
    assert [token for _, _, token in world.seen] == []
    step(world, "deliver_to_a")
    assert [token for _, _, token in world.seen] == [1]


def test_one_epoch_is_in_flight() -> None:
    primary = Primary()
    primary.begin()
    assert primary.output_held() == []
    primary.captured_epoch(1)
    assert primary.output_held() == []
    primary.sent_epoch(1)
    actions = primary.acked_epoch(1)
    assert [type(action).__name__ for action in actions] == ["Release", "ArmInterval", "Capture"]


def test_interval_only_ignores_held_output() -> None:
    primary = Primary(interval_only=True)
    primary.begin()
    primary.captured_epoch(1)
    primary.sent_epoch(1)
    primary.acked_epoch(1)
    assert primary.output_held() == []
    assert [type(action).__name__ for action in primary.interval_elapsed()] == ["Capture"]


def test_a_full_buffer_stalls_the_guest_until_the_ack() -> None:
    primary = Primary()
    primary.begin()
    primary.captured_epoch(1)
    primary.sent_epoch(1)
    assert [type(action).__name__ for action in primary.buffer_full()] == ["Pause"]
    assert primary.buffer_full() == []
    names = [type(action).__name__ for action in primary.acked_epoch(1)]
    assert names == ["Release", "Unpause", "ArmInterval", "Capture"]


def in_flight() -> Primary:
    """A primary whose first epoch is on its way."""
    primary = Primary()
    primary.begin()
    primary.captured_epoch(1)
    primary.sent_epoch(1)
    return primary


def names(actions: Actions) -> list[str]:
    """What is to be done."""
    return [type(action).__name__ for action in actions]


def test_a_guest_that_outpaces_its_standby_waits_for_the_ack() -> None:
    primary = in_flight()
    assert names(primary.epoch_late()) == ["Pause"]
    assert primary.epoch_late() == []
    assert names(primary.acked_epoch(1)) == ["Release", "Unpause", "ArmInterval", "Capture"]
    assert primary.epoch_late() == []


def test_a_guest_that_waits_for_a_standby_goes_on_without_it() -> None:
    primary = in_flight()
    primary.epoch_late()
    assert names(primary.link_lost()) == ["Ask", "Unpause"]
    assert primary.epoch_late() == []


def test_a_guest_whose_buffer_fills_while_it_waits_stays_paused_for_that() -> None:
    primary = in_flight()
    primary.epoch_late()
    assert primary.buffer_full() == []
    assert names(primary.link_lost()) == ["Ask"]
    assert names(primary.stood_down()) == ["LetGo", "Unpause"]


def test_an_ack_that_comes_while_the_standby_is_asked_lets_nothing_go() -> None:
    """It may be old: since then the standby may have taken over, and its copy be seen."""
    primary = Primary()
    primary.begin()
    primary.captured_epoch(1)
    primary.sent_epoch(1)
    primary.link_lost()
    assert primary.acked_epoch(1) == []
    assert (primary.acked, primary.released) == (1, 0)
    names = [type(action).__name__ for action in primary.standby_runs(2)]
    assert names == ["Abandon"]


def test_an_ack_for_what_was_not_sent_is_refused() -> None:
    primary = Primary()
    primary.begin()
    primary.captured_epoch(1)
    with pytest.raises(EpochError, match="0 was the last sent"):
        primary.acked_epoch(2)
    assert primary.released == 0


def test_a_standby_takes_epochs_in_order_only() -> None:
    standby = Standby()
    standby.committed(1)
    with pytest.raises(EpochError, match="expected 2"):
        standby.committed(3)
    assert standby.complete == 1


def test_a_promise_is_for_ever() -> None:
    standby = Standby()
    standby.committed(1)
    standby.asked_to_stand_down()
    assert standby.primary_dead() == []
    assert standby.handed_over(1) == []
    assert [type(action).__name__ for action in standby.committed(2)] == ["Discard"]
    assert standby.state is StandbyState.STOOD_DOWN


def test_a_standby_without_a_complete_epoch_cannot_take_over() -> None:
    standby = Standby()
    assert [type(action).__name__ for action in standby.primary_dead()] == ["DestroyShell"]


def test_a_broken_invariant_is_noticed() -> None:
    primary = Primary()
    primary.begin()
    primary.captured_epoch(1)
    primary.released = 1
    with pytest.raises(AssertionError, match="before its ack"):
        primary.check_invariants()
