# SPDX-License-Identifier: Apache-2.0
"""Liveness connections: who owns a guest, and giving up the right to it (``docs/protocol.md``).

Beside heartbeats, which are the link's, a lifeline carries questions.  Both ends ask, both answer.
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple, Protocol

from checkpoint.errors import CheckpointError, ProtocolError
from checkpoint.fields import MAX_INTEGER, Fields
from checkpoint.link import Link, LinkError
from checkpoint.wire import Frame, FrameType, decode_json

STATES = ("primary", "standby", "reviving", "running", "none")

MAX_ANSWERING = 64
"""Questions of the peer that may wait for their answers at once."""


class Owner(NamedTuple):
    """What a host knows of a guest.

    :ivar guest: the guest's UUID
    :ivar generation: the generation that it knows
    :ivar state: "primary": runs here, protected or not; "standby": a shell is here that could take
        over; "reviving": a takeover or handover is under way here; "running": was revived here;
        "none": nothing of it is here
    """

    guest: str
    generation: int
    state: str


class Answers(Protocol):
    """What a host answers; may be called concurrently."""

    async def owner(self, guest: str, generation: int) -> Owner:
        """Who owns the guest, as far as this host knows; the peer knows ``generation``."""

    async def stand_down(self, guest: str, generation: int) -> Owner | None:
        """Give up the right to revive the guest from any generation up to this one.

        None promises that, beyond a crash.  Otherwise: why not.
        """

    async def alive(self, guest: str, generation: int) -> None:
        """The peer says that the guest runs there: it must not be taken over."""


class Lifeline:
    """One end of a liveness connection; :meth:`run` must run for the others to get answers.

    :ivar link: the connection
    """

    def __init__(self, link: Link, answers: Answers) -> None:
        self.link = link
        self._answers = answers
        self._next_id = 0
        self._asked: dict[int, asyncio.Future[tuple[Frame, Fields]]] = {}

    async def run(self) -> CheckpointError | None:
        """Serve until the connection ends; why it did, None if this end closed it."""
        answering: set[asyncio.Task[None]] = set()
        try:
            while True:
                frame = await self.link.receive()
                fields = decode_json(frame)
                if frame.type in (FrameType.OWNER, FrameType.STOOD_DOWN):
                    self._answered(frame, fields)
                    continue
                if len(answering) >= MAX_ANSWERING:
                    raise ProtocolError(f"more than {MAX_ANSWERING} questions wait for an answer")
                guest, generation = fields.text("guest"), fields.integer("generation")
                number = 0 if frame.type is FrameType.ALIVE else fields.integer("id")
                task = asyncio.get_running_loop().create_task(
                    self._answer(frame.type, number, guest, generation)
                )
                answering.add(task)
                task.add_done_callback(answering.discard)
        except ProtocolError as error:
            self.link.end(error, "protocol")
        except CheckpointError as error:
            self.link.end(error)
        finally:
            for task in answering:
                task.cancel()
            self.link.end(None)
            for future in self._asked.values():
                if not future.done():
                    future.set_exception(self.link.error())
        return self.link.failure

    async def inquire(self, guest: str, generation: int, timeout: float = 2.0) -> Owner:
        """Ask who owns a guest.

        :raise LinkError: no answer within ``timeout`` seconds, or the connection ended
        """
        frame, fields = await self._ask(FrameType.INQUIRE, guest, generation, timeout)
        if frame.type is not FrameType.OWNER:
            raise self._wrong(frame)
        return self._owner(fields)

    async def stand_down(self, guest: str, generation: int, timeout: float = 2.0) -> Owner | None:
        """Ask the peer to give up its right to a guest; None when it has.

        :raise LinkError: no answer within ``timeout`` seconds, or the connection ended: then the
            peer may have stood down or not
        """
        frame, fields = await self._ask(FrameType.STAND_DOWN, guest, generation, timeout)
        if frame.type is FrameType.OWNER:
            return self._owner(fields)
        if fields.integer("generation") != generation:
            raise self._wrong(frame)
        return None

    async def alive(self, guest: str, generation: int) -> None:
        """Tell the peer that the guest runs here and must not be taken over.

        :raise CheckpointError: the connection has ended
        """
        await self.link.send(FrameType.ALIVE, {"guest": guest, "generation": generation})

    async def close(self) -> None:
        """Close the connection (idempotent)."""
        await self.link.close()

    async def _ask(
        self, frame_type: FrameType, guest: str, generation: int, timeout: float
    ) -> tuple[Frame, Fields]:
        number = self._next_id = (self._next_id + 1) % MAX_INTEGER
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                await self.link.send(
                    frame_type, {"id": number, "guest": guest, "generation": generation}
                )
                frame, fields = await future
        except TimeoutError as error:
            raise LinkError(
                f"{self.link.peer_address} did not answer {frame_type.name} within {timeout:g} s"
            ) from error
        finally:
            del self._asked[number]
        if fields.text("guest") != guest:
            raise self._wrong(frame)
        return frame, fields

    def _owner(self, untrusted_fields: Fields) -> Owner:
        try:
            return Owner(
                guest=untrusted_fields.text("guest"),
                generation=untrusted_fields.integer("generation"),
                state=untrusted_fields.choice("state", STATES),
            )
        except ProtocolError as error:
            self.link.end(error, "protocol")
            raise

    def _wrong(self, frame: Frame) -> ProtocolError:
        error = ProtocolError(f"{frame.type.name} does not answer the question")
        self.link.end(error, "protocol")
        return error

    def _answered(self, frame: Frame, fields: Fields) -> None:
        """Hand an answer to who asked; one that comes too late is nobody's."""
        future = self._asked.get(fields.integer("id"))
        if future is not None and not future.done():
            future.set_result((frame, fields))

    async def _answer(
        self, frame_type: FrameType, number: int, guest: str, generation: int
    ) -> None:
        try:
            if frame_type is FrameType.ALIVE:
                await self._answers.alive(guest, generation)
                return
            owner: Owner | None
            if frame_type is FrameType.INQUIRE:
                owner = await self._answers.owner(guest, generation)
            else:
                owner = await self._answers.stand_down(guest, generation)
            answer: dict[str, Any] = {"id": number, "guest": guest, "generation": generation}
            if owner is None:
                await self.link.send(FrameType.STOOD_DOWN, answer)
            else:
                answer |= {"generation": owner.generation, "state": owner.state}
                await self.link.send(FrameType.OWNER, answer)
        except CheckpointError as error:
            self.link.end(error, "internal")
