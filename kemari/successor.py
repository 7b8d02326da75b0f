# SPDX-License-Identifier: Apache-2.0
"""The epoch state machine of the standby: what is decided where a guest may run next.  No I/O.

The counterpart of :mod:`kemari.epoch`, whose invariants 2 to 4 are this one's as well.
"""

from __future__ import annotations

import enum

from kemari.actions import (
    Ack,
    Actions,
    Apply,
    DestroyShell,
    Discard,
    EpochError,
    PromiseStoodDown,
    Revive,
    TellRunning,
    demand,
    event,
)


class StandbyState(enum.Enum):
    """Life of a protection on the host that stands by."""

    #: shell built, base copy arriving: nothing that could run
    COPYING = enum.auto()
    #: holds a complete epoch
    READY = enum.auto()
    #: claimed the guest, bringing it to life
    TAKING_OVER = enum.auto()
    #: over: the guest runs here
    RUNNING = enum.auto()
    #: over: holds nothing, will never run this generation
    STOOD_DOWN = enum.auto()
    #: claimed the guest, but it would not run; the shell is kept, paused
    FAILED = enum.auto()


class Standby:
    """Decisions of the standby for one guest.

    :ivar state: see :class:`StandbyState`
    :ivar complete: last epoch held whole and verified (0: none)
    :ivar acked: last epoch acknowledged
    :ivar applied: last epoch written into the shell
    :ivar planned: the takeover was asked for by the primary
    """

    def __init__(self) -> None:
        self.state = StandbyState.COPYING
        self.complete = self.acked = self.applied = 0
        self.planned = False
        self._promised = False
        self._claimed = False

    @property
    def over(self) -> bool:
        """Whether nothing more is to be received."""
        return self.state not in (StandbyState.COPYING, StandbyState.READY)

    def check_invariants(self) -> None:
        """Raise AssertionError when one of the five is broken (see the module's text)."""
        demand(self.acked == self.complete, "acknowledged what is not held whole")
        demand(self.applied == self.complete, "an epoch is applied in part or not at all")
        demand(not (self._promised and self._claimed), "took over after standing down")
        demand(
            self._claimed
            == (
                self.state in (StandbyState.TAKING_OVER, StandbyState.RUNNING, StandbyState.FAILED)
            ),
            "runs the guest without a claim",
        )
        demand(self.state is not StandbyState.COPYING or self.complete == 0, "ready, yet copying")

    @event
    def committed(self, epoch: int) -> Actions:
        """All of epoch ``epoch`` is staged and verified."""
        if self.over:
            # Its ack would let output of a guest leave that this host has taken or given up.
            return [Discard()]
        if epoch != self.complete + 1:
            raise EpochError("commit", self.state, f"epoch {epoch}, expected {self.complete + 1}")
        self.state = StandbyState.READY
        self.complete = self.acked = self.applied = epoch
        return [Ack(epoch), Apply(epoch)]

    @event
    def link_closed(self) -> Actions:
        """The primary's daemon closed the connection or died; its host lives.

        A complete copy is kept: the host may still die before its daemon is back.
        """
        if self.state is StandbyState.COPYING:
            return self._stand_down()
        return [Discard()] if self.state is StandbyState.READY else []

    @event
    def primary_dead(self) -> Actions:
        """Silence on every path for the heartbeat time-out."""
        if self.state is StandbyState.COPYING:
            return self._stand_down()
        return self._take_over() if self.state is StandbyState.READY else []

    @event
    def link_dead(self) -> Actions:
        """The replication link is silent, but the primary's host lives: another path beats."""
        return [] if self.over else [*self._stand_down(), PromiseStoodDown()]

    @event
    def asked_to_stand_down(self) -> Actions:
        """The primary, or an administrator, wants this generation to end here."""
        match self.state:
            case StandbyState.TAKING_OVER:
                return []  # answered when it is known whether the guest runs
            case StandbyState.RUNNING:
                return [TellRunning()]
            case StandbyState.STOOD_DOWN:
                return [PromiseStoodDown()]
            case StandbyState.FAILED:
                self._claimed = False
        return [*self._stand_down(), PromiseStoodDown()]

    @event
    def handed_over(self, epoch: int) -> Actions:
        """The primary gave the guest to this host as of ``epoch``."""
        if self.state is not StandbyState.READY:
            return []
        if epoch != self.complete:
            raise EpochError("handover", self.state, f"epoch {epoch}, but {self.complete} is held")
        self.planned = True
        return self._take_over()

    @event
    def revived(self) -> Actions:
        """The guest runs here."""
        self._require("revived", StandbyState.TAKING_OVER)
        self.state = StandbyState.RUNNING
        return [TellRunning()]

    @event
    def revive_failed(self) -> Actions:
        """The guest cannot run here; the shell still exists, paused.

        After a planned handover the primary still has the guest, paused: it gets it back.
        """
        self._require("revive failed", StandbyState.TAKING_OVER)
        if self.planned:
            self._claimed = False
            return [*self._stand_down(), PromiseStoodDown()]
        self.state = StandbyState.FAILED
        return []

    def _take_over(self) -> Actions:
        self.state = StandbyState.TAKING_OVER
        self._claimed = True
        return [Discard(), Revive(self.complete)]

    def _stand_down(self) -> Actions:
        self.state = StandbyState.STOOD_DOWN
        self._promised = True
        return [DestroyShell()]

    def _require(self, event: str, state: StandbyState) -> None:
        if self.state is not state:
            raise EpochError(event, self.state, f"expected {state.name.lower()}")
