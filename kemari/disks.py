# SPDX-License-Identifier: Apache-2.0
"""A guest's disks in its checkpoints, on the host that runs it.

Joins :class:`diskbuffer.disk.DiskBuffer` to the cycle: what differs is copied with epoch 0, an
epoch ends for the disks while the guest is paused, and its records go out before its COMMIT.
:mod:`kemari.replicas` is the other end.  ``docs/disk.md`` says why it is right.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from checkpoint.driver import Disk
from checkpoint.errors import CheckpointError, ProtocolError
from checkpoint.faultpoints import reach
from checkpoint.fields import Fields
from checkpoint.sender import Sender, Writes
from diskbuffer.disk import DiskBuffer
from diskbuffer.errors import DiskError, ServerError, ServerGone
from diskbuffer.held import HeldDisk
from diskbuffer.stream import EPOCH_BYTES
from kemari.copying import DiskCopy, Progress
from kemari.errors import Refused
from kemari.shared import SharedDisks
from kemari.targets import servers, target_size

log = logging.getLogger(__name__)

#: Seconds between two looks for new records while the memory is copied.
PUMP: Final = 0.02
#: Seconds between two words to a disk's server that the standby has more of it.
TELL: Final = 1.0
#: What helps a guest whose disk has lost its server: block-kemari makes a new one.
CURE: Final = "expected the guest to be shut down and started again, which starts a new server"


@dataclass(slots=True)
class _Stream:
    """One disk's changes.

    :ivar number: its place in PREPARE's list
    :ivar boundary: where the last captured epoch ends
    :ivar batches: WRITES frames sent
    :ivar marks: (frames sent, position then) that the standby has not confirmed
    """

    number: int
    disk: Disk
    buffer: DiskBuffer
    boundary: int = 0
    batches: int = 0
    applied: int = 0
    told: int = 0
    marks: deque[tuple[int, int]] = field(default_factory=deque)


Pending = list[tuple[_Stream, int]]
"""Disks with records of an epoch, and where those end."""


class SourceDisks:
    """All disks of one guest.  For the event loop, but for :meth:`close_epoch`.

    :param run: folder of kemari's sockets; ``disks/`` in it has one folder for each served disk
    :param locate: where a target is on this host
    :param lost: called with a sentence when changes of a disk are not written down any more
    :param note: puts an event and a sentence into the event log
    :ivar full: called when so much waits that a checkpoint should be taken at once
    :ivar overfull: called when the guest must wait for that checkpoint
    :ivar shared: those in shared mode
    """

    def __init__(
        self,
        run: Path,
        locate: Callable[[str], Path],
        lost: Callable[[str], None],
        note: Callable[[str, str], None],
    ) -> None:
        self._disks: list[Disk] = []
        self._run = run
        self._locate = locate
        self.full: Callable[[], None] = lambda: None
        self.overfull: Callable[[], None] = lambda: None
        self.shared = SharedDisks()
        self._lost = lost
        self._note_event = note
        self._streams: list[_Stream] = []
        self._sizes: list[int] = []
        self._new_pairs: list[str] = []
        self._pump: asyncio.Task[None] | None = None
        self._teller: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._closing = False

    # ---- Coming about ----

    async def open(self, disks: Sequence[Disk]) -> None:
        """Find the servers of all disks.

        :raise Refused: one has none
        """
        self._disks = list(disks)
        self._new_pairs = [str(uuid.uuid4()) for _ in disks]
        for number, disk in enumerate(self._disks):
            if disk.writable:
                buffer = await self._open(disk)
                if isinstance(buffer, HeldDisk):
                    self.shared.disks[number] = buffer
                self._streams.append(_Stream(number, disk, buffer))
                self._sizes.append(buffer.size)
            else:
                self._sizes.append(await asyncio.to_thread(target_size, self._locate(disk.target)))

    async def _open(self, disk: Disk) -> DiskBuffer:
        why = "block-kemari does not serve it"
        for folder in await asyncio.to_thread(servers, self._run, self._locate(disk.target)):
            kind = HeldDisk if disk.shared else DiskBuffer
            heard = self._shared_heard if disk.shared else self._heard
            buffer = kind(
                folder, functools.partial(heard, disk), lambda step: reach(f"disk-{step}")
            )
            try:
                await buffer.open()
            except ServerGone:
                why = f"its server, nbdkit, has ended; {CURE}"
            except ServerError as error:
                why = str(error)
            else:
                return buffer
        raise Refused(f"The disk {disk.vdev} ({disk.target}) cannot be replicated: {why}")

    def offer(self) -> list[dict[str, Any]]:
        """What PREPARE says of the disks."""
        pairs = {stream.number: stream.buffer.pair for stream in self._streams}
        return [
            {
                "vdev": disk.vdev,
                "target": disk.target,
                "size": self._sizes[number],
                "readonly": not disk.writable,
                "pair": pairs.get(number, ""),
                "new_pair": self._new_pairs[number],
                "shared": disk.shared,
                "queue": self.shared.disks[number].queue if number in self.shared.disks else 0,
            }
            for number, disk in enumerate(self._disks)
        ]

    async def begin(
        self, detail: dict[str, Any], peer: str, guest: str, generation: int
    ) -> list[str]:
        """Write all changes down from now on, and know what the standby lacks.

        :param detail: of PREPARED, untrusted
        :param peer: UUID of the standby's host
        :param guest: its UUID
        :return: a sentence for each disk that has to be copied whole
        :raise ProtocolError: the answer does not fit what was asked
        :raise CheckpointError: a server refuses
        """
        if not self._disks:
            return []
        untrusted_answers = detail.get("disks")
        if not isinstance(untrusted_answers, list) or len(untrusted_answers) != len(self._disks):
            raise ProtocolError("PREPARED does not say what the standby has of each disk")
        sentences = []
        for stream in self._streams:
            untrusted_answer = untrusted_answers[stream.number]
            if not isinstance(untrusted_answer, dict):
                raise ProtocolError("PREPARED has a disk that is no object")
            if (untrusted_answer.get("shared") is True) != stream.disk.shared:
                raise ProtocolError("PREPARED has a disk that is not shared as was asked")
            if stream.disk.shared:
                continue
            fields = Fields(f"PREPARED.disks[{stream.number}]", untrusted_answer)
            pair, full, runs = fields.text("pair"), fields.text("full"), fields.integers("runs")
            known = (stream.buffer.pair, self._new_pairs[stream.number])
            if pair != known[bool(full)] or len(runs) % 2:
                raise ProtocolError("PREPARED has a disk of another pair than was offered")
            try:
                await stream.buffer.begin(
                    pair=pair,
                    peer=peer,
                    generation=generation,
                    guest=guest,
                    differing=None if full else zip(runs[::2], runs[1::2], strict=True),
                )
            except DiskError as error:
                raise CheckpointError(f"{stream.disk.vdev}: {error}") from error
            if full:
                why = stream.buffer.why or full
                sentences.append(f"{stream.disk.vdev} is copied whole: {why}")
        return sentences

    # ---- The base copy ----

    async def copy(
        self, sender: Sender, rate: int, progress: Progress, report: Callable[[], None]
    ) -> None:
        """Bring the standby's disks up to date while the guest writes on.

        Afterwards records go on being sent, until :meth:`end_base`.

        :param rate: bytes per second at most, for each disk; 0 for no limit
        :param progress: kept up to date; ``report`` is called when it changed
        :raise CheckpointError: a disk or the link failed
        """
        streams = self._replicated()
        if not streams:
            return
        sender.on_applied = self._applied
        self._teller = asyncio.create_task(self._tell())
        with _as_checkpoint_errors():
            for stream in streams:
                await stream.buffer.sync(rate)
            while True:
                progress.disks = [_copied(stream) for stream in streams]
                await self._send_all(sender)
                progress.passed()
                report()
                if not any(disk.left for disk in progress.disks):
                    break
                await asyncio.sleep(PUMP)
        self._pump = asyncio.create_task(self._pump_on(sender))

    def _replicated(self) -> list[_Stream]:
        return [stream for stream in self._streams if not stream.disk.shared]

    async def _pump_on(self, sender: Sender) -> None:
        with _as_checkpoint_errors():
            while not self._stop.is_set():
                await self._send_all(sender)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PUMP):
                        await self._stop.wait()

    async def _send_all(self, sender: Sender) -> None:
        for stream in self._replicated():
            async for batch in stream.buffer.read(stream.buffer.position()):
                self._note(stream)
                await sender.send_base_writes(stream.number, batch)

    async def end_base(self) -> None:
        """Send no more records with epoch 0: what comes now belongs to the first epoch.

        :raise CheckpointError: a disk or the link failed meanwhile
        """
        self._stop.set()
        if self._pump is not None:
            await self._pump

    # ---- Epochs ----

    async def hold(self, peer: str, guest: str, generation: int) -> None:
        """Hold the changes of shared disks: the next epoch is the first.

        :param peer: UUID of the standby's host
        :param guest: UUID of the guest
        :raise CheckpointError: a server refuses
        """
        with _as_checkpoint_errors():
            await self.shared.hold(peer, guest, generation)

    async def halt(self) -> None:
        """Issue nothing more on shared disks: the standby will own them.

        :raise CheckpointError: something is still on its way
        """
        with _as_checkpoint_errors():
            await self.shared.halt()

    def close_epoch(self) -> None:
        """All changes that were answered until now, and not before the last call, are one epoch's.

        While the guest is paused.  From any thread.

        :raise DiskError: changes are not written down any more
        """
        for stream in self._streams:
            stream.boundary = stream.buffer.position()
        if self._streams:
            reach("disks-closed")

    def pending(self) -> Pending:
        """What belongs to the captured epoch and is to be sent, for :meth:`read`."""
        return [
            (stream, stream.boundary)
            for stream in self._streams
            if stream.boundary > stream.buffer.taken
        ]

    async def read(self, pending: Pending) -> Writes:
        """Its records, for :class:`checkpoint.sender.Sender`, which takes one batch at a time.

        :raise CheckpointError: the stream ended before, or an epoch is too big for the standby
        """
        with _as_checkpoint_errors():
            for stream, boundary in pending:
                size = boundary - stream.buffer.taken
                if size > EPOCH_BYTES:
                    raise CheckpointError(
                        f"{stream.disk.vdev} has {size} bytes of records in one epoch; expected "
                        f"at most {EPOCH_BYTES}"
                    )
                async for batch in stream.buffer.read(boundary):
                    self._note(stream)
                    yield stream.number, batch

    def acknowledged(self, until_ns: int) -> None:
        """The captured epoch is on the standby: its changes may reach shared targets.

        :param until_ns: see :meth:`kemari.shared.SharedDisks.allow`
        """
        self.shared.allow(
            ((number, self._boundary(number)) for number in self.shared.disks), until_ns
        )

    def issued(self) -> list[tuple[int, int]]:
        """(disk, position) of what was issued since the last call.

        :raise CheckpointError: a server is not open any more
        """
        with _as_checkpoint_errors():
            return self.shared.news()

    def _boundary(self, number: int) -> int:
        return next(stream.boundary for stream in self._streams if stream.number == number)

    def _note(self, stream: _Stream) -> None:
        if stream.disk.shared:
            return
        stream.batches += 1
        stream.marks.append((stream.batches, stream.buffer.taken))

    def _applied(self, number: int, batches: int) -> None:
        for stream in self._streams:
            if stream.number == number and not stream.disk.shared and batches <= stream.batches:
                while stream.marks and stream.marks[0][0] <= batches:
                    stream.applied = stream.marks.popleft()[1]
                return
        raise ProtocolError(f"APPLIED says {batches} of disk {number}, which were not sent")

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(TELL)
            for stream in self._replicated():
                position = stream.applied
                if position > stream.told:
                    reach("disks-tell")
                    try:
                        await stream.buffer.applied(position)
                    except ServerError as error:
                        log.info("%s: %s", stream.disk.vdev, error)
                        return  # it is gone, which the stream's end tells
                    stream.told = position
                    reach("disks-told")

    # ---- The end ----

    def _heard(self, disk: Disk, event: str, text: str) -> None:
        if self._closing:
            return
        if event == "full":
            self.full()
        if event not in ("lost", "ended"):
            return
        name = f"disk {disk.vdev} ({disk.target})"
        why = (
            f"nbdkit, the server of {name}, has ended and the guest gets errors from it; {CURE}"
            if event == "ended"
            else f"changes of {name} are not written down any more: {text}"
        )
        self._note_event("disk-lost", why)
        self._lost(why)

    def _shared_heard(self, disk: Disk, event: str, text: str) -> None:
        if self._closing:
            return
        if event == "full":
            self.overfull()
        elif event == "late":
            self.full()  # the next ACK gives more time
        elif event == "failing":
            why = f"changes of disk {disk.vdev} cannot be issued and are kept: {text}"
            self._note_event("trouble", why)
        else:
            self._heard(disk, event, text)

    def status(self) -> list[dict[str, Any]]:
        """Figures of each disk that is replicated, for ``kemari status``."""
        shown = []
        for stream in self._streams:
            try:
                figures, progress = stream.buffer.figures(), stream.buffer.progress()
            except ServerError:
                continue  # closed meanwhile
            shown.append(
                {
                    "vdev": stream.disk.vdev,
                    "target": stream.disk.target,
                    "size": figures.size,
                    "copy_total": progress.total,
                    "copy_left": progress.left,
                    "queued": figures.position - stream.buffer.taken,
                    "shared": stream.disk.shared,
                    "unconfirmed": figures.position
                    - (figures.issued if stream.disk.shared else stream.applied),
                    "waits": figures.waits,
                    "errors": figures.errors,
                }
            )
        return shown

    async def teardown(self) -> None:
        """End the streams; what the guest writes on is only marked (idempotent)."""
        self._closing = True
        self._stop.set()
        tasks = [task for task in (self._pump, self._teller) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.shared.close()
        for stream in self._streams:
            await stream.buffer.teardown()


def _copied(stream: _Stream) -> DiskCopy:
    state = stream.buffer.progress()
    return DiskCopy(stream.disk.vdev, state.total, state.left)


@contextlib.contextmanager
def _as_checkpoint_errors() -> Any:
    try:
        yield
    except DiskError as error:
        raise CheckpointError(str(error)) from error
