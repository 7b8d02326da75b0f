# SPDX-License-Identifier: Apache-2.0
"""The standby's end of a replication session (``docs/protocol.md``)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any, Protocol, TypeVar

from checkpoint.codec import Decoder
from checkpoint.driver import PAGE_SIZE, Description, Shell
from checkpoint.errors import CheckpointError, ProtocolError
from checkpoint.faultpoints import reach
from checkpoint.fields import Fields
from checkpoint.incoming import Committed, Incoming
from checkpoint.link import Link, LinkError, PeerRefused, PeerSilent
from checkpoint.runstate import Runstate
from checkpoint.stages import Stages
from checkpoint.wire import (
    Frame,
    FrameType,
    decode_json,
    pack_applied,
    parse_issued,
    parse_writes,
)

_log = logging.getLogger(__name__)

INLINE = 1 << 16
"""Bytes of pages up to which a batch is handled at once; more goes to a thread."""

MAX_GUEST_PAGES = 1 << 40
"""Frame numbers in a batch have 40 bits."""

GOODBYE_TIME = 5.0
"""Seconds that the standby waits for the primary to close after the last answer."""

T = TypeVar("T")

_Handler = Callable[[Frame], Awaitable[None]]
_EPOCHS = (Runstate.PROTECTING, Runstate.COMMITTING)
_TAKES_PAGES = (Runstate.BASE, Runstate.PROTECTING, Runstate.COMMITTING)


class StaleGeneration(CheckpointError):
    """A newer generation of the guest is known here than the one that asks."""


class Outcome(Enum):
    """How a session ended in good order."""

    #: The protection was ended; the guest will not be revived here.
    STOPPED = "stopped"
    #: The guest was handed over and runs here.
    HANDED_OVER = "handed over"
    #: The guest was handed over, could not be run, and was given back.
    DECLINED = "declined"


class Standby(Protocol):
    """What the standby does for a session; never called concurrently for the same session."""

    async def prepare(
        self, description: Description, generation: int, options: dict[str, Any]
    ) -> tuple[Shell, dict[str, Any]]:
        """Build the shell; the second result goes to the primary.

        The description is untrusted where the primary is.  Any :class:`CheckpointError` refuses,
        with its sentence; :class:`StaleGeneration` says why in a way that a program understands.
        """

    async def writes(self, epoch: int, disk: int, untrusted_records: memoryview) -> None:
        """Keep records of an epoch until it is committed; those of epoch 0 are applied at once.

        May wait until there is room for them.

        :raise ProtocolError: they are not what docs/disk.md says
        :raise CheckpointError: this host's disk cannot take them
        """

    def issued(self, disk: int, position: int) -> None:
        """Records of a shared disk up to there are on its target: they need not be kept.

        :raise ProtocolError: they are not of an acknowledged epoch
        """

    def committed(self, committed: Committed) -> Awaitable[None] | None:
        """An epoch is complete and verified; called before its ACK is sent.

        :return: what to wait for before the ACK; None when there is nothing to wait for
        """

    async def handover(self, generation: int, committed: Committed) -> dict[str, Any]:
        """Own and revive the guest; the result goes to the primary.

        :raise CheckpointError: the guest never ran here, nor will
        """

    async def stop(self, reason: str) -> None:
        """The protection ends: remove the shell, for good."""


class Receiver:
    """The standby's end.

    Whatever happens, after :meth:`run` no memory is being written, an epoch that was not complete
    is dropped, and the shell holds exactly the epoch :attr:`committed`.

    :ivar link: the connection
    :ivar runstate: where the session is
    :ivar shell: the shell, once prepared
    :ivar description: the guest, once prepared
    :ivar generation: the generation that the session protects
    :ivar committed: the last acknowledged epoch; None before the base copy is complete
    :ivar stood_down: whether the primary was or may have been told that this end never takes over
    :ivar stages: how long each epoch took here: from its first frame to COMMIT ("receive", in which
        "verify" is contained), from COMMIT to ACK, and to apply it
    """

    def __init__(self, link: Link, standby: Standby) -> None:
        self.link = link
        self.runstate = Runstate.GREETED
        self.shell: Shell | None = None
        self.description: Description | None = None
        self.generation = 0
        self.committed: Committed | None = None
        self.stood_down = False
        self._standby = standby
        self._decoder = Decoder(0)
        self._incoming = Incoming(self._decoder)
        self._completed: tuple[Committed, Awaitable[None] | None] | None = None
        self.stages = Stages("receive", "verify", "ack", "apply")
        self._begun_ns = self._verify_ns = self._commit_ns = self._ack_ns = 0
        self._busy = False
        self._outcome: Outcome | None = None
        self._halted = False
        self._running = False
        self._done = asyncio.Event()
        self._handlers: dict[FrameType, tuple[tuple[Runstate, ...], _Handler]] = {
            FrameType.PREPARE: ((Runstate.GREETED,), self._on_prepare),
            FrameType.PAGES: (_TAKES_PAGES, self._on_pages),
            FrameType.WRITES: (_TAKES_PAGES, self._on_writes),
            FrameType.ISSUED: ((Runstate.PROTECTING,), self._on_issued),
            FrameType.STATE: ((Runstate.PROTECTING, Runstate.COMMITTING), self._on_state),
            FrameType.COMMIT: ((Runstate.BASE, Runstate.COMMITTING), self._on_commit),
            FrameType.HANDOVER: ((Runstate.PROTECTING,), self._on_handover),
            FrameType.STOP: ((Runstate.GREETED, *_TAKES_PAGES), self._on_stop),
        }

    async def run(self) -> Outcome:
        """Serve the session to its end.

        :raise LinkError: the connection ended; the primary is owed what was acknowledged
        :raise ProtocolError: the primary broke the protocol, or the standby stood down for it
        :raise ApplyError: an acknowledged epoch is only half in the shell
        :raise CheckpointError: what :class:`Standby` raised; the primary was told
        """
        self._running = True
        self.link.divert(self._arrived)
        try:
            while self._outcome is None:
                frame = await self.link.receive()
                # An epoch of which the standby was told is brought to its end all the same.
                if self._halted and self._completed is None:
                    raise self.link.error()
                self._busy = True
                await self._handle(frame)
                self._busy = False
            await self._goodbye()
            return self._outcome
        except CheckpointError as error:
            self.link.end(error, self._code(error))
            raise
        finally:
            failure = self.link.failure
            lost = failure is None or isinstance(failure, LinkError)
            self.stood_down = (
                self._outcome in (Outcome.STOPPED, Outcome.DECLINED)
                or isinstance(failure, PeerRefused)
                or not lost
            )
            self.runstate = Runstate.CLOSED
            self.link.divert(None)
            self._incoming.drop()
            self.link.end(None)
            self._done.set()

    @property
    def at_rest(self) -> Committed | None:
        """The last complete epoch, while the shell's memory is of that one; None at other times."""
        committed = self.committed
        whole = committed is not None and self._incoming.number == committed.epoch + 1
        return committed if whole else None

    async def halt(self) -> None:
        """Nothing is heard of the primary: end :meth:`run` now, which raises ``PeerSilent``.

        Returns when it has ended: no memory is being written.
        """
        self._halted = True
        self.link.end(PeerSilent(f"{self.link.peer_address} is silent"))
        if self._running:
            await self._done.wait()

    def _code(self, error: CheckpointError) -> str:
        """The code of the ERROR frame for an error of this end."""
        if isinstance(error, ProtocolError):
            return "protocol"
        if isinstance(error, StaleGeneration):
            return "stale"
        return "refused" if self.runstate is Runstate.PREPARING else "internal"

    async def _goodbye(self) -> None:
        """Let the primary close first, so that no reset destroys the last answer on its way."""
        try:
            async with asyncio.timeout(GOODBYE_TIME):
                await self.link.wait_closed()
        except TimeoutError:
            _log.info("%s did not close after the session", self.link.peer_address)

    async def _work(self, size: int, call: Callable[..., T], *arguments: Any) -> T:
        """Run a loop over ``size`` bytes where it disturbs least; cancelled only after its end."""
        if size < INLINE:
            return call(*arguments)
        work = asyncio.get_running_loop().run_in_executor(None, lambda: call(*arguments))
        try:
            return await asyncio.shield(work)
        finally:
            while not work.done():
                try:
                    await asyncio.wait([work])
                except asyncio.CancelledError:
                    # The first one is on its way already; memory is still being written.
                    continue

    # ---- Frames ----

    def _arrived(self, frame: Frame) -> bool:
        """Handle a small frame of an epoch where it arrived; False leaves it to :meth:`run`."""
        if self._busy or self.runstate not in _EPOCHS or len(frame.payload) >= INLINE:
            return False
        match frame.type:
            case FrameType.PAGES:
                self._begin_contents(frame)
                began = time.monotonic_ns()
                batch = self._decoder.verify(frame.flags, frame.payload)
                self._verify_ns += time.monotonic_ns() - began
                self._incoming.hold(frame, batch)
            case FrameType.STATE:
                self._take_state(frame)
            case FrameType.ISSUED if self.runstate is Runstate.PROTECTING:
                self._standby.issued(*parse_issued(frame))
            case FrameType.COMMIT if (
                self.runstate is Runstate.COMMITTING and self._incoming.size < INLINE
            ):
                return self._commit_at_once(frame)
            case _:
                return False
        return True

    async def _handle(self, frame: Frame) -> None:
        entry = self._handlers.get(frame.type)
        if entry is None or self.runstate not in entry[0]:
            raise ProtocolError(f"{frame.type.name} came while {self.runstate.value}")
        await entry[1](frame)

    async def _on_prepare(self, frame: Frame) -> None:
        self.runstate = Runstate.PREPARING
        fields = decode_json(frame)
        self.description = _description(fields.fields("guest"))
        self.generation = fields.integer("generation")
        self.shell, detail = await self._standby.prepare(
            self.description, self.generation, fields.mapping("options")
        )
        self._decoder = Decoder(self.description.pages)
        self._incoming = Incoming(self._decoder)
        if self.shell.memory.nbytes != self.description.pages * PAGE_SIZE:
            raise CheckpointError(
                f"the shell has {self.shell.memory.nbytes} bytes of memory, expected "
                f"{self.description.pages} pages"
            )
        await self.link.send(FrameType.PREPARED, {"detail": detail})
        self.runstate = Runstate.BASE

    def _begin(self) -> None:
        if self.runstate is Runstate.PROTECTING:
            self.runstate = Runstate.COMMITTING
            self._begun_ns = time.monotonic_ns()
            self._verify_ns = 0

    def _begin_contents(self, frame: Frame) -> None:
        self._incoming.require_open(frame)
        self._begin()

    async def _on_pages(self, frame: Frame) -> None:
        assert self.shell is not None
        self._begin_contents(frame)
        size = len(frame.payload)
        began = time.monotonic_ns()
        batch = await self._work(size, self._decoder.verify, frame.flags, frame.payload)
        self._verify_ns += time.monotonic_ns() - began
        if frame.epoch == 0:
            self._incoming.count(frame, batch.pages)
            await self._work(size, self._decoder.apply, batch, self.shell.memory)
        else:
            self._incoming.hold(frame, batch)

    async def _on_writes(self, frame: Frame) -> None:
        self._begin_contents(frame)
        disk, untrusted_records = parse_writes(frame)
        self._incoming.count(frame)
        await self._standby.writes(frame.epoch, disk, untrusted_records)

    async def _on_issued(self, frame: Frame) -> None:
        self._standby.issued(*parse_issued(frame))

    def applied(self, epoch: int, disk: int, batches: int) -> None:
        """Tell the primary what is on this host's disk, unless the session is over."""
        if self.runstate in _TAKES_PAGES and not self.link.closed:
            self.link.put(FrameType.APPLIED, pack_applied(disk, batches), epoch=epoch)
            self.link.push()

    async def _on_state(self, frame: Frame) -> None:
        self._take_state(frame)

    def _take_state(self, frame: Frame) -> None:
        self._begin()
        self._incoming.take_state(frame)

    def _complete(self, frame: Frame) -> tuple[Committed, Awaitable[None] | None]:
        """Compare COMMIT with what came, and tell :class:`Standby`."""
        self._commit_ns = time.monotonic_ns()
        # Nothing but heartbeats follows COMMIT, so that is when it came.
        committed = self._incoming.complete(frame, self.link.last_heard)
        return committed, self._standby.committed(committed)

    def _commit_at_once(self, frame: Frame) -> bool:
        committed, wait = self._complete(frame)
        if wait is not None:
            self._completed = (committed, wait)
            return False
        try:
            self._acknowledge(committed)
            self.link.push()
            reach("ack-sent")
        finally:
            self._apply()
            self._end_epoch()
        return True

    async def _on_commit(self, frame: Frame) -> None:
        # What the callback that received COMMIT has begun, if it has.
        committed, wait = self._completed or self._complete(frame)
        self._completed = None
        if wait is not None:
            await wait
        try:
            self._acknowledge(committed)
            await self.link.flush()
            reach("ack-sent")
        finally:
            await self._work(self._incoming.size, self._apply)
            self._end_epoch()

    def _acknowledge(self, committed: Committed) -> None:
        reach("epoch-complete")
        # From here the epoch counts: it is applied even if its ACK cannot be sent any more.
        self.committed = committed
        self.link.put(FrameType.ACK, epoch=committed.epoch)
        self._ack_ns = time.monotonic_ns()

    def _apply(self) -> None:
        assert self.shell is not None
        self._incoming.apply(self.shell.memory)

    def _end_epoch(self) -> None:
        reach("applied")
        now = time.monotonic_ns()
        if self._begun_ns:  # not the base copy
            self.stages.add(
                self._commit_ns - self._begun_ns,
                self._verify_ns,
                self._ack_ns - self._commit_ns,
                now - self._ack_ns,
            )
        self._begun_ns = 0
        self._incoming.next()
        self.runstate = Runstate.PROTECTING

    async def _on_handover(self, frame: Frame) -> None:
        generation = decode_json(frame).integer("generation")
        committed = self.committed
        if committed is None or committed.epoch < 1 or frame.epoch != committed.epoch:
            raise ProtocolError(f"HANDOVER of epoch {frame.epoch}, which is not the last")
        if generation <= self.generation:
            raise ProtocolError(f"HANDOVER to generation {generation}, after {self.generation}")
        self.runstate = Runstate.HANDING_OVER
        try:
            detail = await self._standby.handover(generation, committed)
        except CheckpointError as error:
            self._outcome = Outcome.DECLINED
            await self._answer(FrameType.DECLINED, {"message": str(error)}, frame.epoch)
            return
        self._outcome = Outcome.HANDED_OVER
        running = {"generation": generation, "detail": detail}
        await self._answer(FrameType.RUNNING, running, frame.epoch)

    async def _on_stop(self, frame: Frame) -> None:
        reason = decode_json(frame).text("reason")
        self.runstate = Runstate.STOPPING
        await self._standby.stop(reason)
        self._outcome = Outcome.STOPPED
        await self._answer(FrameType.STOPPED, {})

    async def _answer(self, frame_type: FrameType, value: dict[str, Any], epoch: int = 0) -> None:
        """Send the last answer.  What it says is a fact, whether or not the primary hears it."""
        try:
            await self.link.send(frame_type, value, epoch=epoch)
        except CheckpointError as error:
            _log.warning("%s did not reach the primary: %s", frame_type.name, error)


def _description(untrusted_fields: Fields) -> Description:
    return Description(
        name=untrusted_fields.text("name"),
        uuid=untrusted_fields.text("uuid"),
        domid=untrusted_fields.integer("domid"),
        vcpus=untrusted_fields.integer("vcpus", 1),
        pages=untrusted_fields.integer("pages", 1, MAX_GUEST_PAGES),
        driver=untrusted_fields.text("driver"),
        detail=untrusted_fields.mapping("detail"),
    )
