# SPDX-License-Identifier: Apache-2.0
"""The standby's copy of a disk: changes are applied an epoch at a time, in order.

::

            stage      seal(n)          worker
    nothing ----> staged ----> sealed ----------> applied, flushed   (then: on_applied)
                    |
                    v discard: dropped

Invariants:

1. what is on the target is a prefix of the stream, and once consistent the prefix of an epoch or,
   while that is being applied, a part of the next one that a flush could have ended;
2. nothing that is not sealed is applied, but for epoch 0, which nobody runs from;
3. at most ``budget`` bytes wait, or one epoch of at most :data:`diskbuffer.stream.EPOCH_BYTES`.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from diskbuffer import bitmap, durable, metadata, stream
from diskbuffer.backing import Backing
from diskbuffer.bitmap import Bitmap, Run
from diskbuffer.errors import BitmapError, DiskError, MetadataError, RecordError, ReplicaError
from diskbuffer.metadata import Fitness, Metadata, Role
from diskbuffer.stream import EPOCH_BYTES, Buffer, Record

_log = logging.getLogger(__name__)

BUDGET: Final = 256 << 20
"""Bytes of records that wait for a replica's disk."""
FLUSH_BYTES: Final = 32 << 20
"""While copying, so many bytes are applied between two flushes."""

_INLINE = 1 << 16


@dataclass(frozen=True, slots=True)
class Known:
    """What a standby tells of its copy before it becomes a replica (``docs/disk.md``, Rejoining).

    :ivar pair: the pair that it knows, "" for none
    :ivar state: "none", "syncing", "consistent" or "disk"
    :ivar shift: of its bitmap, 0 for none
    :ivar runs: what its bitmap says to differ
    :ivar full: why everything must be copied; "" if not
    """

    pair: str = ""
    state: str = "none"
    shift: int = 0
    runs: tuple[Run, ...] = ()
    full: str = ""


@dataclass(slots=True)
class _Epoch:
    """What is applied together.

    :ivar last: whether the epoch ends with it; then it is flushed and reported
    """

    number: int
    last: bool = False
    records: list[Record] = field(default_factory=list)
    size: int = 0
    batches: int = 0


class Replica:
    """One disk's copy.  For one event loop.

    :param target: file or block device, as on the primary
    :param state: its durable folder, see :func:`diskbuffer.metadata.state_folder`
    :param on_applied: called in the event loop with (last epoch that is whole on stable storage,
        batches of this session that are)
    :param on_failed: called in the event loop, once, when the copy cannot be kept up any more
    :param step: is told "recorded" when this host's copy is a replica, "apply", "written",
        "flushed" as records go to the target, "consistent" and "unmarked" after epoch 1, "marked"
        and "disk" in a takeover, each when it is reached, in whichever thread
    :ivar size: bytes
    :ivar known: see :class:`Known`
    """

    def __init__(
        self,
        target: Path,
        state: Path,
        *,
        budget: int = BUDGET,
        on_applied: Callable[[int, int], None] | None = None,
        on_failed: Callable[[DiskError], None] | None = None,
        step: Callable[[str], None] | None = None,
    ) -> None:
        self.target = target
        self.size = 0
        self.known = Known()
        self._state = state
        self._budget = budget
        self._on_applied = on_applied or (lambda epoch, batches: None)
        self._on_failed = on_failed or (lambda error: None)
        self._step = step or (lambda step: None)
        self._backing: Backing | None = None
        self._metadata: Metadata | None = None
        self._staged = _Epoch(0)
        self._sealed: deque[_Epoch] = deque()
        self._waiting = 0  # bytes sealed and not applied
        self._done_batches = 0
        self._unflushed = 0
        self._moved = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._closing = False
        self.failure: DiskError | None = None

    @property
    def waiting(self) -> int:
        """Bytes of records in memory."""
        return self._staged.size + self._waiting

    @property
    def consistent(self) -> bool:
        """Whether a guest could run from it, once what is sealed is applied."""
        return self._metadata is not None and self._metadata.state is Fitness.CONSISTENT

    # ---- Setting up ----

    async def setup(
        self,
        *,
        size: int,
        pair: str,
        new_pair: str,
        peer: str,
        generation: int,
        guest: str = "",
        most_runs: int = bitmap.MAX_RUNS,
    ) -> Known:
        """Make this host's copy a replica, durably, before anything is written to it.

        :param size: of the disk, bytes
        :param pair: whose differences the primary knows, "" for none
        :param new_pair: name of the pair if everything has to be copied
        :param peer: UUID of the primary
        :param guest: UUID of the guest whose disk it is
        :param most_runs: runs of differing chunks that may be told
        :return: what this host knew; ``pair`` is the one that is used from now on
        :raise DiskError: the target does not fit, or what is known cannot be written
        """
        self.known = await asyncio.to_thread(self._prepare, size, pair, new_pair, most_runs)
        self._metadata = Metadata(
            Role.REPLICA, Fitness.SYNCING, size, self.known.pair, peer, generation, guest=guest
        )
        await asyncio.to_thread(self._begin, self._metadata)
        self._worker = asyncio.create_task(self._work())
        return self.known

    def _begin(self, mine: Metadata) -> None:
        mine.save(self._state / "state.json")
        self._step("recorded")
        if self.known.full:
            # Marks of another pair, or damaged ones, say nothing of this one.
            self._forget_marks()

    def _prepare(self, size: int, pair: str, new_pair: str, most_runs: int) -> Known:
        self._backing = Backing(self.target)
        self.size = self._backing.size
        if self.size != size:
            raise ReplicaError(
                f"{self.target} has {self.size} bytes on this host, expected {size} as on the "
                "primary"
            )
        try:
            self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise MetadataError(f"{self._state} cannot be made: {error.strerror}") from error
        return self._judge(pair, new_pair, most_runs)

    def _judge(self, pair: str, new_pair: str, most_runs: int) -> Known:
        full, state = "", "none"
        try:
            mine = metadata.load(self._state / "state.json")
            marks = bitmap.load(self._state / "bitmap", self.size)
        except (MetadataError, BitmapError) as error:
            return Known(new_pair, state, full=str(error))
        if mine is not None:
            state = mine.role.value if mine.role is Role.DISK else mine.state.value
        if not pair:
            full = "the primary does not know what differs"
        elif mine is None or not mine.pair:
            full = "this host has no copy yet"
        elif mine.pair != pair or mine.size != self.size:
            full = "this host's copy is of another pair"
        elif mine.role is Role.DISK and marks is None:
            full = "this host was the primary and has no bitmap"
        elif marks is not None and (marks.pair != pair or marks.shift != bitmap.SHIFT):
            full = "this host's bitmap is of another pair"
        if full:
            return Known(new_pair, state, full=full)
        if marks is None:
            return Known(pair, state)
        return Known(pair, state, marks.shift, tuple(marks.runs(most_runs)))

    # ---- Epochs ----

    async def stage(self, epoch: int, untrusted_batch: Buffer) -> None:
        """Take a batch of records of an epoch; waits while too much is in memory.

        The batch is checked whole first.  Those of epoch 0 are applied as they come.

        :raise RecordError: a record is wrong
        :raise DiskError: the copy failed
        """
        self._require_whole()
        records = (
            stream.parse(untrusted_batch, self.size)
            if len(untrusted_batch) < _INLINE
            else await asyncio.to_thread(stream.parse, untrusted_batch, self.size)
        )
        if self._staged.number != epoch:
            if self._staged.records:
                raise ReplicaError(
                    f"Records of epoch {epoch} came while epoch {self._staged.number} is open"
                )
            self._staged = _Epoch(epoch)
        size = len(untrusted_batch)
        if self._staged.size + size > EPOCH_BYTES:
            raise RecordError(f"epoch {epoch} has more than {EPOCH_BYTES} bytes of records")
        self._staged.records += records
        self._staged.size += size
        self._staged.batches += 1
        if epoch == 0:
            self._seal(last=False)
        # Only what is sealed will make room by itself.
        while self._waiting and self.waiting > self._budget:
            await self._move()
            self._require_whole()

    def seal(self, epoch: int) -> None:
        """The epoch is complete: it will be applied, whole, even if nothing more comes.

        :raise DiskError: the copy failed earlier: the epoch must not be acknowledged
        """
        self._require_whole()
        if self._staged.number != epoch:
            if self._staged.records:
                raise ReplicaError(
                    f"Epoch {epoch} is sealed while epoch {self._staged.number} is open"
                )
            self._staged = _Epoch(epoch)
        self._seal(last=True)

    def _seal(self, *, last: bool) -> None:
        self._staged.last = last
        self._waiting += self._staged.size
        self._sealed.append(self._staged)
        self._staged = _Epoch(self._staged.number)
        self._notify()

    def discard(self) -> None:
        """Drop what is staged and not sealed."""
        self._staged = _Epoch(self._staged.number)
        self._notify()

    async def settle(self) -> None:
        """Wait until everything sealed is applied and flushed.

        :raise DiskError: it could not be
        """
        while self._sealed:
            self._require_whole()
            await self._move()
        self._require_whole()

    # ---- Ends ----

    async def take_over(self, generation: int) -> None:
        """Make the copy the guest's disk: of the last sealed epoch, exactly.

        What is not sealed is dropped.  Afterwards the server may be told to ``activate``.

        :param generation: the one that begins
        :raise DiskError: it is not fit to run, and nobody's disk
        """
        self.discard()
        await self.settle()
        mine = self._metadata
        if mine is None or mine.state is not Fitness.CONSISTENT:
            raise ReplicaError(f"The copy of the disk in {self.target} is not complete")
        await self.close()
        await asyncio.to_thread(self._become_disk, mine, generation)

    def _become_disk(self, mine: Metadata, generation: int) -> None:
        fresh = Bitmap(mine.size, mine.pair, mine.peer or str(uuid.UUID(int=0)), generation)
        fresh.save(self._state / "bitmap")
        self._step("marked")
        self._metadata = replace(mine, role=Role.DISK, generation=generation)
        self._metadata.save(self._state / "state.json")
        self._step("disk")

    async def close(self) -> None:
        """Apply what is sealed, drop the rest, close the target (idempotent)."""
        self.discard()
        self._closing = True
        self._notify()
        if self._worker is not None:
            await asyncio.wait([self._worker])
        if self._backing is not None:
            self._backing.close()
            self._backing = None

    # ---- Machinery ----

    def _require_whole(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _notify(self) -> None:
        self._moved.set()

    async def _move(self) -> None:
        """Wait until something happened."""
        self._moved.clear()
        await self._moved.wait()

    async def _work(self) -> None:
        while True:
            while not self._sealed:
                if self._closing:
                    return
                await self._move()
            epoch = self._sealed[0]
            try:
                await asyncio.to_thread(self._apply, epoch)
            except DiskError as error:
                _log.error("%s", error)
                self.failure = error
                self._sealed.clear()
                self._notify()
                self._on_failed(error)
                return
            self._sealed.popleft()
            self._waiting -= epoch.size
            self._done_batches += epoch.batches
            self._notify()
            if self._unflushed == 0:
                self._on_applied(epoch.number if epoch.last else 0, self._done_batches)

    def _apply(self, epoch: _Epoch) -> None:
        assert self._backing is not None
        self._step("apply")
        self._backing.apply(epoch.records)
        self._step("written")
        self._unflushed += epoch.size
        if epoch.last or self._unflushed >= FLUSH_BYTES:
            self._backing.flush()
            self._unflushed = 0
            self._step("flushed")
        if epoch.number == 1 and epoch.last:
            self._become_consistent()

    def _become_consistent(self) -> None:
        assert self._metadata is not None
        fit = replace(self._metadata, state=Fitness.CONSISTENT, epoch=1)
        fit.save(self._state / "state.json")
        self._step("consistent")
        # What this host wrote as a primary is rolled forward over now.
        self._forget_marks()
        self._step("unmarked")
        self._metadata = fit

    def _forget_marks(self) -> None:
        try:
            durable.remove(self._state / "bitmap")
        except OSError as error:
            raise MetadataError(
                f"{self._state / 'bitmap'} cannot be removed: {error.strerror}"
            ) from error
