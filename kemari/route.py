# SPDX-License-Identifier: Apache-2.0
"""From the host of a guest to its standby: the replication link, and whatever else leads there."""

from __future__ import annotations

import time
from collections.abc import Callable

from checkpoint.link import Link
from kemari.config import Address
from kemari.endings import ask_standby
from kemari.errors import Refused
from kemari.host import Host
from kemari.liveness import REPLICATION, Watch, until_silent
from kemari.ownership import next_generation, still_stands_by
from kemari.peers import Answer, Peers, further_addresses


class Route:
    """The way to one standby.

    :ivar asked: its addresses that were asked for, best first
    :ivar name: of the standby's host, as it calls itself; until it has, an address
    :ivar host_id: its UUID; "" until it has told
    :ivar further: the addresses that it has told, while the route is open
    """

    def __init__(self, host: Host, peers: Peers, asked: tuple[Address, ...]) -> None:
        self.asked = asked
        self.name = str(asked[0])
        self.host_id = ""
        self.further: tuple[Address, ...] = ()
        self._host = host
        self._peers = peers
        self._link: Link | None = None
        self._used = asked[0]

    @property
    def addresses(self) -> tuple[Address, ...]:
        """All at which the standby may be asked."""
        return (*self.asked, *self.further)

    @property
    def link(self) -> Link:
        """The replication link, once the route was opened."""
        assert self._link is not None, "the route was not opened"
        return self._link

    async def open(self) -> Link:
        """Connect for replication, and keep a connection on every other path until :meth:`leave`.

        :raise Refused: it leads to this host itself
        :raise CheckpointError: nobody answers there, or no kemarid
        """
        link, self._used = await self._host.connect_any(self.asked, "replicate")
        self._link = link
        if link.peer.host_id == self._host.host_id:
            raise Refused(f"{self._used} is this host itself; expected another one")
        self.name, self.host_id = link.peer.host, link.peer.host_id
        self.further = further_addresses(link, self._used)
        self._peers.want(self.host_id, self.further)
        self._peers.follow(link, self.further, self._used.port)
        return link

    async def next_generation(self, name: str, guest: str) -> int:
        """See :func:`kemari.ownership.next_generation`."""
        return await next_generation(self._host, self._peers, self._used, self.host_id, name, guest)

    async def until_silent(self, over: Callable[[], bool]) -> str:
        """Wait until the standby, or the link to it, is dead: which, as a clause.

        :param over: looked at now and then; when it is true, or the link is closed, "" is returned
        """
        link = self.link
        verdict = await until_silent(
            Watch(self._host.config.heartbeat, time.monotonic()),
            lambda: {REPLICATION: self._peers.heard(link)} | self._peers.evidence(self.host_id),
            lambda: over() or link.closed,
        )
        return "" if verdict is None else f"{self.name} {verdict.value}"

    async def still_stands_by(self, guest: str, generation: int) -> bool:
        """Whether the standby has surely not taken over by now: it is asked."""
        beat = self.link.peer.heartbeat
        return await still_stands_by(self._peers, self.addresses, guest, generation, beat)

    async def ask_to_stand_down(self, guest: str, generation: int) -> Answer:
        """See :func:`kemari.endings.ask_standby`."""
        heartbeat = self._host.config.heartbeat
        return await ask_standby(
            self._peers, heartbeat, self.host_id, self.addresses, guest, generation
        )

    def leave(self) -> None:
        """Keep no path any more (idempotent); the replication link is left as it is."""
        if self.host_id:
            self._peers.unwant(self.host_id, self.further)
            self._peers.unfollow(self.link, self.further, self._used.port)
        self.host_id, self.further = "", ()

    async def close(self) -> None:
        """Close the replication link, if there is one (idempotent)."""
        if self._link is not None:
            await self._link.close()
