# SPDX-License-Identifier: Apache-2.0
"""The primary's end of a replication session (``docs/protocol.md``)."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from checkpoint.codec import Coded
from checkpoint.driver import Description
from checkpoint.errors import CheckpointError, ProtocolError
from checkpoint.faultpoints import reach
from checkpoint.link import Link
from checkpoint.runstate import Runstate, StateError
from checkpoint.wire import (
    Buffer,
    Frame,
    FrameType,
    Totals,
    pack_issued,
    pack_writes,
    parse_applied,
)

_FLUSH = 1 << 16
"""Payloads of so many bytes are sent before the next is asked for."""


Writes = AsyncGenerator[tuple[int, Buffer], None]
"""(number of the disk, whole records) for each WRITES frame."""


class Declined(CheckpointError):
    """The standby could not run the guest that was handed over, and has given it back."""


@dataclass(frozen=True, slots=True)
class Sent:
    """Figures of one acknowledged epoch.

    :ivar wire_bytes: frames with their headers
    :ivar send_ns: from the call until everything was handed to the kernel, or waits to be
    :ivar ack_ns: from then until ACK
    """

    wire_bytes: int
    send_ns: int
    ack_ns: int


class _Awaited(NamedTuple):
    """The epoch that :meth:`Sender.start_epoch` has sent."""

    epoch: int
    acked: Callable[[Sent], None]
    begin_ns: int
    sent_ns: int


class Sender:
    """The primary's end.

    :ivar link: the connection
    :ivar runstate: where the session is
    :ivar acked: number of the last acknowledged epoch, -1 before the base copy is complete
    :ivar on_applied: called with (disk, WRITES frames of it that are on the standby's disk)
    """

    def __init__(self, link: Link) -> None:
        self.on_applied: Callable[[int, int], None] = lambda disk, batches: None
        self.link = link
        self.runstate = Runstate.GREETED
        self.acked = -1
        self._totals = Totals()
        self._awaited: _Awaited | None = None
        link.divert(self._arrived)

    @asynccontextmanager
    async def _step(
        self, what: str, allowed: tuple[Runstate, ...], during: Runstate, after: Runstate
    ) -> AsyncIterator[None]:
        """Run states of one step; a step that is not completed leaves the session closed."""
        if self.runstate not in allowed:
            raise StateError(what, self.runstate, allowed)
        self.runstate = during
        try:
            yield
        except ProtocolError as error:
            self._over(error, "protocol")
            raise
        except CheckpointError as error:
            self._over(error)
            raise
        except BaseException:
            # Cancelled, or the caller's iterable failed: the stream has a hole now.
            self._over(None)
            raise
        self.runstate = after

    def _over(self, error: CheckpointError | None, code: str = "") -> None:
        self.runstate = Runstate.CLOSED
        self.link.end(error, code)

    async def prepare(
        self, description: Description, generation: int, options: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Have the standby build the shell; what it says of it.

        :raise PeerRefused: it cannot, with the reason
        :raise CheckpointError: the connection failed
        """
        request = {
            "guest": asdict(description),
            "generation": generation,
            "options": options or {},
        }
        state = Runstate.PREPARING
        async with self._step("prepare", (Runstate.GREETED,), state, Runstate.BASE):
            await self.link.send(FrameType.PREPARE, request)
            _, fields = await self.link.expect(FrameType.PREPARED)
            return fields.mapping("detail")

    async def send_base(self, batches: Iterable[Coded]) -> int:
        """Send batches of the base copy; the bytes they took, with their headers.

        Returns when all are handed to the kernel, or few enough wait: the link sets the pace.
        """
        state = Runstate.BASE
        before = self._totals.wire_bytes
        async with self._step("send_base", (state,), state, state):
            for batch in batches:
                self._put_pages(0, batch)
                await self.link.flush()
        return self._totals.wire_bytes - before

    async def send_base_writes(self, disk: int, records: Buffer) -> None:
        """Send records of a disk while the base copy goes on; paced as :meth:`send_base`."""
        state = Runstate.BASE
        async with self._step("send_base_writes", (state,), state, state):
            self._put_writes(0, disk, records)
            await self.link.flush()

    async def finish_base(self) -> None:
        """End the base copy; returns when the standby has all of it in the shell."""
        state = Runstate.BASE
        async with self._step("finish_base", (state,), state, Runstate.PROTECTING):
            await self._commit(0, 0)
            await self._await_ack(0)

    async def send_epoch(
        self,
        epoch: int,
        batches: Iterable[Coded] | AsyncIterable[Coded],
        state: Coded,
        captured_ns: int,
        writes: Writes | None = None,
    ) -> Sent:
        """Send one epoch and wait until the standby has acknowledged it.

        Once this returns, output of the epoch may leave.  If it raises, it must not: the standby
        may have the epoch or not.

        :param epoch: one more than :attr:`acked`
        :param batches: may still be being coded
        :param captured_ns: ``time.monotonic_ns()`` when the guest was paused for it
        :param writes: records of the disks that belong to it; taken as fast as they can be sent
        """
        self._check_epoch(epoch)
        begin = time.monotonic_ns()
        allowed, during = (Runstate.PROTECTING,), Runstate.COMMITTING
        async with self._step("send_epoch", allowed, during, Runstate.PROTECTING):
            self._totals = Totals()
            if isinstance(batches, AsyncIterable):
                async for batch in batches:
                    await self._send_pages(epoch, batch)
            else:
                for batch in batches:
                    await self._send_pages(epoch, batch)
            if writes is not None:
                async for disk, records in writes:
                    self._put_writes(epoch, disk, records)
                    if len(records) >= _FLUSH:
                        await self.link.flush()
            self._put_state(epoch, state)
            await self._commit(epoch, max(0, time.monotonic_ns() - captured_ns))
            sent = time.monotonic_ns()
            await self._await_ack(epoch)
        return Sent(self._totals.wire_bytes, sent - begin, time.monotonic_ns() - sent)

    def start_epoch(
        self,
        epoch: int,
        batches: Iterable[Coded],
        state: Coded,
        captured_ns: int,
        acked: Callable[[Sent], None],
    ) -> None:
        """As :meth:`send_epoch`, for a small epoch without disk writes: waits for nothing.

        ``acked`` is called in the event loop's callback that received the ACK.  It is not called
        when the connection ends before; :meth:`Link.wait_closed` tells of that.
        """
        self._check_epoch(epoch)
        if self.runstate is not Runstate.PROTECTING:
            raise StateError("start_epoch", self.runstate, (Runstate.PROTECTING,))
        begin = time.monotonic_ns()
        self.runstate = Runstate.COMMITTING
        self._totals = Totals()
        try:
            for batch in batches:
                self._put_pages(epoch, batch)
            self._put_state(epoch, state)
            self._put_commit(epoch, max(0, time.monotonic_ns() - captured_ns))
            self._awaited = _Awaited(epoch, acked, begin, time.monotonic_ns())
            self.link.push()
            reach("commit-sent")
        except CheckpointError as error:
            self._over(error)
            raise
        except BaseException:
            self._over(None)
            raise

    def put_issued(self, disk: int, position: int) -> None:
        """Tell, before the next epoch's frames, what of a shared disk the standby may forget.

        :param position: bytes of its records, at the end of one of an acknowledged epoch
        """
        if self.runstate is not Runstate.PROTECTING:
            raise StateError("put_issued", self.runstate, (Runstate.PROTECTING,))
        self.link.put(FrameType.ISSUED, pack_issued(disk, position))

    def _arrived(self, frame: Frame) -> bool:
        awaited = self._awaited
        applied = frame.type is FrameType.APPLIED
        if awaited is None and not applied:
            return False
        try:
            if applied:
                self.on_applied(*parse_applied(frame))
                return True
            assert awaited is not None
            self._take_ack(frame, awaited.epoch)
        except ProtocolError as error:
            self._over(error, "protocol")
            raise
        now = time.monotonic_ns()
        self._awaited = None
        self.runstate = Runstate.PROTECTING
        awaited.acked(
            Sent(self._totals.wire_bytes, awaited.sent_ns - awaited.begin_ns, now - awaited.sent_ns)
        )
        return True

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self.acked + 1:
            raise ValueError(f"epoch {epoch} after epoch {self.acked}")

    def _put_state(self, epoch: int, state: Coded) -> None:
        crc = self.link.put(FrameType.STATE, state.payload, flags=state.flags, epoch=epoch)
        self._totals.add(len(state.payload), crc)

    def _put_commit(self, epoch: int, age_ns: int) -> None:
        self.link.put(FrameType.COMMIT, self._totals.pack(age_ns), epoch=epoch)

    def _put_pages(self, epoch: int, batch: Coded) -> None:
        crc = self.link.put(FrameType.PAGES, batch.payload, flags=batch.flags, epoch=epoch)
        self._totals.add(len(batch.payload), crc, batch.pages)

    async def _send_pages(self, epoch: int, batch: Coded) -> None:
        self._put_pages(epoch, batch)
        if len(batch.payload) >= _FLUSH:
            await self.link.flush()

    def _put_writes(self, epoch: int, disk: int, records: Buffer) -> None:
        payload = pack_writes(disk, records)
        crc = self.link.put(FrameType.WRITES, payload, epoch=epoch)
        self._totals.add(len(payload), crc)

    async def _commit(self, epoch: int, age_ns: int) -> None:
        self._put_commit(epoch, age_ns)
        await self.link.flush()
        reach("commit-sent")

    async def _await_ack(self, epoch: int) -> None:
        self._take_ack(await self.link.receive(), epoch)

    def _take_ack(self, frame: Frame, epoch: int) -> None:
        if frame.type is not FrameType.ACK or frame.epoch != epoch:
            raise ProtocolError(
                f"{frame.type.name} of epoch {frame.epoch} came, expected ACK of epoch {epoch}"
            )
        self.acked = epoch

    async def handover(self, generation: int) -> dict[str, Any]:
        """Give the guest, paused since the last acknowledged epoch, to the standby.

        :param generation: the one that begins
        :return: what the standby says of the running guest; this host's copy must be destroyed
        :raise Declined: the standby has given it back: it never ran there, nor will
        :raise CheckpointError: the connection failed and the owner is unknown: this host's copy
            must stay paused until :meth:`checkpoint.lifeline.Lifeline.inquire` was answered
        """
        if self.acked < 1:
            raise ValueError("no epoch was acknowledged that could be handed over")
        allowed, during = (Runstate.PROTECTING,), Runstate.HANDING_OVER
        async with self._step("handover", allowed, during, Runstate.CLOSED):
            await self.link.send(FrameType.HANDOVER, {"generation": generation}, epoch=self.acked)
            reach("handover-sent")
            frame, fields = await self.link.expect(FrameType.RUNNING, FrameType.DECLINED)
            if frame.epoch != self.acked:
                raise ProtocolError(f"{frame.type.name} is of epoch {frame.epoch}")
            if frame.type is FrameType.DECLINED:
                raise Declined(fields.text("message"))
            if fields.integer("generation") != generation:
                raise ProtocolError("RUNNING is of another generation")
            detail = fields.mapping("detail")
        await self.link.close()
        return detail

    async def stop(self, reason: str) -> None:
        """End the protection: returns when the standby has given up its right to the guest.

        :raise CheckpointError: the connection failed; whether the standby stood down is unknown
        """
        allowed = (Runstate.GREETED, Runstate.BASE, Runstate.PROTECTING)
        async with self._step("stop", allowed, Runstate.STOPPING, Runstate.CLOSED):
            await self.link.send(FrameType.STOP, {"reason": reason})
            reach("stop-sent")
            await self.link.expect(FrameType.STOPPED)
        await self.link.close()

    async def close(self) -> None:
        """Close without a word: the standby keeps what it has (idempotent)."""
        self.runstate = Runstate.CLOSED
        await self.link.close()
