# SPDX-License-Identifier: Apache-2.0
"""A shared disk's two ends on one target, joined by what a replication session does."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from diskbuffer.held import HeldDisk, boot_ns
from diskbuffer.shared import SharedReplica
from tests.unit.disk_client import NbdClient
from tests.unit.disk_server import DiskServer

WAIT = 20.0
SECOND = 10**9
PRIMARY, STANDBY, GUEST = (str(uuid.uuid4()) for _ in range(3))


async def until(what: Callable[[], bool]) -> None:
    """Wait until a figure is as expected; figures have no event."""
    async with asyncio.timeout(WAIT):
        while not what():  # noqa: ASYNC110 - a page of shared memory cannot be waited for
            await asyncio.sleep(0.005)


def far_away() -> int:
    """A lease that outlasts any test."""
    return boot_ns() + 3600 * SECOND


class Pair:
    """See the module's text.

    :ivar client: the guest
    :ivar ends: of epoch n, where it ends, from epoch 1 on
    """

    def __init__(self, server: DiskServer, state: Path, target: Path | None = None) -> None:
        self.server = server
        self.heard: list[tuple[str, str]] = []
        self.disk = HeldDisk(server.folder, lambda *news: self.heard.append(news))
        self.state = state
        self.replica = SharedReplica(target or server.target, state)
        self.ends = [0]

    async def begin(self) -> None:
        """Prepare, and hold from now on."""
        await self.disk.open()
        await self.replica.setup(
            size=self.disk.size, queue=self.disk.queue, peer=PRIMARY, generation=1
        )
        await self.disk.hold(STANDBY, GUEST, 1)

    async def capture(self) -> None:
        """All until now is an epoch's, and is staged."""
        self.ends.append(self.disk.position())
        async for batch in self.disk.read(self.ends[-1]):
            await self.replica.stage(len(self.ends) - 1, batch)

    async def epoch(self) -> None:
        """An epoch is captured and acknowledged, not issued."""
        await self.capture()
        self.replica.seal(len(self.ends) - 1)

    async def issue(self, position: int = -1) -> None:
        """What is acknowledged up to ``position`` is issued."""
        position = self.ends[-1] if position < 0 else position
        await self.disk.issue(position, far_away())
        await until(lambda: self.disk.issued() >= position)

    async def end(self) -> None:
        """Close both ends, as killed daemons do."""
        await self.disk.teardown()
        await self.replica.close()


@asynccontextmanager
async def joined(
    server: DiskServer, state: Path, target: Path | None = None
) -> AsyncIterator[Pair]:
    """A pair that has begun."""
    pair = Pair(server, state, target)
    try:
        await pair.begin()
        yield pair
    finally:
        await pair.end()


def serve(server: DiskServer, **config: object) -> NbdClient:
    """Serve a target in shared mode, and connect."""
    return server.start(shared="true", **config)


async def do(call: Callable[..., object], *arguments: object) -> None:
    """A request of the guest."""
    await asyncio.to_thread(call, *arguments)
