# SPDX-License-Identifier: Apache-2.0
"""Where a replication session is (``docs/protocol.md``: Both ends as state machines)."""

from __future__ import annotations

from enum import Enum


class Runstate(Enum):
    """Where a session is; the same for both ends."""

    #: The connection is greeted, nothing was asked for.
    GREETED = "greeted"
    #: The standby builds the shell.
    PREPARING = "preparing"
    #: The base copy runs; there is nothing that the standby could run.
    BASE = "base"
    #: The last epoch is acknowledged, no other is in flight.
    PROTECTING = "protecting"
    #: An epoch is in flight.
    COMMITTING = "committing"
    #: The standby was given the guest and has not answered.
    HANDING_OVER = "handing over"
    #: The end of protection was asked for and not answered.
    STOPPING = "stopping"
    #: Over.
    CLOSED = "closed"


class StateError(RuntimeError):
    """A method was called in a run state that it does not allow: a mistake of the caller.

    :ivar state: the run state
    :ivar allowed: those that the method allows
    """

    def __init__(self, what: str, state: Runstate, allowed: tuple[Runstate, ...]) -> None:
        self.state = state
        self.allowed = allowed
        names = " or ".join(one.value for one in allowed)
        super().__init__(f"{what} while {state.value}, expected {names}")
