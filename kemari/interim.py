# SPDX-License-Identifier: Apache-2.0
"""What is sent to a guest while, as it seems, no host runs it: kept by the host that stands by.

Nobody knows of a death before the heartbeat time is over.  When two beats of it have not come, the
host that stands by begins to keep what its bridge sees for the guest
(:mod:`netbuffer.backlog`), and forgets it with the next sign of life.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from checkpoint.driver import Nic
from kemari.host import Host
from kemari.liveness import suspected
from kemari.output import Backlog

log = logging.getLogger(__name__)


class Interim:
    """Of one guest, on the host that stands by for it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._backlog: Backlog | None = None
        self._failed = False

    def watch(self, guest: str, nics: Sequence[Nic], silence: float) -> None:
        """Keep frames or do not.

        :param silence: seconds without a sign of life of the host that runs the guest
        """
        if not suspected(silence, self._host.config.heartbeat):
            self.close()
        elif self._backlog is None and not self._failed:
            try:
                self._backlog = self._host.network.backlog(nics)
            except Exception as error:  # noqa: BLE001 - of netbuffer or the kernel: senders repeat them
                self._trouble(guest, f"frames for {guest} cannot be kept", error)

    def deliver(self, guest: str) -> None:
        """The guest runs here: it is given what was kept, if anything was.

        May be called in another thread, while nothing else is called.
        """
        backlog, self._backlog = self._backlog, None
        if backlog is None:
            return
        try:
            count = backlog.deliver()
        except Exception as error:  # noqa: BLE001 - as in watch
            self._trouble(guest, f"frames for {guest} were lost", error)
        else:
            log.info("%s: %d frames that came meanwhile were delivered", guest, count)

    def close(self) -> None:
        """Keep nothing (idempotent)."""
        if self._backlog is not None:
            self._backlog.close()
            self._backlog = None

    def _trouble(self, guest: str, what: str, error: Exception) -> None:
        self._failed = True
        self._loop.call_soon_threadsafe(
            self._host.journal.note, guest, "trouble", f"{what}: {error}"
        )
