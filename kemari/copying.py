# SPDX-License-Identifier: Apache-2.0
"""The base copy: all of a guest's memory, sent while it runs."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from checkpoint.codec import Coded, Encoder
from checkpoint.driver import Source, Staging
from checkpoint.faultpoints import reach
from checkpoint.runstate import StateError
from checkpoint.sender import Sender
from kemari.host import in_thread

#: Rounds after the first one, at most: a busy guest's last pages go with the first checkpoint.
MAX_ROUNDS: Final = 6
#: A round of at most this many pages is short enough for the first checkpoint to follow it.
FEW_PAGES: Final = 256
#: Pages copied, coded and sent at a time.
CHUNK: Final = 1024


@dataclass(frozen=True, slots=True)
class DiskCopy:
    """How far the copying of one disk is.

    :ivar total: bytes that the standby lacked or lacks, in whole chunks
    :ivar left: of these, bytes that are still to be copied
    """

    vdev: str
    total: int
    left: int


@dataclass(slots=True)
class Progress:
    """How far the base copy is: what differs on the disks first, then rounds over the memory.

    :ivar disks: those that are copied
    :ivar round: 0 while the disks are copied, 1 for the first round, in which every page is sent
    :ivar done: pages of this round that were sent
    :ivar total: pages of this round, as far as known
    :ivar wire_bytes: bytes of pages sent so far, all rounds
    :ivar seconds: since :meth:`begin`
    """

    disks: list[DiskCopy] = field(default_factory=list)
    round: int = 0
    done: int = 0
    total: int = 0
    wire_bytes: int = 0
    seconds: float = 0.0
    _began: float | None = None

    def begin(self) -> None:
        """The copy begins now."""
        self._began = time.monotonic()

    def passed(self) -> None:
        """Bring :attr:`seconds` up to date."""
        if self._began is not None:
            self.seconds = time.monotonic() - self._began

    @property
    def begun(self) -> bool:
        """Whether anything is being copied yet."""
        return self._began is not None

    def as_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {
            "disks": [asdict(disk) for disk in self.disks],
            "round": self.round,
            "done": self.done,
            "total": self.total,
            "wire_bytes": self.wire_bytes,
            "seconds": round(self.seconds, 1),
        }


async def base_copy(
    source: Source,
    encoder: Encoder,
    sender: Sender,
    progress: Progress,
    report: Callable[[], None],
    before_end: Callable[[], Awaitable[None]],
) -> None:
    """Send every page of the guest, then what was written meanwhile, until little is left.

    Copying and coding run in a thread, one chunk ahead of sending.

    :param report: called after each chunk
    :param before_end: waited for before the end of the copy is told
    :raise CheckpointError: the link broke, or the guest is gone
    """
    staging = Staging(CHUNK)
    for progress.round in range(1, MAX_ROUNDS + 1):
        progress.done = 0
        progress.total = source.description.pages if progress.round == 1 else 0
        chunks = _chunks(source)
        coming = asyncio.create_task(in_thread(_code_next, source, encoder, chunks, staging))
        try:
            while (chunk := await coming) is not None:
                pages, batches = chunk
                coming = asyncio.create_task(
                    in_thread(_code_next, source, encoder, chunks, staging)
                )
                progress.wire_bytes += await _send(sender, batches)
                reach("base-sent")
                progress.done += pages
                progress.total = max(progress.total, progress.done)
                progress.passed()
                report()
        finally:
            # The thread must be out of the source before anybody else uses it.
            await asyncio.gather(coming, return_exceptions=True)
        if progress.round > 1 and progress.done <= FEW_PAGES:
            break
    await before_end()
    await sender.finish_base()


async def _send(sender: Sender, batches: Sequence[Coded]) -> int:
    """As :meth:`Sender.send_base`; records of the disks may have met the link's end before."""
    try:
        return await sender.send_base(batches)
    except StateError as error:
        if not sender.link.closed:
            raise
        raise sender.link.error() from error


def _chunks(source: Source) -> Iterator[array[int]]:
    for batch in source.base_round():
        for start in range(0, len(batch), CHUNK):
            yield batch[start : start + CHUNK]


def _code_next(
    source: Source, encoder: Encoder, chunks: Iterator[array[int]], staging: Staging
) -> tuple[int, list[Coded]] | None:
    """Copy and code the next chunk; None when the round is over."""
    gfns = next(chunks, None)
    if gfns is None:
        return None
    source.copy_live(gfns, staging)
    return staging.count, list(encoder.encode(staging))
