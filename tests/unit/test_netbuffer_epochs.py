# SPDX-License-Identifier: Apache-2.0
"""The epoch state machine: every state with every event, and what becomes of a failed step."""

from __future__ import annotations

import pytest

from netbuffer.epochs import TRANSITIONS, Epochs, Event, PlugAction, State
from netbuffer.errors import EpochError


def step(epochs: Epochs, event: Event) -> PlugAction | None:
    action = epochs.begin(event)
    epochs.done()
    return action


def in_state(state: State) -> Epochs:
    epochs = Epochs()
    paths: dict[State, list[Event]] = {
        State.DOWN: [],
        State.HOLDING: [Event.SETUP],
        State.CLOSED: [Event.SETUP, Event.CLOSE],
        State.RELEASED: [Event.SETUP, Event.RELEASE_ALL],
        State.UNKNOWN: [Event.SETUP],
    }
    for event in paths[state]:
        step(epochs, event)
    if state is State.UNKNOWN:
        epochs.begin(Event.CLOSE)
        epochs.failed(refused=False)
    assert epochs.state is state
    return epochs


def test_one_epoch_after_the_other() -> None:
    epochs = Epochs()
    assert step(epochs, Event.SETUP) is None
    for number in (1, 2, 3):
        assert step(epochs, Event.CLOSE) is PlugAction.BUFFER
        assert (epochs.state, epochs.closed, epochs.released) == (State.CLOSED, number, number - 1)
        assert step(epochs, Event.RELEASE) is PlugAction.RELEASE_ONE
        assert (epochs.state, epochs.closed, epochs.released) == (State.HOLDING, number, number)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_an_event_that_does_not_fit_changes_nothing(state: State, event: Event) -> None:
    epochs = in_state(state)
    before = (epochs.state, epochs.closed, epochs.released)
    if (state, event) in TRANSITIONS:
        step(epochs, event)
        assert epochs.state is TRANSITIONS[state, event][1]
        return
    with pytest.raises(EpochError) as caught:
        epochs.begin(event)
    assert (epochs.state, epochs.closed, epochs.released) == before
    assert caught.value.event == event.value
    assert caught.value.state == state.value
    epochs.check_invariants()


def test_a_second_epoch_is_not_closed_before_the_first_is_released() -> None:
    epochs = in_state(State.CLOSED)
    with pytest.raises(EpochError, match="holding a closed epoch and cannot close an epoch"):
        epochs.begin(Event.CLOSE)
    assert (TRANSITIONS.keys() & {(State.CLOSED, Event.CLOSE)}) == set()


def test_release_all_also_releases_the_closed_epoch() -> None:
    epochs = in_state(State.CLOSED)
    assert step(epochs, Event.RELEASE_ALL) is PlugAction.RELEASE_INDEFINITE
    assert (epochs.closed, epochs.released) == (1, 1)
    assert step(epochs, Event.HOLD) is PlugAction.BUFFER
    assert epochs.state is State.HOLDING


@pytest.mark.parametrize("state", [State.HOLDING, State.CLOSED])
def test_hold_asks_for_nothing_where_frames_are_held(state: State) -> None:
    epochs = in_state(state)
    assert step(epochs, Event.HOLD) is None
    assert epochs.state is state


def test_a_refused_step_can_be_repeated() -> None:
    epochs = in_state(State.HOLDING)
    epochs.begin(Event.CLOSE)
    epochs.failed(refused=True)
    assert (epochs.state, epochs.closed) == (State.HOLDING, 0)
    step(epochs, Event.CLOSE)
    assert (epochs.state, epochs.closed) == (State.CLOSED, 1)


@pytest.mark.parametrize("event", [Event.CLOSE, Event.RELEASE, Event.HOLD, Event.SETUP])
def test_after_an_unknown_outcome_only_what_is_always_right(event: Event) -> None:
    epochs = in_state(State.UNKNOWN)
    with pytest.raises(EpochError):
        epochs.begin(event)


@pytest.mark.parametrize("event", [Event.RELEASE_ALL, Event.TEARDOWN])
@pytest.mark.parametrize("interrupted", [Event.CLOSE, Event.TEARDOWN])
def test_a_step_that_was_never_ended(event: Event, interrupted: Event) -> None:
    """As after an exception between begin() and done() that nobody foresaw."""
    epochs = in_state(State.HOLDING)
    epochs.begin(interrupted)
    with pytest.raises(EpochError):
        epochs.begin(Event.CLOSE)
    step(epochs, event)
    assert epochs.state in (State.RELEASED, State.DOWN)


def test_ending_a_step_that_was_not_begun_is_a_fault() -> None:
    with pytest.raises(AssertionError):
        Epochs().done()
    with pytest.raises(AssertionError):
        Epochs().failed(refused=True)


@pytest.mark.parametrize(
    ("state", "closed", "released"),
    [
        (State.HOLDING, 2, 1),
        (State.CLOSED, 2, 2),
        (State.CLOSED, 3, 1),
        (State.RELEASED, 1, 0),
        (State.DOWN, 1, 0),
        (State.UNKNOWN, 2, 0),
        (State.HOLDING, -1, -1),
    ],
)
def test_invariants_notice(state: State, closed: int, released: int) -> None:
    epochs = Epochs()
    epochs.state, epochs.closed, epochs.released = state, closed, released
    with pytest.raises(AssertionError):
        epochs.check_invariants()
