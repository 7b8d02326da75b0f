# SPDX-License-Identifier: Apache-2.0
"""What a takeover needs to know, found out while it is not known yet whether there will be one.

When a host dies, its standby learns it by the end of the heartbeat time, and most of that time it
has nothing to do.  So it looks ahead when some beats have not come; what it finds is of the last
epoch, and forgotten if another one comes after all.
"""

from __future__ import annotations

import asyncio
import logging

from checkpoint.driver import Shell
from checkpoint.incoming import Committed
from kemari.host import Host

log = logging.getLogger(__name__)


class Foresight:
    """Of one guest, on the host that stands by for it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._seen: Committed | None = None
        self._looking: asyncio.Task[None] | None = None

    def look(self, guest: str, shell: Shell, committed: Committed) -> None:
        """Begin to find out, once for each epoch, what running ``guest`` from it will take.

        :param committed: the epoch that the shell's memory is of
        """
        looking = self._looking is not None and not self._looking.done()
        if committed is self._seen or looking or committed.epoch == 0:
            return
        self._seen = committed
        self._looking = self._host.spawn(self._look(guest, shell, committed), f"{guest}: foresee")

    async def _look(self, guest: str, shell: Shell, committed: Committed) -> None:
        try:
            await asyncio.to_thread(shell.foresee, committed.state)
        except Exception as error:
            # If there is another reason, the takeover will meet it again, and say so.
            log.debug("%s: nothing is known in advance: %s", guest, error, exc_info=error)
