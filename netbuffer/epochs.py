# SPDX-License-Identifier: Apache-2.0
"""Which epoch the held frames belong to: a state machine without I/O.

``sch_plug`` counts the frames of two epochs only: the one that fills now and the last one that
was closed (``pkts_current_epoch`` and ``pkts_last_epoch`` in Linux ``net/sched/sch_plug.c``).  A
second TCQ_PLUG_BUFFER before TCQ_PLUG_RELEASE_ONE overwrites the older count, and its frames
would stay behind for ever; the kernel says nothing, and neither state nor counts can be read
back.  So they are kept here, and a call that does not fit is refused before the kernel sees it.

::

                 SETUP            CLOSE
        DOWN ------------> HOLDING ----> CLOSED
                            ^ ^  |  <----   |
                       HOLD | |  | RELEASE  |
                            | |  v          v
                            RELEASED <------+      RELEASE_ALL, from any state but DOWN
                                                   TEARDOWN, from any state, to DOWN

A step is two calls: :meth:`Epochs.begin` says what to ask of the kernel, then :meth:`Epochs.done`
or :meth:`Epochs.failed` says what came of it.  Between the two, and after an outcome that is not
known, only RELEASE_ALL and TEARDOWN are possible: both are right whatever the kernel did.

Invariants (:meth:`Epochs.check_invariants`):

1. at most one epoch is closed and not released, and exactly one in state CLOSED;
2. epochs are released in the order in which they were closed, none twice;
3. nothing is closed or released in state DOWN.
"""

from __future__ import annotations

from enum import Enum, IntEnum

from netbuffer.errors import EpochError


class PlugAction(IntEnum):
    """What ``sch_plug`` can be told; values of TCQ_PLUG_* in Linux ``linux/pkt_sched.h``."""

    #: End the epoch that fills now and begin another one; hold.
    BUFFER = 0
    #: Let go the frames of the epoch that was closed last; hold all others.
    RELEASE_ONE = 1
    #: Let go everything, and pass on what comes until the next BUFFER.
    RELEASE_INDEFINITE = 2
    #: Set the queue's size in bytes.
    LIMIT = 3

    @property
    def netlink_name(self) -> str:
        """The only spelling that pyroute2 encodes; anything else becomes BUFFER silently."""
        return f"TCQ_PLUG_{self.name}"


class State(Enum):
    """What the buffer does with the guest's frames."""

    #: There is no buffer; frames pass.
    DOWN = "not set up"
    #: Frames are held; no closed epoch waits.
    HOLDING = "holding"
    #: Frames are held; one closed epoch waits for its release.
    CLOSED = "holding a closed epoch"
    #: Frames pass through the buffer: the guest runs unprotected.
    RELEASED = "released"
    #: A request to the kernel had no known outcome.
    UNKNOWN = "in an unknown state"

    # Enum's own is a function in Python, which each step would call several times.
    __hash__ = object.__hash__


class Event(Enum):
    """What can be asked of the buffer."""

    SETUP = "be set up"
    CLOSE = "close an epoch"
    RELEASE = "release an epoch"
    RELEASE_ALL = "release everything"
    HOLD = "hold"
    TEARDOWN = "be torn down"

    __hash__ = object.__hash__  # as above


#: (state, event) -> (what to ask of the kernel, state afterwards)
TRANSITIONS: dict[tuple[State, Event], tuple[PlugAction | None, State]] = {
    # A new sch_plug holds from its first frame (plug_init), so there is nothing to ask.
    (State.DOWN, Event.SETUP): (None, State.HOLDING),
    (State.HOLDING, Event.CLOSE): (PlugAction.BUFFER, State.CLOSED),
    (State.CLOSED, Event.RELEASE): (PlugAction.RELEASE_ONE, State.HOLDING),
    (State.HOLDING, Event.RELEASE_ALL): (PlugAction.RELEASE_INDEFINITE, State.RELEASED),
    (State.CLOSED, Event.RELEASE_ALL): (PlugAction.RELEASE_INDEFINITE, State.RELEASED),
    (State.RELEASED, Event.RELEASE_ALL): (PlugAction.RELEASE_INDEFINITE, State.RELEASED),
    (State.UNKNOWN, Event.RELEASE_ALL): (PlugAction.RELEASE_INDEFINITE, State.RELEASED),
    (State.RELEASED, Event.HOLD): (PlugAction.BUFFER, State.HOLDING),
    # Holding already: BUFFER again would overwrite the count of an epoch.
    (State.HOLDING, Event.HOLD): (None, State.HOLDING),
    (State.CLOSED, Event.HOLD): (None, State.CLOSED),
    **{(state, Event.TEARDOWN): (None, State.DOWN) for state in State},
}


class Epochs:
    """The states and the numbers of the epochs of one buffer.

    :ivar state: what the buffer does now
    :ivar closed: number of epochs closed since SETUP, which is the number of the last one
    :ivar released: number of the last epoch whose frames were let go
    """

    __slots__ = ("_pending", "closed", "released", "state")

    def __init__(self) -> None:
        self.state = State.DOWN
        self.closed = 0
        self.released = 0
        self._pending: tuple[Event, State] | None = None

    def begin(self, event: Event) -> PlugAction | None:
        """Start a step.

        :return: what to ask of the kernel; None when there is nothing to ask
        :raise EpochError: the event does not fit the state; nothing was changed
        """
        if self._pending is not None and event not in (Event.RELEASE_ALL, Event.TEARDOWN):
            raise EpochError(event.value, f"asked to {self._pending[0].value}", "at rest")
        try:
            action, after = TRANSITIONS[self.state, event]
        except KeyError:
            fits = [state.value for state, possible in TRANSITIONS if possible is event]
            raise EpochError(event.value, self.state.value, " or ".join(fits)) from None
        self._pending = (event, after)
        return action

    def done(self) -> None:
        """End the step: the kernel did what :meth:`begin` said."""
        event, self.state = self._take_pending()
        match event:
            case Event.SETUP:
                self.closed = self.released = 0
            case Event.CLOSE:
                self.closed += 1
            case Event.RELEASE:
                self.released += 1
            case Event.RELEASE_ALL | Event.TEARDOWN:
                self.released = self.closed
            case Event.HOLD:
                pass
        self.check_invariants()

    def failed(self, *, refused: bool) -> None:
        """End the step: it did not work.

        :param refused: the kernel said no, so nothing has changed; otherwise the outcome is not
            known, and the state becomes UNKNOWN
        """
        self._take_pending()
        if not refused:
            self.state = State.UNKNOWN
        self.check_invariants()

    def check_invariants(self) -> None:
        """Check what is written in the module's docstring.

        :raise AssertionError: with the numbers; a fault of this program
        """
        waiting = self.closed - self.released
        allowed = {State.CLOSED: (1,), State.UNKNOWN: (0, 1)}.get(self.state, (0,))
        if waiting not in allowed or self.released < 0:
            raise AssertionError(f"{self.state}: closed {self.closed}, released {self.released}")

    def _take_pending(self) -> tuple[Event, State]:
        if self._pending is None:
            raise AssertionError("no step was begun")
        pending, self._pending = self._pending, None
        return pending
