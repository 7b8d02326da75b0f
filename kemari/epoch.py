# SPDX-License-Identifier: Apache-2.0
"""The epoch state machine of the primary: what is decided for a guest where it runs.  No I/O.

The standby's is in :mod:`kemari.successor`.  Each public method of both is an event; it returns the
actions that the caller must carry out, in order.  The invariants, checked after every event:

1. Output of epoch *n* leaves the primary only after ack(*n*): ``released <= acked``, and one epoch
   at most is in flight: ``acked <= sent <= captured <= acked + 1``.
2. ack(*n*) is sent only when the standby holds all of epoch *n*, verified:
   ``acked == complete``.
3. The standby runs only its last complete epoch, applied whole: a revival is of ``complete``,
   and ``applied == complete`` by then.
4. Two copies never both have visible output.  The primary lets output pass only with the
   standby's promise to stand down, or where a policy or an administrator decided without one
   (``let_go`` says which); the standby's promise and its takeover exclude each other for ever.
5. Losing the standby, the link or the daemon never harms the running guest: apart from the moment
   of a capture, which the driver ends itself, the guest is paused only while its output buffer is
   full or an epoch takes long (``stalled``), or its ownership has been handed over (``handed``).
   Without a standby it waits for no epoch.
"""

from __future__ import annotations

import enum

from kemari.actions import (
    Abandon,
    Actions,
    ArmInterval,
    ArmRetry,
    Ask,
    Capture,
    EpochError,
    Handover,
    LetGo,
    Pause,
    Release,
    Send,
    Unpause,
    demand,
    event,
)


class PrimaryState(enum.Enum):
    """Life of a protection on the host that runs the guest."""

    #: base copy under way; output passes, the standby has nothing that it could run
    COPYING = enum.auto()
    #: checkpoints are taken; output waits for its ack
    PROTECTED = enum.auto()
    #: ownership was given to the standby; the guest stays paused until it answers
    HANDING_OVER = enum.auto()
    #: output is held until the standby says whether it stands down
    ASKING = enum.auto()
    #: no answer, and the policy is to hold: output stays held, asking goes on
    HOLDING = enum.auto()
    #: over: the guest runs here alone, its output passes
    UNPROTECTED = enum.auto()
    #: over: the standby runs the guest, the copy here is gone
    MOVED = enum.auto()


class LetGoReason(enum.Enum):
    """On what ground all output was let go."""

    #: the standby never had a complete epoch
    NOTHING_SENT = enum.auto()
    #: the standby stood down
    PROMISE = enum.auto()
    #: no answer on any path, and the policy says release
    POLICY = enum.auto()
    #: an administrator forced it
    FORCE = enum.auto()


class Primary:
    """Decisions of the primary for one guest.

    :param interval_only: a held frame triggers no checkpoint, only the timer does
    :ivar state: see :class:`PrimaryState`
    :ivar captured: last epoch captured (0: none)
    :ivar sent: last epoch sent whole
    :ivar acked: last epoch acknowledged
    :ivar released: last epoch whose output has left
    :ivar capturing: a capture has been asked for and not yet reported
    :ivar stalled: the guest is paused because its output buffer is full, or for a slow standby
    :ivar outpaced: the guest is paused only because the epoch in flight has taken long
    :ivar handed: the guest is paused because the final epoch was captured
    :ivar let_go: why all output passes, or None while it does not
    """

    def __init__(self, *, interval_only: bool = False) -> None:
        self.state = PrimaryState.COPYING
        self.interval_only = interval_only
        self.captured = self.sent = self.acked = self.released = 0
        self.capturing = False
        self.stalled = self.outpaced = False
        self.handed = False
        self.let_go: LetGoReason | None = None
        self._trigger = False
        self._handover = False
        self._final = False
        self._retrying = False

    @property
    def over(self) -> bool:
        """Whether this protection has ended."""
        return self.state in (PrimaryState.UNPROTECTED, PrimaryState.MOVED)

    @property
    def protected(self) -> bool:
        """Whether a power cut now would lose nothing."""
        return self.state is PrimaryState.PROTECTED and self.acked > 0

    def check_invariants(self) -> None:
        """Raise AssertionError when one of the five is broken (see the module's text)."""
        demand(self.released <= self.acked, "output released before its ack")
        demand(
            self.acked <= self.sent <= self.captured <= self.acked + 1,
            f"acked {self.acked}, sent {self.sent}, captured {self.captured} are out of order",
        )
        demand(
            (self.let_go is not None) == (self.state is PrimaryState.UNPROTECTED),
            "output passes without a ground",
        )
        demand(
            self.let_go is not LetGoReason.NOTHING_SENT or self.sent == 0,
            "output passes unasked although an epoch was sent",
        )
        demand(not (self.over and self.stalled), "the guest is stalled after protection ended")
        demand(
            not self.outpaced
            or (self.stalled and self.state is PrimaryState.PROTECTED and self.acked < self.sent),
            "the guest waits for an epoch that is not under way",
        )
        demand(
            not self.handed
            or self.state
            in (
                PrimaryState.PROTECTED,
                PrimaryState.HANDING_OVER,
                PrimaryState.ASKING,
                PrimaryState.HOLDING,
                PrimaryState.MOVED,
            ),
            "the guest is left paused",
        )

    # -- the checkpoint cycle --

    @event
    def begin(self) -> Actions:
        """The base copy is on the standby: take the first checkpoint."""
        if self.over:
            return []
        self._require("begin", PrimaryState.COPYING)
        self.state = PrimaryState.PROTECTED
        self._trigger = True
        return self._next()

    @event
    def output_held(self) -> Actions:
        """A frame of the guest waits in the output buffer."""
        if self.state is PrimaryState.PROTECTED and not self.interval_only:
            self._trigger = True
        return self._next()

    @event
    def interval_elapsed(self) -> Actions:
        """The interval since the last checkpoint is over."""
        if self.state is PrimaryState.PROTECTED:
            self._trigger = True
        return self._next()

    @event
    def captured_epoch(self, epoch: int) -> Actions:
        """Epoch ``epoch`` is in the staging buffer; the guest runs again unless it was final."""
        if not self.capturing or epoch != self.captured + 1:
            raise EpochError("captured", self.state, f"epoch {epoch} was not asked for")
        self.capturing = False
        self.captured = epoch
        if self.over:
            return [Unpause()] if self.state is PrimaryState.UNPROTECTED else []
        self.handed = self._final
        # The driver lets the guest run at the end of a capture that was begun before the stall.
        actions: Actions = [Pause()] if self.stalled else []
        # While the protection was ending, the capture is of no more use: it is never sent, so the
        # standby cannot own it.
        return [*actions, Send(epoch)] if self.state is PrimaryState.PROTECTED else actions

    @event
    def capture_failed(self) -> Actions:
        """No usable pause point, or staging too small; the guest runs, nothing was lost."""
        if not self.capturing:
            raise EpochError("capture failed", self.state, "none was asked for")
        self.capturing = False
        self.stalled = False  # the driver let it run, and it must, to reach a usable pause point
        if self.state is not PrimaryState.PROTECTED:
            return []
        self._trigger = True
        self._retrying = True
        return [ArmRetry()]

    @event
    def retry(self) -> Actions:
        """The wait after a failed capture is over."""
        self._retrying = False
        return self._next()

    @event
    def sent_epoch(self, epoch: int) -> Actions:
        """Epoch ``epoch`` is on its way: from here on the standby may hold it whole."""
        if epoch != self.captured or epoch != self.sent + 1:
            raise EpochError("sent", self.state, f"epoch {epoch}, expected {self.captured}")
        self.sent = epoch
        return []

    @event
    def acked_epoch(self, epoch: int) -> Actions:
        """The standby holds epoch ``epoch``, verified."""
        if epoch <= self.acked:
            return []
        if epoch > self.sent:
            raise EpochError("ack", self.state, f"epoch {epoch}, but {self.sent} was the last sent")
        self.acked = epoch
        if self.state not in (PrimaryState.PROTECTED, PrimaryState.HANDING_OVER):
            # While the standby is asked it may have taken over since: its copy answers for this
            # epoch then, and what this one has to say goes with the rest, or is dropped.
            return []
        actions: Actions = [Release(epoch)]
        self.released = epoch
        if self.stalled:
            self.stalled = self.outpaced = False
            if not self.handed:
                actions.append(Unpause())
        if self.state is PrimaryState.PROTECTED:
            if self.handed:
                self.state = PrimaryState.HANDING_OVER
                actions.append(Handover(epoch))
            else:
                actions.append(ArmInterval())
                actions += self._next()
        return actions

    @event
    def buffer_full(self) -> Actions:
        """Held output is above the limit: the guest waits rather than lose frames."""
        if self.over or self.handed or self.state is PrimaryState.COPYING:
            return []
        if self.stalled and not self.outpaced:
            return []
        actions: Actions = [] if self.stalled else [Pause()]
        self.stalled, self.outpaced = True, False
        if self.state is PrimaryState.PROTECTED:
            self._trigger = True
        return [*actions, *self._next()]

    @event
    def epoch_late(self) -> Actions:
        """The epoch in flight takes long: the guest waits for its ack, instead of changing more
        than the link and the standby can take.
        """
        under_way = self.state is PrimaryState.PROTECTED and self.acked < self.sent
        if not under_way or self.stalled or self.handed:
            return []
        self.stalled = self.outpaced = True
        self._trigger = True  # what it has changed meanwhile is the next epoch, and no more
        return [Pause()]

    def _next(self) -> Actions:
        idle = (
            self.state is PrimaryState.PROTECTED
            and not self.capturing
            and not self._retrying
            and not self.handed
            and self.captured == self.acked
        )
        if not idle or not self._trigger:
            return []
        self._trigger = False
        self.capturing = True
        self._final = self._handover
        return [Capture(self.captured + 1, keep_paused=self._final or self.stalled)]

    # -- the end --

    @event
    def handover(self) -> Actions:
        """A planned failover is wanted: one final checkpoint, then the standby owns the guest."""
        if self.state is not PrimaryState.PROTECTED or self.acked == 0:
            raise EpochError("handover", self.state, "the guest is not protected")
        self._handover = True
        self._trigger = True
        return self._next()

    @event
    def stop(self) -> Actions:
        """Protection is to end: output is held until the standby has promised to stand down."""
        return self._lose()

    @event
    def link_lost(self) -> Actions:
        """The replication link broke, fell silent, or the standby broke the protocol."""
        return self._lose()

    def _lose(self) -> Actions:
        if self.state not in (
            PrimaryState.COPYING,
            PrimaryState.PROTECTED,
            PrimaryState.HANDING_OVER,
        ):
            return []
        if self.sent == 0 and self.captured == 0:
            # No COMMIT has ever left: the standby has nothing to run.
            return self._let_go(LetGoReason.NOTHING_SENT)
        self.state = PrimaryState.ASKING
        if not self.outpaced:
            return [Ask()]
        self.stalled = self.outpaced = False
        return [Ask(), Unpause()]

    @event
    def stood_down(self) -> Actions:
        """The standby promised never to run this generation."""
        return [] if self.over else self._let_go(LetGoReason.PROMISE)

    @event
    def standby_runs(self, generation: int) -> Actions:
        """The standby owns the guest since ``generation``."""
        if self.over:
            return []
        self.state = PrimaryState.MOVED
        self.stalled = self.outpaced = False
        return [Abandon(generation)]

    @event
    def no_answer(self, *, release: bool) -> Actions:
        """No path to the standby gave an answer; ``release`` is the policy.

        After a handover the policy does not count: the standby was told that it owns the guest.
        """
        if self.state not in (PrimaryState.ASKING, PrimaryState.HOLDING):
            return []
        if release and not self.handed:
            return self._let_go(LetGoReason.POLICY)
        self.state = PrimaryState.HOLDING
        return [Ask()]

    @event
    def force(self) -> Actions:
        """An administrator says that the standby does not run the guest."""
        return [] if self.over else self._let_go(LetGoReason.FORCE)

    def _let_go(self, reason: LetGoReason) -> Actions:
        paused = self.stalled or self.handed
        self.state = PrimaryState.UNPROTECTED
        self.let_go = reason
        self.stalled = self.outpaced = self.handed = False
        return [LetGo(), Unpause()] if paused else [LetGo()]

    def _require(self, event: str, state: PrimaryState) -> None:
        if self.state is not state:
            raise EpochError(event, self.state, f"expected {state.name.lower()}")
