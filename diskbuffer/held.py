# SPDX-License-Identifier: Apache-2.0
"""A guest's disk in shared mode, on the host where the guest runs (``docs/disk.md``).

::

    open()                               changes pass through to the target
    hold(): a stream, and no change of it reaches the target
    position(), read(): as in replicated mode
    issue(position, until): after the ACK
    halt()                               before the guest is handed over
    release() or drop()                  nobody else has the disk, or somebody else has
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

from diskbuffer.bitmap import Bitmap
from diskbuffer.disk import DiskBuffer
from diskbuffer.errors import ServerError
from diskbuffer.metadata import Fitness, Metadata, Role
from diskbuffer.status import Flag

RELEASE_SECONDS: Final = 60.0
"""What is held must be on the target by then."""
_LOOK: Final = 0.005


def boot_ns() -> int:
    """The clock of :meth:`HeldDisk.issue`; it goes on while the machine is suspended."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class HeldDisk(DiskBuffer):
    """One disk; see the module's text."""

    async def open(self) -> None:
        """Reach the server.

        :raise ServerError: there is none, or it does not serve a shared target
        """
        await super().open()
        if not self.figures().flags & Flag.SHARED:
            await self.teardown()
            raise ServerError(f"{self.folder} serves a replicated disk, expected a shared one")

    def _believable(self) -> Bitmap | None:
        self.target = (self._state / "target").read_text().strip()
        return None

    @property
    def queue(self) -> int:
        """Bytes of records that may be held."""
        return self.figures().limit

    def issued(self) -> int:
        """Position up to which changes are on the target's stable storage."""
        return self.figures().issued

    async def hold(self, peer: str, guest: str, generation: int) -> None:
        """Let no change reach the target any more.

        From here on no other server of this host will serve the target, whatever dies.

        :param peer: UUID of the other host
        :param guest: UUID of the guest
        :raise DiskError: it cannot; changes go on to pass through
        """
        known = Metadata(
            *(Role.HELD, Fitness.CONSISTENT, self.size),
            peer=peer,
            generation=generation,
            guest=guest,
            shared=True,
        )
        await asyncio.to_thread(known.save, self._state / "state.json")
        await self._open_stream()

    async def issue(self, position: int, until_ns: int) -> None:
        """All up to there is acknowledged: bring it to the target.

        :param until_ns: nothing of it is begun at this time of :func:`boot_ns` or later
        :raise ServerError: the position is not of this stream
        """
        await self._controlled().ask(f"issue {self._session} {position} {until_ns}")

    async def halt(self) -> None:
        """Let nothing more reach the target; returns when nothing is on its way.

        :raise ServerError: something still is
        """
        await self._controlled().ask("halt")

    async def release(self) -> None:
        """Bring all that is held to the target, and hold nothing more.

        :raise DiskError: it did not get there in time, or this host does not have the disk
        """
        await self._controlled().ask("release")
        deadline = time.monotonic() + RELEASE_SECONDS
        while (figures := self.figures()).issued < figures.position:
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{figures.position - figures.issued} bytes of changes are not yet in "
                    f"{self.target}, expected none after {RELEASE_SECONDS:g} s"
                )
            await asyncio.sleep(_LOOK)  # a page of shared memory cannot be waited for
        await asyncio.to_thread(settle, self._state)

    async def drop(self) -> None:
        """Forget what is held, and refuse changes: another host has the disk.

        :raise ServerError: a change is still on its way to the target
        """
        await self._controlled().ask("drop")


def settle(state: Path) -> None:
    """Nobody else has a disk: it may be served by any server.

    :param state: its durable folder
    :raise MetadataError: that cannot be written
    """
    Metadata(Role.DISK, Fitness.CONSISTENT, 0, shared=True).save(state / "state.json")
