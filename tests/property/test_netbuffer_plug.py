# SPDX-License-Identifier: Apache-2.0
"""No frame leaves before its epoch is released, whatever happens in whatever order.

The epochs drive a model of ``sch_plug`` (tests/lab/test_netbuffer.py has the real one): a queue,
the counts of two epochs, and a number of frames at the head that may leave.  Frames come, epochs
are closed and released, the kernel refuses or its answer is lost, in any order.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from netbuffer.epochs import TRANSITIONS, Epochs, Event, PlugAction, State
from tests.unit.netbuffer_kernel import SchPlug

_ASKED = [Event.CLOSE, Event.RELEASE, Event.RELEASE_ALL]
_OUTCOMES = ["done"] * 8 + ["refused", "lost request", "lost answer"]


class Commit(RuleBasedStateMachine):
    """The guest, the daemon's epochs and the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs = Epochs()
        self.plug = SchPlug(limit=12)
        self.accepted: list[int] = []
        self.epoch_of: dict[int, int] = {}
        self.sent = 0
        # Whether something has let everything go since the frame was sent: then it may leave.
        self.let_go: set[int] = set()
        self.ignorant = False  # an answer was lost: epochs may be numbered differently
        self.step(Event.SETUP)

    def step(self, event: Event, outcome: str = "done") -> None:
        action = self.epochs.begin(event)
        if outcome == "refused":
            self.epochs.failed(refused=True)
            return
        if action is not None and outcome != "lost request":
            self.plug.act(action)
            if action is PlugAction.RELEASE_INDEFINITE:
                self.let_go |= set(self.accepted)
        if outcome == "done":
            self.epochs.done()
        else:
            self.epochs.failed(refused=False)
            self.ignorant = True

    @rule(count=st.integers(1, 4))
    def guest_sends(self, count: int) -> None:
        for _ in range(count):
            self.sent += 1
            if self.plug.enqueue(self.sent):
                self.accepted.append(self.sent)
                # Numbers as the daemon counts: the epoch that fills is the one after the last.
                self.epoch_of[self.sent] = self.epochs.closed + 1
                if self.plug.unplugged:
                    self.let_go.add(self.sent)

    @rule(frames=st.integers(1, 6))
    def frames_leave(self, frames: int) -> None:
        self.plug.run(frames)

    @rule(event=st.sampled_from(_ASKED), outcome=st.sampled_from(_OUTCOMES))
    def daemon_asks(self, event: Event, outcome: str) -> None:
        if (self.epochs.state, event) in TRANSITIONS:
            self.step(event, outcome)

    @precondition(lambda self: self.epochs.state is State.RELEASED)
    @rule()
    def daemon_holds_again(self) -> None:
        # OutputBuffer.hold: only into an empty queue.
        self.plug.run(len(self.plug.queue))
        self.step(Event.HOLD)

    @invariant()
    def no_frame_leaves_before_its_release(self) -> None:
        for frame in self.plug.left:
            assert frame in self.let_go or self.epoch_of[frame] <= self.epochs.released or (
                self.ignorant and self.epoch_of[frame] <= self.epochs.closed
            ), (frame, self.epoch_of[frame], self.epochs.released)  # fmt: skip

    @invariant()
    def frames_leave_in_order_and_once(self) -> None:
        assert self.plug.left == self.accepted[: len(self.plug.left)]

    @invariant()
    def a_released_epoch_is_not_kept(self) -> None:
        """Once the host has had time, nothing of a released epoch is held."""
        if self.ignorant:
            return
        waiting = list(self.plug.queue)
        may_leave = len(waiting) if self.plug.unplugged else self.plug.to_release
        for frame in waiting[may_leave:]:
            assert self.epoch_of[frame] > self.epochs.released, frame

    @invariant()
    def epochs_agree(self) -> None:
        self.epochs.check_invariants()


TestCommit = Commit.TestCase


def test_the_model_shows_why_two_epochs_must_not_wait() -> None:
    """The fault that the state machine is there to prevent: the first epoch's frame stays."""
    plug = SchPlug(limit=12)
    plug.enqueue(1)
    plug.act(PlugAction.BUFFER)
    plug.enqueue(2)
    plug.act(PlugAction.BUFFER)
    plug.act(PlugAction.RELEASE_ONE)
    plug.act(PlugAction.RELEASE_ONE)
    plug.run(10)
    assert plug.left == [1]
    assert list(plug.queue) == [2]
