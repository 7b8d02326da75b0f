# SPDX-License-Identifier: Apache-2.0
"""What a host keeps of a guest that neither runs nor is protected there: ``kemari forget``.

That is its record in the ledger, and what is known of copies of its disks.  The copies themselves
are never touched; without that knowledge their targets may be written by anybody, and the next
protection copies all of them.
"""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

from checkpoint.lifeline import Owner
from diskbuffer import metadata
from diskbuffer.control import Control
from diskbuffer.errors import MetadataError, ServerError
from kemari.config import Paths, parse_address
from kemari.endings import PATIENCE
from kemari.errors import PeerError, Refused
from kemari.host import Host
from kemari.ledger import Record, Role
from kemari.peers import Peers
from kemari.targets import servers


class Leftovers:
    """Those of one guest.

    :param record: what the ledger has of it
    """

    def __init__(self, host: Host, peers: Peers, record: Record) -> None:
        self._host = host
        self._peers = peers
        self._record = record

    async def forget(self, *, force: bool) -> dict[str, Any]:
        """Remove them, durably.

        :param force: although they may be the only good copy
        :return: ``guest``, ``disks`` (targets that are free now) and ``text``, a sentence
        :raise Refused: the guest or one of its disks is in use here, or may be good nowhere else
        :raise KemariError: they could not be removed; what is left can be forgotten again
        """
        host, guest = self._host, self._record.guest
        if await asyncio.to_thread(host.hypervisor.domain_exists, guest):
            raise Refused(f"{guest} runs on {host.config.host}; expected it shut down")
        if self._record.role not in (Role.OWNER, Role.MOVED, Role.RELEASED):
            raise Refused(
                f"{host.config.host} is {self._record.role} of {guest}; expected that to be over"
            )
        folders = await asyncio.to_thread(disk_folders, host.config.paths, self._record)
        targets = [await self._unused(folder) for folder in folders]
        if not force:
            await asyncio.to_thread(_require_own_disks, folders, targets)
            await self._require_another_copy(bool(folders))
        return await self._remove(folders, targets)

    async def _unused(self, folder: Path) -> str:
        """The target of a durable folder.

        :return: its path; that of the folder if it is not known
        :raise Refused: a server has it in use
        """
        try:
            target = (folder / "target").read_text().strip()
        except FileNotFoundError:
            return str(folder)  # no server ever had it
        for server in await asyncio.to_thread(servers, self._host.config.paths.run, Path(target)):
            try:
                control = await Control.connect(server / "control", lambda news: None)
            except ServerError:
                continue  # it died, and took nothing along
            await control.close()
            raise Refused(
                f"The disk {target} is in use on {self._host.config.host}; expected no domain "
                "that has it"
            )
        return target

    async def _require_another_copy(self, disks: bool) -> None:
        """:raise Refused: the other host does not say that the guest runs there"""
        record = self._record
        if record.role is Role.RELEASED and not disks:
            return  # a promise that was kept: nothing but the number of its generation is left
        said = [
            owner.state
            for owner in await asyncio.gather(*(self._ask(each) for each in record.addresses))
            if owner is not None
        ]
        if "primary" in said or "running" in said:
            return
        why = f"it does not run on {record.peer}" if said else f"{record.peer} gives no answer"
        raise Refused(
            f"What {self._host.config.host} keeps of {record.guest} may be the only good copy: "
            f"{why}; expected it to run there, or --force"
        )

    async def _ask(self, address: str) -> Owner | None:
        """Who owns the guest, as the host at an address knows it; None if it gives no answer."""
        record = self._record
        timeout = self._host.config.heartbeat * PATIENCE
        try:
            async with asyncio.timeout(timeout):
                return await self._peers.inquire(
                    parse_address(address), record.uuid, record.generation
                )
        except (PeerError, TimeoutError):
            return None

    async def _remove(self, folders: list[Path], targets: list[str]) -> dict[str, Any]:
        host, record = self._host, self._record
        try:
            for folder in folders:
                await asyncio.to_thread(metadata.forget, folder)
        except MetadataError as error:
            raise Refused(str(error)) from error
        # Last: by it the rest is found again.
        await asyncio.to_thread(functools.partial(host.ledger.forget, record.uuid))
        text = f"{host.config.host} has forgotten {record.guest}"
        if targets:
            text += f"; its disks are free here: {', '.join(targets)}"
        host.journal.note(record.guest, "forgotten", text)
        return {"guest": record.guest, "disks": targets, "text": text}


def disk_folders(paths: Paths, record: Record) -> list[Path]:
    """Durable folders of the guest's disks on this host."""
    return metadata.of_guest(paths.state / "disks", record.uuid)


def _require_own_disks(folders: list[Path], targets: list[str]) -> None:
    """:raise Refused: one is the other host's as well, and this host must not serve it meanwhile"""
    for folder, target in zip(folders, targets, strict=True):
        known = metadata.load(folder / "state.json")
        if known is not None and known.shared:
            raise Refused(
                f"The disk {target} is shared with the other host; expected --force from one who "
                "knows that the guest does not run there"
            )
