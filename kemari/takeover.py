# SPDX-License-Identifier: Apache-2.0
"""A guest comes to life on the host that stood by for it: claim, disks, revival, record."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from dataclasses import dataclass

from checkpoint.driver import Shell
from checkpoint.errors import ReviveError
from checkpoint.faultpoints import reach
from checkpoint.incoming import Committed
from checkpoint.stages import Laps
from kemari.host import Host
from kemari.interim import Interim
from kemari.ledger import Role
from kemari.replicas import StandbyDisks

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Legacy:
    """What is taken over.

    :ivar uuid: the guest's
    :ivar guest: its name
    :ivar generation: the one that begins
    :ivar came_from: name of the host that ran it
    :ivar why: a sentence for the ledger and the event log
    :ivar planned: that host lives and can have the guest back if it cannot run here
    """

    uuid: str
    guest: str
    generation: int
    came_from: str
    why: str
    planned: bool


class Takeover:
    """One takeover; each step is told with its time, because the world waits for it.

    :param shell: the guest's, with its memory as of the epoch that is to run
    :param disks: this host's copies of its disks
    :param interim: what was sent to the guest since its host fell silent
    """

    def __init__(
        self, host: Host, legacy: Legacy, shell: Shell, disks: StandbyDisks, interim: Interim
    ) -> None:
        self._host = host
        self._legacy = legacy
        self._shell = shell
        self._disks = disks
        self._interim = interim
        self._laps = Laps()
        self._revived_ns = 0

    async def revive(self, number: int, committed: Committed) -> None:
        """Have the guest run.

        :param number: the last complete epoch by what this host decided
        :param committed: the epoch that memory is of; one less if the last one changed nothing
        :raise Exception: it does not run here, never did, and never will
        """
        laps, legacy = self._laps, self._legacy
        if committed.epoch not in (number, number - 1):
            raise ReviveError(f"epoch {number} is complete, but {committed.epoch} is applied")
        reach("claim")
        if legacy.planned:
            await self._claim(Role.CLAIMED)
        else:
            # A full disk must not cost the guest; see docs/failure-model.md.
            await self._host.journal.attempt(
                legacy.guest, "record the claim", self._claim(Role.CLAIMED)
            )
        laps.lap("claim")
        reach("claimed")
        await self._disks.take_over(committed.epoch, legacy.generation)
        laps.lap("disks")
        elapsed = int((time.monotonic() - committed.captured_at) * 1e9)
        deliver = functools.partial(self._interim.deliver, legacy.guest)
        await asyncio.to_thread(self._shell.revive, committed.state, elapsed, deliver)
        self._revived_ns = laps.elapsed_ns
        laps.lap("revive")

    async def settle(self, epoch: int, silence: float) -> None:
        """Tell the network, the ledger, the toolstack and the administrator; what fails of it is
        said, and the guest runs on.

        :param epoch: the one that runs
        :param silence: seconds without evidence of the primary's life
        """
        host, legacy, attempt = self._host, self._legacy, self._host.journal.attempt
        announced = host.spawn(self._announce(), f"{legacy.guest}: announce")
        # First of all: a daemon that is killed before this takes the guest for a shell.
        await attempt(legacy.guest, "record the takeover", self._claim(Role.OWNER))
        reach("takeover-recorded")
        self._laps.lap("record")
        if not legacy.planned:
            # The toolstack takes a second of a slow host's processor, which the guest needs now.
            await asyncio.wait({announced})
            self._laps.lap("announce")
        await attempt(legacy.guest, "name the guest", asyncio.to_thread(self._shell.settle))
        host.journal.note(
            legacy.guest,
            "takeover",
            f"{host.config.host} runs {legacy.guest} from epoch {epoch} since generation "
            f"{legacy.generation}: {legacy.why}; it is UNPROTECTED now",
            generation=legacy.generation,
            epoch=epoch,
            revive_ms=round(self._revived_ns / 1e6, 1),
            silence_ms=round(silence * 1000, 1),
        )
        self._laps.lap("name")
        log.info("%s: taken over in %s", legacy.guest, self._laps)

    async def _claim(self, role: Role) -> None:
        legacy = self._legacy
        update = functools.partial(
            self._host.ledger.update,
            legacy.uuid,
            role=role,
            generation=legacy.generation,
            came_from=legacy.came_from,
            reason=legacy.why,
        )
        await asyncio.to_thread(update)

    async def _announce(self) -> None:
        reach("announce")
        try:
            await self._host.network.announce(self._shell.nics)
            reach("announced")
        except Exception as error:  # noqa: BLE001 - the guest runs; its first frame announces it too
            guest = self._legacy.guest
            self._host.journal.note(
                guest, "trouble", f"the addresses of {guest} could not be announced: {error}"
            )
