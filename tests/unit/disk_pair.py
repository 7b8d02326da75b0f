# SPDX-License-Identifier: Apache-2.0
"""A disk in a real nbdkit and its replica, joined by what a session does; for tests."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from diskbuffer import bitmap
from diskbuffer.disk import DiskBuffer
from diskbuffer.replica import Replica
from tests.unit.disk_server import DiskServer

MIB = 1 << 20
SIZE = 4 * MIB
CHUNK = 1 << bitmap.SHIFT
WAIT = 20.0
PRIMARY, STANDBY = str(uuid.uuid4()), str(uuid.uuid4())


async def until(what: Callable[[], bool]) -> None:
    """Wait until a figure is as expected; figures have no event."""
    async with asyncio.timeout(WAIT):
        while not what():  # noqa: ASYNC110 - a page of shared memory cannot be waited for
            await asyncio.sleep(0.01)


class Pair:
    """A disk and its replica, joined by what a replication session does.

    :ivar epoch: the one that is open
    """

    def __init__(self, server: DiskServer, folder: Path) -> None:
        self.server = server
        self.disk = DiskBuffer(server.folder, lambda event, text: self.heard.append(event))
        self.heard: list[str] = []
        self.copy = folder / "copy.img"
        if not self.copy.exists():
            self.copy.touch()
            os.truncate(self.copy, SIZE)
        self.state = folder / "copy-state"
        self.replica = Replica(self.copy, self.state, on_applied=self._applied)
        self.epoch = 0
        self.batches: list[int] = []
        self.reports: list[tuple[int, int]] = []
        self.bounds: list[bytes] = []

    def _applied(self, epoch: int, batches: int) -> None:
        self.reports.append((epoch, batches))

    async def begin(self) -> str:
        """Join; why everything has to be copied, or ""."""
        await self.disk.open()
        known = await self.replica.setup(
            size=self.disk.size,
            pair=self.disk.pair,
            new_pair=str(uuid.uuid4()),
            peer=PRIMARY,
            generation=1,
        )
        await self.disk.begin(
            pair=known.pair,
            peer=STANDBY,
            generation=1,
            differing=None if known.full else known.runs,
        )
        return known.full

    async def carry(self) -> None:
        """Bring what is in the stream to the replica, of the open epoch."""
        async for batch in self.disk.read(self.disk.position()):
            await self.replica.stage(self.epoch, batch)
            self.batches.append(self.disk.taken)

    async def seal(self) -> None:
        """End the epoch."""
        await self.carry()
        self.replica.seal(self.epoch)
        self.epoch += 1

    async def sync(self, rate: int = 0) -> None:
        """Copy what differs, then seal epochs 0 and 1."""
        await self.disk.sync(rate)
        while self.disk.progress().left:
            await self.carry()
            await asyncio.sleep(0)
        await self.seal()
        await self.seal()

    async def settle(self) -> None:
        """Wait until all is applied, and tell the disk."""
        await self.replica.settle()
        await until(lambda: bool(self.reports) and self.reports[-1][1] == len(self.batches))
        await self.disk.applied(self.disk.taken)

    async def equalise(self) -> None:
        """Join, copy everything, and wait until no chunk is marked any more."""
        await self.begin()
        await self.sync()
        await self.settle()
        # Bits are cleared a cycle after the standby has everything.
        await self.seal()
        await self.settle()
        await until(lambda: self.server.figures().dirty == 0)

    async def end(self) -> None:
        await self.disk.teardown()
        await self.replica.close()


@asynccontextmanager
async def joined(server: DiskServer, folder: Path) -> AsyncIterator[Pair]:
    pair = Pair(server, folder)
    try:
        yield pair
    finally:
        await pair.end()


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(6 * WAIT):
            await body()

    asyncio.run(bounded())


async def do(call: Callable[..., object], *arguments: object) -> None:
    await asyncio.to_thread(call, *arguments)
