# SPDX-License-Identifier: Apache-2.0
"""What the epoch state machines ask their callers to do, and their frame.

See :mod:`kemari.epoch` and :mod:`kemari.successor`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar


@dataclass(frozen=True, slots=True)
class Capture:
    """Capture epoch ``epoch``, closing its output; ``keep_paused`` leaves the guest paused."""

    epoch: int
    keep_paused: bool = False


@dataclass(frozen=True, slots=True)
class Send:
    """Send the captured epoch ``epoch``."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Release:
    """Let the output of epoch ``epoch`` leave."""

    epoch: int


@dataclass(frozen=True, slots=True)
class ArmInterval:
    """Start the interval timer anew; it ends in ``interval_elapsed``."""


@dataclass(frozen=True, slots=True)
class ArmRetry:
    """Call ``retry`` after a short while: the guest was not at a usable pause point."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Stop the guest: its output buffer is full."""


@dataclass(frozen=True, slots=True)
class Unpause:
    """Let the guest run on."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the standby over every path to stand down; one of three events answers."""


@dataclass(frozen=True, slots=True)
class Handover:
    """Tell the standby that it owns the guest from epoch ``epoch``."""

    epoch: int


@dataclass(frozen=True, slots=True)
class LetGo:
    """Let all output pass, held and future: nobody else runs this guest."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """Destroy the guest here and drop its held output: the standby runs it since ``generation``."""

    generation: int


@dataclass(frozen=True, slots=True)
class Ack:
    """Tell the primary that epoch ``epoch`` is held whole and verified."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Apply:
    """Write the staged epoch ``epoch`` into the shell, whole."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Discard:
    """Forget an incomplete epoch."""


@dataclass(frozen=True, slots=True)
class Revive:
    """Claim the guest durably, then run it as of epoch ``epoch``."""

    epoch: int


@dataclass(frozen=True, slots=True)
class DestroyShell:
    """Remove the shell; record first that this generation will never be taken over."""


@dataclass(frozen=True, slots=True)
class PromiseStoodDown:
    """Tell the primary: this host does not and will not run this generation."""


@dataclass(frozen=True, slots=True)
class TellRunning:
    """Tell the primary, if it can be told: this host runs the guest."""


Action = (
    Capture
    | Send
    | Release
    | ArmInterval
    | ArmRetry
    | Pause
    | Unpause
    | Ask
    | Handover
    | LetGo
    | Abandon
    | Ack
    | Apply
    | Discard
    | Revive
    | DestroyShell
    | PromiseStoodDown
    | TellRunning
)

Actions = list[Action]


# ---- Events ----


class EpochError(Exception):
    """An event that cannot happen in this state: a broken peer or a fault of the caller.

    :param event: name of the event
    :param state: the state that it met
    :param problem: what is wrong
    """

    def __init__(self, event: str, state: enum.Enum, problem: str) -> None:
        self.event = event
        self.state = state
        super().__init__(f"{event} while {state.name.lower().replace('_', ' ')}: {problem}")


class Machine(Protocol):
    """A state machine that can tell whether it is in order."""

    def check_invariants(self) -> None:
        """Raise AssertionError when it is not."""


P = ParamSpec("P")
MachineT = TypeVar("MachineT", bound="Machine")


def event(
    method: Callable[Concatenate[MachineT, P], Actions],
) -> Callable[Concatenate[MachineT, P], Actions]:
    """Check the invariants after an event."""

    @wraps(method)
    def checked(self: MachineT, /, *args: P.args, **kwargs: P.kwargs) -> Actions:
        actions = method(self, *args, **kwargs)
        self.check_invariants()
        return actions

    return checked


def demand(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"invariant broken: {what}")
