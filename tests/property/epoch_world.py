# SPDX-License-Identifier: Apache-2.0
"""A model of everything around the two epoch machines: hosts, links, guest, and who sees what.

The world delivers messages in order, late, or never; cuts power; kills and restarts daemons.  After
every step :meth:`World.check` looks at it from outside: was anything seen too early, do two copies
have visible output, can the survivor account for all that was seen?
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from kemari import actions as act
from kemari.epoch import LetGoReason, Primary, PrimaryState
from kemari.successor import Standby, StandbyState


class World:
    """Host a runs the guest, host b stands by.

    :param policy_release: ``on_standby_loss``; partitions are only possible without it
    :ivar seen: (host, epoch, token) of all output that left
    :ivar acked: highest epoch that b has ever acknowledged
    """

    def __init__(self, *, policy_release: bool) -> None:
        self.policy_release = policy_release
        self.primary: Primary | None = Primary()
        self.standby: Standby | None = Standby()
        self.power = {"a": True, "b": True}
        self.partitioned = False
        self.link_up = True
        self.guest_on_a = True
        self.paused = False
        self.begun = False
        self.holding = False
        self.tokens = 0
        self.held: list[tuple[int, int]] = []
        self.seen: list[tuple[str, int, int]] = []
        self.acked = 0
        self.promised = False
        self.owned_on_disk = False
        self.to_a: deque[tuple[str, int]] = deque()
        self.to_b: deque[tuple[str, int]] = deque()
        self.capture: act.Capture | None = None
        self.revival = 0
        self.retry_due = False
        self.interval_armed = False
        self.asking = False
        self.let_go_at_a: LetGoReason | None = None
        self.survivor_epoch: int | None = None

    # ---- Steps; each has a guard of the same name in STEPS ----

    def begin(self) -> None:
        """The base copy is done."""
        assert self.primary
        self.begun = self.holding = True
        self._a(self.primary.begin())

    def produce(self) -> None:
        """The guest sends a frame."""
        assert self.primary
        self.tokens += 1
        if self.holding:
            self.held.append((self.primary.captured + 1, self.tokens))
            self._a(self.primary.output_held())
        else:
            self.seen.append(("a", 0, self.tokens))

    def elapse(self) -> None:
        """The interval timer fires."""
        assert self.primary
        self.interval_armed = False
        self._a(self.primary.interval_elapsed())

    def finish_capture(self) -> None:
        """The capture that was asked for succeeds."""
        assert self.primary
        assert self.capture
        capture, self.capture = self.capture, None
        self.paused = capture.keep_paused
        self._a(self.primary.captured_epoch(capture.epoch))

    def fail_capture(self) -> None:
        """No usable pause point."""
        assert self.primary
        self.capture = None
        self.paused = False
        self._a(self.primary.capture_failed())

    def retry(self) -> None:
        """The wait after that is over."""
        assert self.primary
        self.retry_due = False
        self._a(self.primary.retry())

    def fill_buffer(self) -> None:
        """The output buffer reaches its limit."""
        assert self.primary
        self._a(self.primary.buffer_full())

    def be_late(self) -> None:
        """The epoch in flight takes long."""
        assert self.primary
        self._a(self.primary.epoch_late())

    def deliver_to_b(self) -> None:
        """b receives the next message."""
        assert self.standby
        kind, number = self.to_b.popleft()
        if kind == "commit":
            self._b(self.standby.committed(number))
        else:
            self._b(self.standby.handed_over(number))

    def deliver_to_a(self) -> None:
        """a receives the next message."""
        assert self.primary
        kind, number = self.to_a.popleft()
        match kind:
            case "ack":
                self._a(self.primary.acked_epoch(number))
            case "running":
                self._a(self.primary.standby_runs(number))
            case "declined":
                self._a(self.primary.stood_down())

    def revive(self) -> None:
        """The guest comes to life on b."""
        assert self.standby
        self.survivor_epoch, self.revival = self.revival, 0
        self.owned_on_disk = True
        self._b(self.standby.revived())

    def fail_revival(self) -> None:
        """It does not."""
        assert self.standby
        self.revival = 0
        self._b(self.standby.revive_failed())

    def break_link(self) -> None:
        """The replication connection breaks; what was under way on it is lost."""
        self.link_up = False
        self.to_a.clear()
        self.to_b.clear()
        if self.primary:
            self._a(self.primary.link_lost())
        if self.standby:
            self._b(self.standby.link_closed())

    def partition(self) -> None:
        """No byte passes between the hosts any more; each may think what it likes."""
        self.partitioned = True
        self.link_up = False
        self.to_a.clear()
        self.to_b.clear()

    def heal(self) -> None:
        """Bytes pass again, on new connections."""
        self.partitioned = False

    def notice_at_a(self) -> None:
        """a notices the silence."""
        assert self.primary
        self._a(self.primary.link_lost())

    def notice_at_b(self) -> None:
        """b finds every path silent."""
        assert self.standby
        self._b(self.standby.primary_dead())

    def notice_link_at_b(self) -> None:
        """b finds the link silent while another path beats."""
        assert self.standby
        self._b(self.standby.link_dead())

    def ask(self) -> None:
        """a asks b to stand down, and b answers at once."""
        self.asking = False
        if self.standby is None:
            # Its daemon was restarted: the ledger answers, and a revival that was begun and not
            # finished was undone.
            answer = "runs" if self.owned_on_disk else "stood down"
            self.promised = self.promised or answer == "stood down"
        else:
            before = self.standby.state
            self._b(self.standby.asked_to_stand_down())
            runs = before in (StandbyState.RUNNING, StandbyState.TAKING_OVER)
            if before is StandbyState.TAKING_OVER:
                self.asking = True  # "reviving": ask again
                return
            answer = "runs" if runs else "stood down"
        if self.primary is not None:
            if answer == "runs":
                self._a(self.primary.standby_runs(2))
            else:
                self._a(self.primary.stood_down())
        elif answer == "runs":
            self.guest_on_a = False
            self.held.clear()
        else:
            self._let_go(LetGoReason.PROMISE)

    def give_up_asking(self) -> None:
        """a gets no answer on any path."""
        assert self.primary
        self.asking = False
        self._a(self.primary.no_answer(release=self.policy_release))

    def stop(self) -> None:
        """The administrator ends the protection."""
        assert self.primary
        self._a(self.primary.stop())

    def hand_over(self) -> None:
        """The administrator wants the guest on b."""
        assert self.primary
        self._a(self.primary.handover())

    def cut_a(self) -> None:
        """Power cut of the primary."""
        self.power["a"] = False
        self.primary = None
        self.guest_on_a = False
        self.held.clear()
        self.capture = None
        self.asking = False

    def cut_b(self) -> None:
        """Power cut of the standby."""
        self.power["b"] = False
        self.standby = None
        self.revival = 0
        self.to_a.clear()
        self.to_b.clear()

    def kill_daemon_a(self) -> None:
        """SIGKILL; the kernel keeps the output held.  The restarted daemon asks first."""
        assert self.primary
        protected = self.begun and self.primary.let_go is None
        self.let_go_at_a = self.primary.let_go
        self.primary = None
        self.capture = None
        self.paused = False
        self.asking = protected and self.guest_on_a
        self.link_up = False
        if self.standby:
            self._b(self.standby.link_closed())

    def kill_daemon_b(self) -> None:
        """SIGKILL; a revived guest lives on, a shell is of no more use."""
        self.standby = None
        self.revival = 0
        self.link_up = False
        if self.primary:
            self._a(self.primary.link_lost())

    # ---- Actions ----

    def _a(self, actions: act.Actions) -> None:
        assert self.primary
        for action in actions:
            match action:
                case act.Capture():
                    assert self.capture is None, "two captures at once"
                    self.capture = action
                case act.Send(number):
                    self._a(self.primary.sent_epoch(number))
                    if self.link_up:
                        self.to_b.append(("commit", number))
                case act.Release(number):
                    self._release(number)
                case act.ArmInterval():
                    self.interval_armed = True
                case act.ArmRetry():
                    self.retry_due = True
                case act.Pause():
                    self.paused = True
                case act.Unpause():
                    self.paused = False
                case act.Ask():
                    self.asking = True
                case act.Handover(number):
                    if self.link_up:
                        self.to_b.append(("handover", number))
                case act.LetGo():
                    assert self.primary.let_go
                    self._let_go(self.primary.let_go)
                case act.Abandon():
                    self.guest_on_a = False
                    self.held.clear()
                case _:
                    raise AssertionError(action)

    def _b(self, actions: act.Actions) -> None:
        assert self.standby
        for action in actions:
            match action:
                case act.Ack(number):
                    self.acked = max(self.acked, number)
                    if self.link_up:
                        self.to_a.append(("ack", number))
                case act.Apply() | act.Discard() | act.DestroyShell():
                    pass
                case act.Revive(number):
                    assert number == self.acked, "not the last complete epoch"
                    self.revival = number
                case act.PromiseStoodDown():
                    self.promised = True
                    if self.standby.planned and self.link_up:
                        self.to_a.append(("declined", 0))
                case act.TellRunning():
                    if self.standby.planned and self.link_up:
                        self.to_a.append(("running", 2))
                case _:
                    raise AssertionError(action)

    def _release(self, number: int) -> None:
        for epoch, token in list(self.held):
            if epoch <= number:
                self.held.remove((epoch, token))
                self.seen.append(("a", epoch, token))

    def _let_go(self, reason: LetGoReason) -> None:
        self.let_go_at_a = reason
        self.holding = False
        for _, token in self.held:
            self.seen.append(("a", 0, token))
        self.held.clear()

    # ---- From outside ----

    @property
    def a_visible(self) -> bool:
        """Whether the copy on a can be seen from outside."""
        return self.guest_on_a and (not self.holding or self.let_go_at_a is not None)

    @property
    def b_visible(self) -> bool:
        """Whether the copy on b can be seen from outside."""
        return self.survivor_epoch is not None and self.power["b"]

    def check(self) -> None:
        """What must hold at any moment."""
        if self.primary:
            self.primary.check_invariants()
        if self.standby:
            self.standby.check_invariants()
        for _, epoch, token in self.seen:
            assert epoch <= self.acked, f"output {token} of epoch {epoch} was seen before its ack"
        assert not (self.a_visible and self.b_visible), "two copies have visible output"
        assert not (self.promised and self.b_visible), "b runs what it has given up"
        if self.survivor_epoch is not None:
            late = [token for _, epoch, token in self.seen if epoch > self.survivor_epoch]
            assert not late, f"{late} were seen, but the survivor knows nothing of them"
        if self.primary and self.guest_on_a and self.paused and self.capture is None:
            reason = self.primary.stalled or self.primary.handed
            assert reason, "the guest is left paused for no reason"


def _primary_in(*states: PrimaryState) -> Callable[[World], bool]:
    return lambda world: world.primary is not None and world.primary.state in states


def _can_ask(world: World) -> bool:
    return world.asking and world.power["a"] and world.power["b"] and not world.partitioned


def _can_give_up(world: World) -> bool:
    unreachable = not world.power["b"] or world.partitioned
    return world.asking and world.primary is not None and unreachable


def _a_is_silent(world: World) -> bool:
    return world.standby is not None and (not world.power["a"] or world.partitioned)


_ALIVE = (PrimaryState.COPYING, PrimaryState.PROTECTED, PrimaryState.HANDING_OVER)

#: Step -> whether it can happen now.
STEPS: dict[str, Callable[[World], bool]] = {
    "begin": lambda w: not w.begun and w.primary is not None and not w.primary.over,
    "produce": lambda w: (
        w.primary is not None and w.guest_on_a and not w.paused and not w.primary.over
    ),
    "elapse": lambda w: w.interval_armed and w.primary is not None,
    "finish_capture": lambda w: w.capture is not None,
    "fail_capture": lambda w: w.capture is not None,
    "retry": lambda w: w.retry_due and w.primary is not None,
    "fill_buffer": lambda w: bool(w.held) and w.primary is not None,
    "be_late": lambda w: w.primary is not None,
    "deliver_to_b": lambda w: bool(w.to_b) and w.standby is not None,
    "deliver_to_a": lambda w: bool(w.to_a) and w.primary is not None,
    "revive": lambda w: w.revival > 0 and w.standby is not None,
    "fail_revival": lambda w: w.revival > 0 and w.standby is not None,
    "break_link": lambda w: w.link_up and w.begun and w.power["a"] and w.power["b"],
    # With the policy "release", a total partition shows two owners: docs/failure-model.md says so.
    # Not so after a handover, when the policy does not count.
    "partition": lambda w: (
        not w.partitioned
        and w.begun
        and (not w.policy_release or (w.primary is not None and w.primary.handed))
    ),
    "heal": lambda w: w.partitioned,
    "notice_at_a": lambda w: (
        w.begun
        and _primary_in(*_ALIVE)(w)
        and (not w.power["b"] or w.standby is None or not w.link_up)
    ),
    "notice_at_b": _a_is_silent,
    "notice_link_at_b": lambda w: (
        w.standby is not None and w.power["a"] and not w.partitioned and not w.link_up
    ),
    "ask": _can_ask,
    "give_up_asking": _can_give_up,
    "stop": lambda w: w.begun and _primary_in(*_ALIVE)(w),
    "hand_over": lambda w: w.primary is not None and w.primary.protected,
    "cut_a": lambda w: w.power["a"] and w.power["b"],
    "cut_b": lambda w: w.power["b"] and w.power["a"],
    "kill_daemon_a": lambda w: w.primary is not None and w.begun,
    "kill_daemon_b": lambda w: w.standby is not None and w.begun,
}

#: What happens by itself when nothing else does, most urgent first; nothing here is a fault.
SETTLING = (
    "revive",
    "finish_capture",
    "deliver_to_b",
    "deliver_to_a",
    "retry",
    "heal",
    "notice_at_b",
    "notice_at_a",
    "notice_link_at_b",
    "ask",
    "give_up_asking",
)


def possible(world: World) -> list[str]:
    """Names of the steps that can happen now."""
    return [name for name, guard in STEPS.items() if guard(world)]


def step(world: World, name: str) -> None:
    """Let one step happen, and look."""
    getattr(world, name)()
    world.check()


def settle(world: World, limit: int = 60, *, heal: bool = True) -> None:
    """Let everything happen that happens by itself; without ``heal`` a partition stays."""
    for _ in range(limit):
        ready = [name for name in SETTLING if STEPS[name](world)]
        if not heal:
            ready = [name for name in ready if name != "heal"]
        cut_off = world.partitioned or not world.power["b"]
        if world.primary and world.primary.state is PrimaryState.HOLDING and cut_off:
            ready = [name for name in ready if name != "give_up_asking"]
        if world.standby and world.standby.over:
            ready = [name for name in ready if name not in ("notice_at_b", "notice_link_at_b")]
        if not ready:
            return
        step(world, ready[0])
    raise AssertionError("the world does not come to rest")
