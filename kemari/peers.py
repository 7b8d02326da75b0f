# SPDX-License-Identifier: Apache-2.0
"""The paths to other hosts beside the replication links, and questions over them.

One small connection (role "liveness") is kept to each further address of a host that a protection
depends on; it beats by itself, and both ends may ask over it.  Connections that the other end
opened count as paths as well.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from checkpoint.errors import CheckpointError
from checkpoint.lifeline import Answers, Lifeline, Owner
from checkpoint.link import Link
from kemari.config import Address, parse_address
from kemari.errors import ConfigError, PeerUnreachable
from kemari.host import WILDCARDS, Host, host_is_alive
from kemari.pacemaker import plain

log = logging.getLogger(__name__)

#: Addresses that a peer may name.
MAX_ADDRESSES: Final = 16

#: States of :class:`checkpoint.lifeline.Owner` that, with a later generation, mean: not ours now.
OWNING: Final = ("running", "primary", "standby")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of asking a host to stand down.

    :ivar stood_down: it promised
    :ivar runs_since: it runs the guest since that generation (0: it does not say so)
    :ivar alive: its kernel gave some sign of life, though no answer
    """

    stood_down: bool = False
    runs_since: int = 0
    alive: bool = False

    @property
    def conclusive(self) -> bool:
        """Whether it settles who owns the guest."""
        return self.stood_down or self.runs_since > 0


class Peers:
    """Paths to all other hosts.

    :param answers: answers what other hosts ask
    """

    def __init__(self, host: Host, answers: Answers) -> None:
        self._host = host
        self._answers = answers
        # Each with its path, which connections from one address share.
        self._lifelines: dict[str, dict[Lifeline, str]] = {}
        self._evidence: dict[str, dict[str, float]] = {}
        self._followed: Counter[str] = Counter()
        self._wanted: Counter[tuple[str, Address]] = Counter()
        self._keepers: dict[tuple[str, Address], asyncio.Task[None]] = {}

    def evidence(self, host_id: str) -> dict[str, float]:
        """Path -> ``time.monotonic()`` of the last evidence of life of a host that is followed."""
        known = self._evidence.get(host_id, {})
        for lifeline, path in self._lifelines.get(host_id, {}).items():
            known[path] = max(known.get(path, 0.0), lifeline.link.last_heard)
        return known | {f"pulses of {ip}": when for ip, when in self._pulses(host_id).items()}

    def heard(self, link: Link) -> float:
        """``time.monotonic()`` of the last evidence of life on the path of a replication link."""
        pulses = self._pulses(link.peer.host_id)
        return max(link.last_heard, pulses.get(_ip(link), 0.0))

    def _pulses(self, host_id: str) -> dict[str, float]:
        return self._host.pulses.evidence(host_id) if self._host.pulses else {}

    def lifelines(self, host_id: str) -> list[Lifeline]:
        """Open connections over which that host can be asked."""
        return list(self._lifelines.get(host_id, {}))

    # ---- Keeping paths ----

    def want(self, host_id: str, addresses: Iterable[Address]) -> None:
        """Keep a connection to each of these addresses of a host, until :meth:`unwant`."""
        for address in addresses:
            key = (host_id, address)
            self._wanted[key] += 1
            if key not in self._keepers:
                self._keepers[key] = self._host.spawn(
                    self._keep(host_id, address), f"path to {address}"
                )

    def unwant(self, host_id: str, addresses: Iterable[Address]) -> None:
        """The counterpart of :meth:`want`."""
        for address in addresses:
            key = (host_id, address)
            self._wanted[key] -= 1
            if self._wanted[key] <= 0:
                del self._wanted[key]
                keeper = self._keepers.pop(key, None)
                if keeper is not None:
                    keeper.cancel()

    def follow(self, link: Link, further: Iterable[Address], port: int | None = None) -> None:
        """Keep evidence of the peer of a replication link, and exchange pulses with it.

        Until :meth:`unfollow`; of other hosts nothing is kept.

        :param further: its other addresses
        :param port: that its daemon listens on, if that is known
        """
        self._followed[link.peer.host_id] += 1
        self._evidence.setdefault(link.peer.host_id, {})
        if self._host.pulses:
            self._host.pulses.want(link.peer.host_id, _pulse_places(link, further, port))

    def unfollow(self, link: Link, further: Iterable[Address], port: int | None = None) -> None:
        """The counterpart of :meth:`follow`, with the same arguments."""
        self._followed[link.peer.host_id] -= 1
        if self._followed[link.peer.host_id] <= 0:
            del self._followed[link.peer.host_id], self._evidence[link.peer.host_id]
        if self._host.pulses:
            self._host.pulses.unwant(link.peer.host_id, _pulse_places(link, further, port))

    async def _keep(self, host_id: str, address: Address) -> None:
        heartbeat = self._host.config.heartbeat
        path = str(address)
        while True:
            try:
                link = await self._host.connect(address, "liveness", timeout=heartbeat)
            except CheckpointError as error:
                self._note_end(host_id, path, error)
            else:
                if link.peer.host_id == host_id:
                    await self.serve(Lifeline(link, self._answers), path)
                else:
                    await link.close()
            await asyncio.sleep(heartbeat / 4)

    async def serve(self, lifeline: Lifeline, path: str = "") -> None:
        """Answer on one connection, and count it as a path, until it ends."""
        peer = lifeline.link.peer.host_id
        # Not its port, which is another one each time.
        path = path or f"from {_ip(lifeline.link)}"
        lifelines = self._lifelines.setdefault(peer, {})
        lifelines[lifeline] = path
        try:
            self._note_end(peer, path, await lifeline.run())
        finally:
            del lifelines[lifeline]
            if not lifelines:
                del self._lifelines[peer]
            await lifeline.close()

    def _note_end(self, host_id: str, path: str, error: CheckpointError | None) -> None:
        if error is not None and host_is_alive(error) and host_id in self._evidence:
            self._evidence[host_id][path] = time.monotonic()

    # ---- Asking ----

    async def inquire(self, address: Address, guest: str, generation: int) -> Owner:
        """Who owns ``guest``, as far as the host at ``address`` knows.

        :raise PeerUnreachable: no answer
        """
        try:
            link = await self._host.connect(address, "liveness")
        except CheckpointError as error:
            raise PeerUnreachable(f"{address} gives no answer: {error}") from error
        lifeline = Lifeline(link, self._answers)
        serving = asyncio.create_task(lifeline.run())
        try:
            return await lifeline.inquire(guest, generation)
        except CheckpointError as error:
            raise PeerUnreachable(f"{address} gives no answer: {error}") from error
        finally:
            await lifeline.close()
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    async def ask_to_stand_down(
        self,
        host_id: str,
        addresses: Iterable[Address],
        guest: str,
        generation: int,
        timeout: float,
    ) -> Answer:
        """Ask a host over every path at once to give up ``guest``; the first answer counts.

        :param guest: UUID
        :param timeout: seconds to wait for an answer
        """
        questions = [
            asyncio.create_task(self._ask(line, guest, generation, timeout))
            for line in self.lifelines(host_id)
        ] + [
            asyncio.create_task(self._ask_afresh(address, host_id, guest, generation, timeout))
            for address in dict.fromkeys(addresses)
        ]
        alive = False
        try:
            for question in asyncio.as_completed(questions, timeout=timeout * 2):
                answer = await question
                if answer.conclusive:
                    return answer
                alive = alive or answer.alive
        except TimeoutError:
            pass  # the same as no answer: some path swallowed the question
        finally:
            for task in questions:
                task.cancel()
            await asyncio.gather(*questions, return_exceptions=True)
        return Answer(alive=alive)

    async def _ask_afresh(
        self, address: Address, host_id: str, guest: str, generation: int, timeout: float
    ) -> Answer:
        """Ask over a new connection: an open one may be stuck behind what it has swallowed."""
        try:
            link = await self._host.connect(address, "liveness", timeout=timeout)
        except CheckpointError as error:
            return Answer(alive=host_is_alive(error))
        if host_id and link.peer.host_id != host_id:
            await link.close()
            return Answer()
        lifeline = Lifeline(link, self._answers)
        serving = asyncio.create_task(lifeline.run())
        try:
            return await self._ask(lifeline, guest, generation, timeout)
        finally:
            await lifeline.close()
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    async def _ask(self, lifeline: Lifeline, guest: str, generation: int, timeout: float) -> Answer:
        asked = time.monotonic()
        try:
            owner = await lifeline.stand_down(guest, generation, timeout)
        except CheckpointError as error:
            # A standby that beats but has not answered yet is at it: removing a shell takes time.
            return Answer(alive=host_is_alive(error) or lifeline.link.last_heard > asked)
        return _judge(owner, generation)


def _judge(owner: Owner | None, generation: int) -> Answer:
    if owner is None:
        return Answer(stood_down=True)
    if owner.state in OWNING and owner.generation > generation:
        return Answer(runs_since=owner.generation, alive=True)
    return Answer(alive=True)


def _ip(link: Link) -> str:
    return _ip_of(link.peer_address)


@functools.lru_cache(maxsize=64)
def _ip_of(peer_address: str) -> str:
    # Asked at each look at the peer's life: some ten times a second for each guest.
    return plain(parse_address(peer_address, default_port=0).host)


def _pulse_places(link: Link, further: Iterable[Address], port: int | None) -> list[Address]:
    own = [Address(_ip(link), port)] if port is not None else []
    return list(dict.fromkeys([*own, *further]))


def further_addresses(link: Link, used: Address | None = None) -> tuple[Address, ...]:
    """Addresses that the peer of ``link`` says it has, without ``used``; bad ones are left out.

    A peer that listens on all its addresses names none: then it is the one that the link is with.
    """
    found = []
    for untrusted in link.peer.addresses[:MAX_ADDRESSES]:
        try:
            address = parse_address(untrusted, default_port=None)
            if address.host in WILDCARDS:
                here = parse_address(link.peer_address, default_port=0)
                address = Address(here.host, address.port)
        except ConfigError as error:
            log.warning("%s says it is reachable at a bad address: %s", link.peer.host, error)
        else:
            if address != used:
                found.append(address)
    return tuple(dict.fromkeys(found))
