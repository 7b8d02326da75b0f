# SPDX-License-Identifier: Apache-2.0
"""The servers of a shell's disks, watched for as long as the guest may come to life there.

block-kemari starts them when the shell is built.  Without them a guest that takes over has no disk,
so a protection does not begin without them, and ends when one is lost.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable
from pathlib import Path

from diskbuffer.control import Control
from diskbuffer.errors import DiskError, ServerError
from diskbuffer.status import Flag
from kemari.targets import servers


class DiskServers:
    """Those of one shell.  For the event loop.

    :param run: folder of kemari's sockets
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._controls: dict[Path, Control] = {}
        self._ended: Path | None = None

    async def attach(self, targets: Iterable[tuple[Path, bool]]) -> None:
        """Find them, and hear of their ends from now on.

        :param targets: each with whether it is a shared one
        :raise ServerError: a target has none, or one that would not keep a replica as it is
        """
        for target, shared in targets:
            control = self._controls[target] = await self._find(target)
            _size, flags = await control.hello()
            # One that takes changes already would mark none of them after a takeover.
            if not flags & Flag.REPLICA or bool(flags & Flag.SHARED) != shared:
                raise ServerError(
                    f"The server of {target} on the standby does not serve it as a "
                    f"{'shared ' if shared else ''}replica (flags {flags:d})"
                )

    async def _find(self, target: Path) -> Control:
        why: DiskError = ServerError(f"{target} is not served by block-kemari on the standby")
        for folder in await asyncio.to_thread(servers, self._run, target):
            try:
                return await Control.connect(
                    folder / "control", functools.partial(self._heard, target)
                )
            except ServerError as error:
                why = error
        raise why

    def _heard(self, target: Path, news: str) -> None:
        if news == "closed":
            self._ended = self._ended or target

    def require(self) -> None:
        """:raise ServerError: one of them has ended"""
        if self._ended is not None:
            raise ServerError(
                f"nbdkit, the server of {self._ended} on the standby, has ended; expected it to "
                "serve as long as the guest may come to life there"
            )

    async def activate(self) -> None:
        """Have all of them take the guest's changes.

        :raise ServerError: one refuses, or has ended
        """
        await asyncio.gather(*(each.ask("activate") for each in self._controls.values()))

    async def close(self) -> None:
        """Hear no more of them (idempotent)."""
        controls, self._controls = self._controls, {}
        for control in controls.values():
            await control.close()
