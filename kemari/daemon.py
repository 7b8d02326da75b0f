# SPDX-License-Identifier: Apache-2.0
"""``kemarid``: joins everything on one host."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

from checkpoint.driver import Hypervisor
from checkpoint.errors import CheckpointError
from checkpoint.lifeline import Lifeline, Owner
from checkpoint.link import Link, LinkOptions
from checkpoint.network import Listener, connect, listen
from kemari import __version__
from kemari.config import Address, Config, Options, parse_address
from kemari.control import ControlServer
from kemari.epoch import PrimaryState
from kemari.errors import KemariError, NoSuchProtection, Refused
from kemari.host import WILDCARDS, Dial, Host, load_host_id, tls_contexts
from kemari.journal import Journal
from kemari.ledger import Ledger, Record, Role, answer_to_stand_down
from kemari.leftovers import Leftovers
from kemari.output import Network
from kemari.ownership import is_wished, recorded_options
from kemari.peers import Peers
from kemari.protection import Protection
from kemari.pulses import Pulses
from kemari.recovery import Recovery, clean, remember_takeover, took_over_unrecorded
from kemari.requests import Requests
from kemari.standby import StandbySession
from kemari.stragglers import Stragglers
from kemari.successor import StandbyState

log = logging.getLogger(__name__)

#: Seconds before a protection that was lost is tried again; doubled, up to the limit, each time
#: that the standby was there and yet it did not come about.
AGAIN: Final = 5.0
AGAIN_LIMIT: Final = 60.0


class Daemon:
    """One host's daemon.

    :param dial: opens connections to peers
    :param pulses: whether other hosts shall know by more than heartbeats that this one lives
    :ivar protections: guests that this host runs and protects, or did until the standby was lost
    :ivar sessions: guests that other hosts protect to this one, by UUID
    :ivar recoveries: guests whose owner is asked for, by UUID: a name may have been given again
    """

    def __init__(
        self,
        config: Config,
        hypervisor: Hypervisor,
        network: Network,
        *,
        dial: Dial = connect,
        pulses: bool = True,
    ) -> None:
        server_tls, client_tls = tls_contexts(config.tls)
        self.host = Host(
            config=config,
            hypervisor=hypervisor,
            network=network,
            ledger=Ledger(config.paths.ledger),
            journal=Journal(config.paths.log, config.host),
            host_id=load_host_id(config.paths.state / "host-id"),
            dial=dial,
            advertised=_advertised(config),
            ssl_client=client_tls,
        )
        if pulses:
            addresses = dict.fromkeys((*config.listen, *config.also))
            self.host.pulses = Pulses(
                self.host.host_id, config.heartbeat, addresses, self._trouble_with_pulses
            )
        self.peers = Peers(self.host, self)
        self._stragglers = Stragglers(self.host, self.peers)
        self.protections: dict[str, Protection] = {}
        self.sessions: dict[str, StandbySession] = {}
        self.recoveries: dict[str, Recovery] = {}
        self.again: dict[str, Record] = {}
        self._trying: dict[str, asyncio.Task[None]] = {}
        self._ssl_server = server_tls
        self._listener: Listener | None = None
        self._control = ControlServer(config.paths.socket, Requests(self).handle)
        self._forgetting: set[str] = set()
        self._closing = False

    # ---- Section: life ----

    async def start(self) -> None:
        """Clean up, listen, serve; on return the daemon is ready.

        :raise CheckpointError, KemariError: an address or the control socket cannot be had
        """
        config = self.host.config
        if self.host.pulses:
            # While connections are still refused, which proves life: a small Dom0 is busy with it.
            self.host.spawn(self.host.pulses.run(), "pulses")
        asked = await clean(self.host)
        # Before anybody can ask for them.
        self.recoveries = {record.uuid: Recovery(self.host, self.peers, record) for record in asked}
        addresses = dict.fromkeys((*config.listen, *config.also))
        wildcard = {each.port for each in addresses if each.host in WILDCARDS}
        self._listener = await listen(
            [
                (each.host, each.port)
                for each in addresses
                if each.host in WILDCARDS or each.port not in wildcard
            ],
            self.host.hello("liveness"),
            self._accepted,
            LinkOptions(ssl=self._ssl_server),
        )
        try:
            await self._control.start()
        except BaseException:
            await self._listener.close()
            raise
        for record in asked:
            self.host.spawn(self._recover(record), f"{record.guest}: recovery")
        for record in self.host.ledger:
            self._stragglers.look(record.uuid)
            self._remember_takeover(record.uuid, record.guest)
            if self._is_wished(record):
                self._protect_again(record, at_once=True)
        self.host.journal.note("", "daemon", f"kemarid {__version__} is ready")

    async def close(self) -> None:
        """End in good order: standbys are told, output is released, shells are removed."""
        self._closing = True
        for guest in list(self.again):
            self._forget_again(guest)
        await asyncio.gather(*(self._close(each) for each in list(self.protections.values())))
        for session in list(self.sessions.values()):
            await session.leave("kemarid stops")
        await self._control.close()
        if self._listener is not None:
            await self._listener.close()
        self.host.journal.note("", "daemon", "kemarid stops")
        for task in list(self.host.tasks):
            task.cancel()
        await asyncio.gather(*self.host.tasks, return_exceptions=True)

    def _trouble_with_pulses(self, sentence: str) -> None:
        self.host.journal.note("", "trouble", sentence)

    async def _close(self, protection: Protection) -> None:
        try:
            await protection.stop("kemarid stops")
        except (CheckpointError, KemariError) as error:
            self.host.journal.note(protection.guest, "trouble", str(error))

    def _is_wished(self, record: Record) -> bool:
        """See :func:`is_wished`; what was taken over goes by ``reprotect``, not by ``resume``."""
        return is_wished(record) and (self.host.config.resume or bool(record.came_from))

    async def _forget_to_resume(self, guest: str) -> None:
        """What an administrator has stopped stays so when the daemon is restarted."""

        def without(record: Record) -> dict[str, Any]:
            wanted = record.role in (Role.OWNER, Role.PRIMARY) and record.options.get("resume")
            return {"options": record.options | {"resume": False}} if wanted else {}

        for record in self.host.ledger:
            if record.guest == guest:
                await asyncio.to_thread(self.host.ledger.amend, record.uuid, without)

    # ---- Section: protecting ----

    async def protect(
        self, domain: str, standby: tuple[Address, ...], options: Options
    ) -> Protection:
        """Make a protection, not yet established.

        :raise Refused: the domain is protected already, or its owner is unknown, or the daemon ends
        """
        name = await self.name_of(domain)
        if self._closing:
            raise Refused(f"kemarid on {self.host.config.host} is stopping; expected it to run")
        known = self.protections.get(name)
        if known is not None and not known.machine.over:
            raise Refused(f"{name} is {known.state} already, to {known.route.name}")
        asked = self._asked_for(name)
        if asked is not None:
            raise Refused(f"{name} is asked for at {asked.peer} just now")
        if name in self._forgetting:
            raise Refused(f"{name} is being forgotten just now")
        self._forget_again(name)
        protection = Protection(self.host, self.peers, domain, standby, options)
        self.protections[name] = protection
        protection.guest = name
        self.host.spawn(self._follow(name, protection), f"{name}: follow")
        return protection

    def under_way(
        self, name: str, standby: tuple[Address, ...], options: Options
    ) -> Protection | None:
        """The protection of a guest that is just this one, and there or coming about."""
        known = self.protections.get(name)
        return known if known is not None and known.matches(standby, options) else None

    async def name_of(self, domain: str) -> str:
        """The name of a domain given by name or number; unknown ones as they are."""
        if domain.isdecimal():
            for number, name in await asyncio.to_thread(self.host.hypervisor.domains):
                if str(number) == domain:
                    return name
        return domain

    async def _follow(self, name: str, protection: Protection) -> None:
        """After a protection ended, forget it, or see to it that it is tried again."""
        await protection.coming.ended.wait()
        self._stragglers.look(protection.uuid, protection.unrecorded)
        if self._closing or self.protections.get(name) is not protection:
            return
        record = self.host.ledger.get(protection.uuid)
        lost = protection.lost and protection.machine.state is PrimaryState.UNPROTECTED
        if lost and not protection.stopped:
            if record is not None and self.host.config.resume:
                self._protect_again(record)
        else:
            self.protections.pop(name, None)
            in_vain = not (protection.by_itself or protection.stopped)
            if in_vain and record is not None and self._is_wished(record):
                self._protect_again(record)  # as was wished before this one was asked for

    async def stop(self, name: str, *, force: bool = False) -> str:
        """End the protection of a guest; the sentence that says what was done.

        :raise NoSuchProtection: there is none
        :raise LedgerError: it has ended, but that it is to stay so could not be recorded
        """
        waiting = self._forget_again(name)
        # A full disk must not keep output held: only when it is tried again at the end it may fail.
        wish = self._forget_to_resume(name)
        await self.host.journal.attempt(name, "record that it is not to be protected again", wish)
        waiting = self._forget_again(name) or waiting  # an attempt may have failed meanwhile
        asked = self._asked_for(name)
        waiting = waiting or (asked is not None and asked.role is Role.PRIMARY)
        protection = self.protections.get(name)
        if protection is None or protection.machine.over:
            self.protections.pop(name, None)
            if not waiting:
                raise NoSuchProtection(f"{name} is not protected on {self.host.config.host}")
            await self._forget_to_resume(name)
            return f"{name} is not protected again"
        await protection.stop("stopped, as asked", force=force)
        self._forget_again(name)
        await self._forget_to_resume(name)
        self.protections.pop(name, None)
        return f"{name} is no longer protected; its output flows freely"

    async def forget(self, name: str, *, force: bool = False) -> dict[str, Any]:
        """Remove what this host keeps of a guest that it has nothing to do with any more.

        :param name: of the guest, or its UUID
        :param force: although it may be the only good copy
        :raise NoSuchProtection: nothing is kept
        :raise Refused: the guest is protected or runs here, or needs ``force``
        """
        ledger = self.host.ledger
        record = ledger.get(name) or ledger.by_name(name)
        busy = name if record is None else record.guest
        protection = self.protections.get(busy)
        if protection is not None and not protection.machine.over:
            doing = f"is {protection.state}, to {protection.route.name}"
        elif busy in self.again or self._asked_for(busy):
            doing = "is to be protected again"
        elif any(each.guest == busy for each in self.sessions.values()):
            doing = "has this host as its standby"
        elif record is None:
            raise NoSuchProtection(f"{self.host.config.host} keeps nothing of {name}")
        elif busy in self._forgetting:
            doing = "is being forgotten"
        else:
            self._forgetting.add(busy)
            try:
                return await Leftovers(self.host, self.peers, record).forget(force=force)
            finally:
                self._forgetting.discard(busy)
        raise Refused(f"{busy} {doing}; expected it stopped before it is forgotten")

    def _forget_again(self, name: str) -> bool:
        task = self._trying.pop(name, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        return self.again.pop(name, None) is not None

    def _protect_again(self, record: Record, *, at_once: bool = False) -> None:
        self._forget_again(record.guest)
        self.again[record.guest] = record
        self._trying[record.guest] = self.host.spawn(
            self._keep_trying(record, 0.0 if at_once else AGAIN), f"{record.guest}: again"
        )

    async def _keep_trying(self, record: Record, delay: float) -> None:
        """Protect a guest again, with the options that it had, as soon as its standby is back."""
        guest, said = record.guest, ""
        task = self._trying[guest]
        options = recorded_options(record)
        standby = tuple(parse_address(each) for each in record.options["standby"])
        while await asyncio.to_thread(self.host.hypervisor.domain_exists, guest):
            await asyncio.sleep(delay)
            protection: Protection | None = None
            try:
                await self._reach(standby)
                protection = await self.protect(guest, standby, options)
                protection.by_itself = True
                await protection.establish()
                return
            except (CheckpointError, KemariError) as error:
                if str(error) != said:
                    said = str(error)
                    self.host.journal.note(
                        guest, "unprotected", f"{guest} is still UNPROTECTED: {said}"
                    )
            unwanted = protection is not None and protection.stopped
            if self._closing or unwanted or self._trying.get(guest, task) is not task:
                return  # or somebody else sees to it
            self.again[guest], self._trying[guest] = record, task
            # To look costs next to nothing; to open the guest in vain costs it time.
            delay = min(max(AGAIN, delay * 2), AGAIN_LIMIT) if protection else AGAIN
        self._forget_again(guest)
        gone = f"{guest} is gone or has shut down; it is not protected again"
        self.host.journal.note(guest, "guest-gone", gone)
        # One that is started under its name is another.
        wish = self._forget_to_resume(guest)
        await self.host.journal.attempt(guest, "record that it has ended", wish)

    async def _reach(self, standby: tuple[Address, ...]) -> None:
        """Look whether the standby is there, before the guest has to be looked at: that costs it
        time, and may be in vain for days.

        :raise CheckpointError: it is not
        """
        link, _ = await self.host.connect_any(standby, "liveness")
        await link.close()

    def _asked_for(self, name: str) -> Record | None:
        """The record of a guest of that name whose owner is asked for just now."""
        asked = [each.record for each in self.recoveries.values() if each.record.guest == name]
        return asked[0] if asked else None

    async def _recover(self, record: Record) -> None:
        recovery = self.recoveries[record.uuid]
        try:
            resolved = await recovery.resolve()
            self._stragglers.look(resolved.uuid, recovery.unrecorded)
            outcome = recovery.unrecorded or resolved
            if outcome.role is Role.OWNER:
                # A version before did not say.
                if self.host.config.resume and outcome.options.get("resume", True):
                    self._protect_again(outcome, at_once=True)
                else:
                    self.host.journal.note(
                        record.guest, "unprotected", f"protection of {record.guest} is off"
                    )
        finally:
            del self.recoveries[record.uuid]

    # ---- Section: standing by ----

    async def _accepted(self, link: Link) -> None:
        self.host.greeted(link)
        if link.peer.role == "liveness":
            await self.peers.serve(Lifeline(link, self))
            return
        session = StandbySession(self.host, self.peers, link, self)
        # A session outlives its connection, and a takeover outlives the listener's tasks.
        await asyncio.shield(self.host.spawn(self._serve(session), f"standby of {link.peer.host}"))

    async def _serve(self, session: StandbySession) -> None:
        try:
            await session.run()
        finally:
            if self.sessions.get(session.uuid) is session:
                del self.sessions[session.uuid]
        if session.machine.state is StandbyState.RUNNING:
            self._remember_takeover(session.uuid, session.guest)
            record = self.host.ledger.get(session.uuid)
            if record is not None and record.options.get("resume") and not self._closing:
                self._protect_again(record)

    def _remember_takeover(self, uuid: str, guest: str) -> None:
        self.host.spawn(self._see_recorded(uuid), f"{guest}: record the takeover")

    async def _see_recorded(self, uuid: str) -> None:
        """See to it that a takeover is recorded, and that what was wished comes after it.

        A restarted daemon whose ledger could not be written had nothing to go by.
        """
        await remember_takeover(self.host, uuid)
        record = self.host.ledger.get(uuid)
        if record is None or not self._is_wished(record) or self._closing:
            return
        if record.guest not in self.again and record.guest not in self.protections:
            self._protect_again(record)

    async def claim(self, uuid: str, name: str, session: StandbySession) -> None:
        """See :class:`kemari.standby.Registry`."""
        host = self.host.config.host
        for other in self._sessions_of(uuid, name):
            if other.machine.state is StandbyState.STOOD_DOWN:
                await other.over.wait()
        if self._closing:
            raise CheckpointError(f"kemarid on {host} is stopping")  # it would never be left
        if name in self._forgetting:
            raise CheckpointError(f"{host} is forgetting {name} just now")
        taken = any(not other.over.is_set() for other in self._sessions_of(uuid, name))
        protection = self.protections.get(name)
        if taken:
            raise CheckpointError(f"{host} stands by for {name} already")
        if (protection and not protection.machine.over) or self._asked_for(name):
            raise CheckpointError(f"{host} runs {name} itself; expected another guest")
        self.sessions[uuid] = session

    def _sessions_of(self, uuid: str, name: str) -> list[StandbySession]:
        return [each for each in self.sessions.values() if each.uuid == uuid or each.guest == name]

    # ---- Section: answers to other hosts (checkpoint.lifeline.Answers) ----

    async def owner(self, guest: str, generation: int) -> Owner:
        """Who this host is to ``guest`` (UUID)."""
        session = self.sessions.get(guest)
        if session is not None and not session.settled:
            return session.owner()
        for protection in self.protections.values():
            if protection.uuid == guest and not protection.machine.over:
                return Owner(guest, protection.generation, "primary")
        record = self.host.ledger.get(guest)
        if record is None:
            return Owner(guest, 0, "none")
        if await took_over_unrecorded(self.host, record):
            return Owner(guest, record.generation + 1, "running")
        owning = record.role in (Role.OWNER, Role.PRIMARY, Role.CLAIMED)
        if owning and await self.host.runs(record):
            return Owner(guest, record.generation, "running" if record.came_from else "primary")
        return Owner(guest, record.generation, "none")

    async def stand_down(self, guest: str, generation: int) -> Owner | None:
        """Give up every generation of ``guest`` up to ``generation``."""
        session = self.sessions.get(guest)
        if session is not None:
            if session.generation > generation:
                return session.owner()
            return await session.stand_down("the primary asked to")
        record = self.host.ledger.get(guest)
        newer = record is not None and record.generation >= generation
        if record is not None and newer and await took_over_unrecorded(self.host, record):
            return Owner(guest, record.generation + 1, "running")
        runs, since = answer_to_stand_down(record, generation)
        return Owner(guest, since, "running") if runs else None

    async def alive(self, guest: str, generation: int) -> None:
        """The peer says that the guest runs there; its bytes were evidence enough."""
        log.debug("%s runs at its primary in generation %d", guest, generation)


def _advertised(config: Config) -> tuple[str, ...]:
    return tuple(str(each) for each in dict.fromkeys((*config.listen, *config.also)))


def main() -> None:
    """Entry point of ``kemarid``; see :mod:`kemari.service`."""
    from kemari.service import main as serve

    serve()


if __name__ == "__main__":
    main()
