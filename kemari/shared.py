# SPDX-License-Identifier: Apache-2.0
"""A guest's disks in shared mode, on the host that runs it (``docs/disk.md``, Shared mode).

:mod:`kemari.disks` carries their records as it does those of other disks; this is about when they
reach the target.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from diskbuffer import held, metadata
from diskbuffer.errors import DiskError, ServerError
from diskbuffer.held import HeldDisk
from diskbuffer.metadata import state_folder
from kemari.host import Host
from kemari.targets import servers

log = logging.getLogger(__name__)

#: Key of the ledger's options: targets of the guest's disks that are shared.
RECORDED: Final = "shared_targets"


class SharedDisks:
    """All of one guest's.  For the event loop.

    :ivar disks: number in PREPARE's list -> disk
    """

    def __init__(self) -> None:
        self.disks: dict[int, HeldDisk] = {}
        self._allowed: dict[int, int] = {}
        self._told: dict[int, int] = {}
        self._until_ns = 0
        self._allowing = asyncio.Event()
        self._issuer: asyncio.Task[None] | None = None

    async def hold(self, peer: str, guest: str, generation: int) -> None:
        """Let no change reach a target from now on, but for :meth:`allow`.

        :raise DiskError: a server refuses
        """
        for disk in self.disks.values():
            await disk.hold(peer, guest, generation)
        if self.disks:
            self._issuer = asyncio.create_task(self._issue())

    def allow(self, positions: Iterable[tuple[int, int]], until_ns: int) -> None:
        """The standby holds all up to these (disk, position): they may be issued.

        :param until_ns: time of :func:`diskbuffer.held.boot_ns` from which on the standby may have
            taken over
        """
        self._allowed.update(positions)
        self._until_ns = until_ns
        self._allowing.set()

    async def _issue(self) -> None:
        while True:
            await self._allowing.wait()
            self._allowing.clear()
            for number, position in list(self._allowed.items()):
                disk = self.disks[number]
                try:
                    if disk.issued() < position:
                        await disk.issue(position, self._until_ns)
                except ServerError as error:
                    # If it is gone, the stream's end tells.
                    log.warning("%s: %s", disk.target, error)

    def news(self) -> list[tuple[int, int]]:
        """(disk, position) of what was issued since the last call.

        :raise ServerError: a server is not open any more
        """
        news = []
        for number, disk in self.disks.items():
            position = disk.issued()
            if position > self._told.get(number, 0):
                self._told[number] = position
                news.append((number, position))
        return news

    async def halt(self) -> None:
        """Issue nothing more: the standby will, from here on.

        :raise DiskError: something is still on its way to a target
        """
        await self.close()
        for disk in self.disks.values():
            await disk.halt()

    async def release(self) -> None:
        """Nobody else has the disks: bring everything to the targets, and hold nothing more.

        :raise DiskError: of the first disk for which it failed; the others were released
        """
        await self._each("release")

    async def drop(self) -> None:
        """Another host has the disks.

        :raise DiskError: of the first disk for which it failed
        """
        await self._each("drop")

    async def _each(self, what: str) -> None:
        await self.close()
        failures = []
        for disk in self.disks.values():
            try:
                await getattr(disk, what)()
            except DiskError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    async def close(self) -> None:
        """End the task of this object (idempotent)."""
        issuer, self._issuer = self._issuer, None
        if issuer is not None:
            issuer.cancel()
            await asyncio.gather(issuer, return_exceptions=True)


async def settle(host: Host, options: dict[str, Any], *, mine: bool, guest: str = "") -> list[str]:
    """End the holding that a killed daemon has left behind.

    :param options: of the guest's record in the ledger
    :param mine: whether the guest is this host's; otherwise its changes are dropped
    :param guest: its UUID: leave alone what is not held, or of another guest
    :return: a sentence for each disk for which that failed
    """
    failures = []
    for name in options.get(RECORDED, ()):
        target = host.locate(str(name))
        try:
            if not guest or await asyncio.to_thread(_held_of, host, target, guest):
                await _settle_one(host, target, mine=mine)
        except DiskError as error:
            failures.append(str(error))
    return failures


def _held_of(host: Host, target: Path, guest: str) -> bool:
    known = metadata.load(state_folder(target, host.config.paths.state / "disks") / "state.json")
    return known is not None and known.role is metadata.Role.HELD and known.guest == guest


async def _settle_one(host: Host, target: Path, *, mine: bool) -> None:
    paths = host.config.paths
    found = False
    for folder in await asyncio.to_thread(servers, paths.run, target):
        disk = HeldDisk(folder)
        try:
            await disk.open()
        except ServerError as error:
            log.info("%s: %s", folder, error)  # of a server that is gone
            continue
        found = True
        try:
            await (disk.release() if mine else disk.drop())
        finally:
            await disk.teardown()
    if mine and not found:
        await asyncio.to_thread(held.settle, state_folder(target, paths.state / "disks"))
