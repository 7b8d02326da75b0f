# SPDX-License-Identifier: Apache-2.0
"""Both ends of a session over the loopback, with a guest made of bytes; for tests."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import pytest

from checkpoint.codec import Encoder
from checkpoint.driver import PAGE_SIZE, Description, Disk, Nic, Staging, nothing
from checkpoint.errors import CheckpointError
from checkpoint.hello import Hello
from checkpoint.link import Link, LinkOptions
from checkpoint.network import Listener, connect, listen
from checkpoint.session import Committed, Outcome, Receiver, Sender, Sent
from tests.unit.patience import PATIENCE

PAGES = 100


class BytesShell:
    """A shell whose memory is not zero at first, as a toolstack leaves it."""

    def __init__(self, pages: int) -> None:
        self.memory = memoryview(bytearray(b"\x99" * (pages * PAGE_SIZE)))
        self.nics: list[Nic] = []
        self.disks: list[Disk] = []

    def examine(self, state: bytes) -> None:
        raise AssertionError("a session never looks into a state")

    def foresee(self, state: bytes) -> None:
        raise AssertionError("a session never looks ahead")

    def revive(self, state: bytes, elapsed_ns: int, running: Callable[[], None] = nothing) -> None:
        raise AssertionError("a session never revives")

    def settle(self) -> None:
        """Nothing to be named."""

    def destroy(self) -> None:
        raise AssertionError("a session never destroys")


class RecordingStandby:
    """Records what it is asked; raises what it is told to.

    :ivar calls: name and interesting argument of each call
    :ivar failures: error to raise in the call of that name
    :ivar gates: event to wait for in the call of that name
    :cvar waits: whether an epoch's ACK has something to wait for even without a gate
    """

    waits: ClassVar[bool] = False

    def __init__(self, pages: int = PAGES) -> None:
        self.shell = BytesShell(pages)
        self.calls: list[tuple[str, Any]] = []
        self.failures: dict[str, Exception] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.entered: dict[str, asyncio.Event] = {}
        self.last: Committed | None = None

    async def _called(self, name: str, argument: Any) -> None:
        self._enter(name, argument)
        if name in self.gates:
            await self.gates[name].wait()
        if name in self.failures:
            raise self.failures[name]

    def _enter(self, name: str, argument: Any) -> None:
        self.calls.append((name, argument))
        self.entered.setdefault(name, asyncio.Event()).set()

    async def prepare(
        self, description: Description, generation: int, options: dict[str, Any]
    ) -> tuple[BytesShell, dict[str, Any]]:
        await self._called("prepare", (description, generation, options))
        return self.shell, {"domid": 5}

    def issued(self, disk: int, position: int) -> None:
        self._enter("issued", (disk, position))

    async def writes(self, epoch: int, disk: int, untrusted_records: memoryview) -> None:
        await self._called("writes", (epoch, disk, bytes(untrusted_records)))

    def committed(self, committed: Committed) -> Awaitable[None] | None:
        if self.waits or "committed" in self.gates:
            return self._committed(committed)
        self._enter("committed", committed.epoch)
        if "committed" in self.failures:
            raise self.failures["committed"]
        self.last = committed
        return None

    async def _committed(self, committed: Committed) -> None:
        await asyncio.sleep(0)
        await self._called("committed", committed.epoch)
        self.last = committed

    async def handover(self, generation: int, committed: Committed) -> dict[str, Any]:
        await self._called("handover", (generation, committed.epoch))
        return {"took_ms": 12}

    async def stop(self, reason: str) -> None:
        await self._called("stop", reason)


class Guest:
    """A guest that writes, and the primary's encoder for it.

    :cvar waits: whether epochs are sent by the method that waits, or by the one that does not
    """

    waits: ClassVar[bool] = False

    def __init__(self, pages: int = PAGES) -> None:
        self.noise = random.Random(11)
        self.memory = bytearray(self.noise.randbytes(pages * PAGE_SIZE))
        self.encoder = Encoder(pages)
        self.pages = pages
        self.epoch = 0

    def description(self) -> Description:
        return Description("web", "11111111-2222-3333-4444-555555555555", 3, 1, self.pages, "bytes")

    def staging(self, gfns: Iterable[int]) -> Staging:
        frames = list(gfns)
        staging = Staging(max(1, len(frames)))
        for place, gfn in enumerate(frames):
            staging.gfns[place] = gfn
            staging.data[place * PAGE_SIZE : (place + 1) * PAGE_SIZE] = self.memory[
                gfn * PAGE_SIZE : (gfn + 1) * PAGE_SIZE
            ]
        staging.count = len(frames)
        return staging

    def write(self, count: int = 10) -> list[int]:
        """Change some pages; which."""
        gfns = self.noise.sample(range(self.pages), count)
        for gfn in gfns:
            self.memory[gfn * PAGE_SIZE + self.noise.randrange(PAGE_SIZE)] ^= 0x40
        return gfns

    async def protect(self, sender: Sender, generation: int = 1) -> dict[str, Any]:
        """Prepare and base copy."""
        detail = await sender.prepare(self.description(), generation, {"answer": 42})
        await sender.send_base(self.encoder.encode(self.staging(range(self.pages)), 32))
        await sender.send_base(self.encoder.encode(self.staging(self.write())))
        await sender.finish_base()
        return detail

    async def checkpoint(self, sender: Sender) -> Sent:
        """One epoch."""
        self.epoch += 1
        captured = time.monotonic_ns()
        staging = self.staging(self.write())
        state = self.encoder.encode_state(b"machine state %d" % self.epoch)
        batches = self.encoder.encode(staging)
        if self.waits:
            return await sender.send_epoch(self.epoch, batches, state, captured)
        acked: asyncio.Future[Sent] = asyncio.get_running_loop().create_future()
        sender.start_epoch(self.epoch, batches, state, captured, acked.set_result)
        closed = asyncio.ensure_future(sender.link.wait_closed())
        both: list[asyncio.Future[Any]] = [acked, closed]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        closed.cancel()
        if acked.done():
            return acked.result()
        raise sender.link.error()


def hello(name: str, role: str = "replicate", heartbeat: float = 10.0) -> Hello:
    return Hello(role, name, f"id of {name}", heartbeat)


class Pair:
    """A sender connected to a receiver.

    :ivar outcome: what the receiver's ``run`` returned or raised
    """

    def __init__(self, sender: Sender, receiver: Receiver, standby: RecordingStandby) -> None:
        self.sender = sender
        self.receiver = receiver
        self.standby = standby
        self.outcome: asyncio.Future[Outcome | CheckpointError] = (
            asyncio.get_running_loop().create_future()
        )

    async def serve(self) -> None:
        try:
            self.outcome.set_result(await self.receiver.run())
        except CheckpointError as error:
            self.outcome.set_result(error)

    async def ended(self) -> Outcome | CheckpointError:
        """How the receiver ended."""
        return await asyncio.wait_for(asyncio.shield(self.outcome), PATIENCE)


@asynccontextmanager
async def links(
    role: str = "replicate",
    heartbeat: float = 10.0,
    options: LinkOptions | None = None,
    server_options: LinkOptions | None = None,
) -> AsyncIterator[tuple[Link, Link]]:
    """A greeted connection: the connecting and the accepting end."""
    accepted: asyncio.Future[Link] = asyncio.get_running_loop().create_future()

    async def serve(link: Link) -> None:
        accepted.set_result(link)
        await link.wait_closed()

    listener: Listener = await listen(
        [("127.0.0.1", 0)],
        hello("b", "liveness", heartbeat),
        serve,
        server_options or options or LinkOptions(),
    )
    try:
        link = await connect(
            "127.0.0.1",
            listener.ports[0],
            hello("a", role, heartbeat),
            options or LinkOptions(),
        )
        try:
            yield link, await asyncio.wait_for(accepted, PATIENCE)
        finally:
            await link.close()
    finally:
        await listener.close()


@asynccontextmanager
async def pair(heartbeat: float = 10.0) -> AsyncIterator[Pair]:
    """A sender and a receiver that serves."""
    async with links(heartbeat=heartbeat) as (near, far):
        standby = RecordingStandby()
        ends = Pair(Sender(near), Receiver(far, standby), standby)
        task = asyncio.create_task(ends.serve())
        try:
            async with asyncio.timeout(PATIENCE):
                yield ends
        finally:
            await ends.sender.close()
            await task


def run(scenario: Callable[[Pair, Guest], Awaitable[None]]) -> None:
    """Play a scenario with both ends and a guest."""

    async def body() -> None:
        async with pair() as ends:
            await scenario(ends, Guest())

    asyncio.run(body(), debug=True)


def set_waits(monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """Whether epochs are handled in a task, or in the callback that receives them."""
    monkeypatch.setattr(Guest, "waits", waits)
    monkeypatch.setattr(RecordingStandby, "waits", waits)
