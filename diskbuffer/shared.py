# SPDX-License-Identifier: Apache-2.0
"""A shared disk on the host that stands by: what it would have to issue again.

::

            stage      seal(n)         issued(position)
    nothing ----> staged ----> sealed ----------------> dropped
                    |             |
                    v discard     v settle: issued here, in order, at takeover

Invariants:

1. the target is only read before :meth:`SharedReplica.settle`;
2. what is sealed leaves memory only because the primary has issued it, or this host has;
3. at most ``queue`` bytes are in memory, however the primary behaves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from diskbuffer import stream
from diskbuffer.direct import DirectTarget
from diskbuffer.errors import RecordError, ReplicaError
from diskbuffer.metadata import Fitness, Metadata, Role
from diskbuffer.stream import Buffer, Kind, Record

BUDGET: Final = 256 << 20
"""Bytes of records that a primary may have this host keep for a disk."""


class _Kept(NamedTuple):
    """A record, and the position behind it."""

    record: Record
    end: int


class SharedReplica:
    """One disk.  For one event loop.

    :param target: what both hosts reach
    :param state: its durable folder on this host
    :ivar size: bytes
    """

    def __init__(self, target: Path, state: Path) -> None:
        self.target = target
        self.size = 0
        self._state = state
        self._queue = 0
        self._metadata: Metadata | None = None
        self._staged: list[_Kept] = []
        self._sealed: deque[_Kept] = deque()
        self._position = 0  # behind what is staged
        self._issued = 0
        self._seen = False

    @property
    def waiting(self) -> int:
        """Bytes of records that were not issued, as far as this host knows."""
        return self._position - self._issued

    async def setup(
        self, *, size: int, queue: int, peer: str, generation: int, guest: str = ""
    ) -> None:
        """Refuse changes of this host's own, durably.

        :param size: of the disk, bytes
        :param queue: bytes of records that the primary may hold
        :param peer: its UUID
        :param guest: UUID of the guest whose disk it is
        :raise DiskError: the target does not fit
        """
        if queue > BUDGET:
            raise ReplicaError(
                f"The primary may hold {queue} bytes of changes of {self.target}, expected at "
                f"most {BUDGET}"
            )
        self._queue = queue
        self._metadata = Metadata(
            *(Role.REPLICA, Fitness.CONSISTENT, size),
            peer=peer,
            generation=generation,
            guest=guest,
            shared=True,
        )
        await asyncio.to_thread(self._begin, self._metadata)

    def _begin(self, mine: Metadata) -> None:
        with closing(DirectTarget(self.target)) as target:
            self.size = target.size
        if self.size != mine.size:
            raise ReplicaError(
                f"{self.target} has {self.size} bytes on this host, expected {mine.size}"
            )
        self._state.mkdir(parents=True, exist_ok=True)
        mine.save(self._state / "state.json")

    # ---- Epochs ----

    async def stage(self, epoch: int, untrusted_batch: Buffer) -> None:
        """Keep a batch of records of an epoch, which is checked whole first.

        :raise RecordError: a record is wrong, or there are too many
        :raise ReplicaError: the target here is not the primary's
        """
        size = len(untrusted_batch)
        if epoch == 0:
            raise RecordError("a shared disk has records of epoch 0, expected none")
        if self.waiting + size > self._queue:
            raise RecordError(
                f"{self.waiting + size} bytes of records are not issued, expected at most "
                f"{self._queue}"
            )
        # Of its own: the frame's buffer must not live as long.
        records = await asyncio.to_thread(
            stream.parse, bytes(untrusted_batch), self.size, shared=True
        )
        seen = [record for record in records if record.kind is Kind.SEEN]
        if seen:
            await asyncio.to_thread(self._compare, seen)
            self._seen = True
        for record in records:
            self._position += stream.HEAD.size + len(record.payload)
            self._staged.append(_Kept(record, self._position))

    def _compare(self, seen: list[Record]) -> None:
        with closing(DirectTarget(self.target)) as target:
            for record in seen:
                if target.read(record.offset, record.extent) != bytes(record.payload):
                    raise ReplicaError(
                        f"{self.target} on this host is not the primary's: it differs at byte "
                        f"{record.offset}, expected the same storage on both"
                    )

    def seal(self, epoch: int) -> None:
        """The epoch is complete: its changes will be on the target, whoever issues them.

        :raise ReplicaError: nothing has shown that both hosts reach the same target
        """
        if epoch > 0 and not self._seen:
            raise ReplicaError(
                f"Nothing shows that {self.target} is the same on both hosts; expected that the "
                "primary tells what it sees there"
            )
        self._sealed += self._staged
        self._staged.clear()

    def issued(self, position: int) -> None:
        """What is up to there is on the target's stable storage.

        :raise RecordError: it is not the end of a sealed record, or goes back
        """
        while self._sealed and self._sealed[0].end <= position:
            self._issued = self._sealed.popleft().end
        if self._issued != position:
            raise RecordError(f"position {position} was issued, which is no sealed record's end")

    def discard(self) -> None:
        """Drop what is staged and not sealed."""
        for kept in self._staged:
            self._position -= stream.HEAD.size + len(kept.record.payload)
        self._staged.clear()

    # ---- Ends ----

    async def settle(self) -> None:
        """Issue all that is sealed, in order.  Only by the host that owns the guest.

        Repeated after a failure, or by a host that issued a part of it before: the target ends up
        the same.

        :raise ReplicaError: the target cannot be written
        """
        self.discard()
        await asyncio.to_thread(self._issue)
        self._sealed.clear()
        self._issued = self._position

    def _issue(self) -> None:
        with closing(DirectTarget(self.target, writing=True)) as target:
            if target.size != self.size:
                raise ReplicaError(
                    f"{self.target} has {target.size} bytes now, expected {self.size}"
                )
            for record, _end in self._sealed:
                match record.kind:
                    case Kind.WRITE:
                        target.write(record.offset, record.payload)
                    case Kind.ZERO:
                        target.zero(record.offset, record.extent)
                    case Kind.FLUSH:
                        target.flush()
            target.flush()

    async def take_over(self, generation: int) -> None:
        """Make it this host's disk, after :meth:`settle`.  Then its server may ``activate``.

        :param generation: the one that begins
        :raise DiskError: that could not be written down
        """
        await self.settle()
        mine = self._metadata
        assert mine is not None, "setup comes first"
        self._metadata = replace(mine, role=Role.DISK, generation=generation)
        await asyncio.to_thread(self._metadata.save, self._state / "state.json")

    async def close(self) -> None:
        """Forget everything (idempotent)."""
        self._staged.clear()
        self._sealed.clear()
