# SPDX-License-Identifier: Apache-2.0
"""The standby side of one protection: shell, epochs, and what follows from silence.

:class:`StandbySession` carries out what :class:`kemari.Standby` decides.  The engine's
:class:`checkpoint.session.Receiver` stages, verifies, acknowledges and applies; it asks this side
before each of its promises.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import time
from collections.abc import Awaitable
from typing import Any, Final, Protocol

from checkpoint.driver import Description, Shell
from checkpoint.errors import CheckpointError
from checkpoint.faultpoints import reach
from checkpoint.incoming import Committed
from checkpoint.lifeline import Owner
from checkpoint.link import Link, PeerClosed, PeerSilent
from checkpoint.receiver import Receiver, StaleGeneration
from checkpoint.turns import sleep_until
from kemari.actions import (
    Actions,
    DestroyShell,
    Discard,
    PromiseStoodDown,
    Revive,
    TellRunning,
)
from kemari.config import Address, Options
from kemari.errors import KemariError
from kemari.foresight import Foresight
from kemari.host import Host, host_is_alive
from kemari.interim import Interim
from kemari.ledger import Record, Role
from kemari.liveness import REPLICATION, Verdict, Watch, suspected
from kemari.ownership import offered_options, standby_record
from kemari.peers import Peers, further_addresses
from kemari.replicas import StandbyDisks
from kemari.successor import Standby, StandbyState
from kemari.takeover import Legacy, Takeover

log = logging.getLogger(__name__)

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_NAME = re.compile(r"[A-Za-z0-9_.:+-]{1,128}\Z")
#: Guest memory that a peer may ask this host to set aside: 1 TiB.
MAX_PAGES: Final = 1 << 28


class Registry(Protocol):
    """Which session has which guest."""

    async def claim(self, uuid: str, name: str, session: StandbySession) -> None:
        """Make ``session`` the one for that guest, once an earlier one is over.

        An earlier one that stood down removes its shell and closes its disks first.

        :raise CheckpointError: another one has it, or this host runs that guest
        """


class StandbySession:
    """One guest that another host protects to this one.

    :param link: an accepted connection of role "replicate"
    :ivar machine: the decisions
    :ivar over: set once nothing of this session is left to do
    """

    def __init__(self, host: Host, peers: Peers, link: Link, registry: Registry) -> None:
        self.machine = Standby()
        self.uuid = ""
        self.guest = ""
        self.generation = 0
        self.primary = link.peer.host
        self.primary_id = link.peer.host_id
        self.why = "connected"
        self.since = time.time()
        self.over = asyncio.Event()
        self._host = host
        self._peers = peers
        self._registry = registry
        self._link = link
        self._receiver = Receiver(link, self)
        self._shell: Shell | None = None
        self._further: tuple[Address, ...] = further_addresses(link)
        self._probing = False
        self._watching = asyncio.Event()
        self._deciding = asyncio.Lock()
        self._revive_error: Exception | None = None
        self._interim = Interim(host)
        self._foresight = Foresight(host)
        self._disks = StandbyDisks(host.config.paths, host.locate, self._receiver.applied)

    # ---- Section: what the daemon calls ----

    async def run(self) -> None:
        """Serve the session until it is over, takeover included."""
        watcher = asyncio.create_task(self._watch())
        self._peers.follow(self._link, self._further)
        try:
            await self._receive()
            await self.over.wait()
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            self._interim.close()
            self._peers.unfollow(self._link, self._further)
            if self._probing:
                self._peers.unwant(self.primary_id, self._further)
            await self._link.close()
            await self._disks.close()

    async def stand_down(self, why: str) -> Owner | None:
        """Give up this generation for good, unless the guest runs here already.

        :return: None once the promise is durable; else who this host is
        """
        if self.machine.state in (StandbyState.TAKING_OVER, StandbyState.RUNNING):
            return self.owner()
        promises: list[bool] = []
        # Whoever asks may lose patience and close its connection, which ends this call: what was
        # decided must be done to its end all the same.
        await asyncio.shield(self._host.spawn(self._stand_down(why, promises), "stand down"))
        return None if any(promises) else self.owner()

    async def _stand_down(self, why: str, promises: list[bool]) -> None:
        await self._receiver.halt()
        async with self._deciding:
            if not self.machine.over:
                self.why = why
            actions = await self._do(self.machine.asked_to_stand_down())
        promises += [isinstance(action, PromiseStoodDown) for action in actions]

    async def leave(self, why: str) -> None:
        """The daemon ends: stand down and say so, so that nobody waits for this host."""
        async with self._deciding:
            if self.machine.over:
                if self.machine.state is StandbyState.STOOD_DOWN:
                    await self.over.wait()  # its shell is being removed
                return
            self.why = why
            actions = self.machine.link_dead()
            await self._record_end()
            await self._link.fail("internal", why)  # ERROR promises that this host stood down
        await self._receiver.halt()
        await self._do(actions)
        await self.over.wait()

    @property
    def settled(self) -> bool:
        """Whether the guest runs here by its own name: it may have ended or gone since."""
        return self.machine.state is StandbyState.RUNNING and self.over.is_set()

    def owner(self) -> Owner:
        """Who this host is to the guest."""
        match self.machine.state:
            case StandbyState.TAKING_OVER:
                return Owner(self.uuid, self.generation + 1, "reviving")
            case StandbyState.RUNNING:
                return Owner(self.uuid, self.generation + 1, "running")
            case StandbyState.STOOD_DOWN:
                return Owner(self.uuid, self.generation, "none")
        return Owner(self.uuid, self.generation, "standby")

    async def take_over(self, why: str) -> None:
        """Run the last complete epoch here; the primary is dead."""
        # Not under the lock: the receiver may be in a call to this side that waits for it.
        await self._receiver.halt()
        async with self._deciding:
            if not self.machine.over:
                self.why = why
            await self._do(self.machine.primary_dead())

    def status(self) -> dict[str, Any]:
        """What ``kemari status`` shows."""
        running = self.machine.state is StandbyState.RUNNING
        return {
            "guest": self.guest,
            "uuid": self.uuid,
            "role": "owner" if running else "standby",
            "state": "unprotected"
            if running
            else self.machine.state.name.lower().replace("_", "-"),
            "protected": self.machine.state is StandbyState.READY,
            "peer": self.primary,
            "generation": self.generation + running,
            "epoch": self.machine.complete,
            "since": round(self.since, 3),
            "why": self.why,
            "statistics": {"stages_ms": self._receiver.stages.as_json()},
        }

    def note(self, event: str, text: str, **figures: Any) -> None:
        """Put a sentence about this guest into the event log."""
        self._host.journal.note(self.guest, event, text, **figures)

    async def _attempt(self, what: str, work: Awaitable[Any]) -> None:
        await self._host.journal.attempt(self.guest, what, work)

    # ---- Section: what the receiver calls (checkpoint.session.Standby) ----

    async def prepare(
        self, description: Description, generation: int, options: dict[str, Any]
    ) -> tuple[Shell, dict[str, Any]]:
        """Build the shell.

        :raise CheckpointError: with the sentence that the primary's administrator reads
        """
        host = self._host
        untrusted = description
        if not _UUID.match(untrusted.uuid) or not _NAME.match(untrusted.name):
            raise CheckpointError("The description has no proper name and UUID of a guest")
        if not 0 < untrusted.pages <= MAX_PAGES:
            raise CheckpointError(f"{untrusted.pages} pages of guest memory are not possible")
        wanted = offered_options(options)
        known = host.ledger.generation(description.uuid)
        if generation <= known:
            raise StaleGeneration(
                f"generation {generation} of {description.name} is over; {known} is known on "
                f"{host.config.host}"
            )
        await self._registry.claim(description.uuid, description.name, self)
        self.uuid, self.guest, self.generation = description.uuid, description.name, generation
        exists = await asyncio.to_thread(host.hypervisor.domain_exists, description.name)
        if exists:
            raise CheckpointError(
                f"a domain named {description.name} exists on {host.config.host}; expected none"
            )
        if await asyncio.to_thread(host.hypervisor.destroy_shell, description.name):
            self.note("cleaned", f"removed an old shell of {self.guest}")
        try:
            # Before the shell, which a restarted daemon would not know of otherwise.
            await asyncio.to_thread(host.ledger.put, self._record(wanted))
        except KemariError as error:
            raise CheckpointError(str(error)) from error
        reach("standby-recorded")
        # Before the shell, whose hotplug script asks whether this host's copy may be written.
        offer = options.get("disks", [])
        answers = await self._disks.prepare(offer, self.primary_id, self.uuid, generation)
        self._shell = await asyncio.to_thread(host.hypervisor.create_shell, description)
        await self._disks.attach()
        reach("shell-built")
        self.why = "first copy under way"
        self.note(
            "standby", f"standing by for {self.guest} of {self.primary}, generation {generation}"
        )
        self._watching.set()
        return self._shell, {"host": host.config.host, "disks": answers}

    def _record(self, options: Options) -> Record:
        primary, back = (self.primary, self.primary_id), self._host.config.reprotect
        return standby_record(
            self.uuid, self.guest, self.generation, primary, self._further, options, back=back
        )

    async def writes(self, epoch: int, disk: int, untrusted_records: memoryview) -> None:
        """Records of one of the guest's disks."""
        await self._disks.writes(epoch, disk, untrusted_records)

    def issued(self, disk: int, position: int) -> None:
        """What of a shared disk this host need not issue when it takes over."""
        self._disks.issued(disk, position)

    def committed(self, committed: Committed) -> None:
        """An epoch is verified and complete; its ACK follows unless this raises."""
        if committed.epoch == 0:
            self._disks.seal(0)
            return
        if committed.epoch == 1 and self._shell is not None:
            # What could not be run must not be called protected.  Later states are of one kind.
            self._shell.examine(committed.state)
        for action in self.machine.committed(committed.epoch):
            if isinstance(action, Discard):
                raise CheckpointError(f"{self._host.config.host} takes no more epochs")
        self._disks.seal(committed.epoch)
        if committed.epoch == 1:
            self.why = f"{self.guest} could run here if {self.primary} died"
            self.note("ready", f"holds a complete copy of {self.guest}: {self.why}")

    async def handover(self, generation: int, committed: Committed) -> dict[str, Any]:
        """The primary gives the guest away.

        :raise CheckpointError: it cannot run here, never did and never will
        """
        if generation != self.generation + 1:
            raise CheckpointError(
                f"handover to generation {generation}; expected {self.generation + 1}"
            )
        # A link that breaks meanwhile must not cut a revival in two.
        await asyncio.shield(self._host.spawn(self._handed_over(committed.epoch), "handover"))
        if self.machine.state is not StandbyState.RUNNING:
            raise CheckpointError(str(self._revive_error or "this host stood down"))
        return {"host": self._host.config.host, "generation": generation}

    async def _handed_over(self, number: int) -> None:
        async with self._deciding:
            self.why = f"{self.primary} handed it over"
            await self._do(self.machine.handed_over(number))

    async def stop(self, reason: str) -> None:
        """The protection ends in good order."""
        await asyncio.shield(self._host.spawn(self._stopped(reason), "stop"))

    async def _stopped(self, reason: str) -> None:
        async with self._deciding:
            self.why = reason
            await self._do(self.machine.asked_to_stand_down())

    # ---- Section: watching ----

    async def _receive(self) -> None:
        try:
            outcome = await self._receiver.run()
            log.info("%s: session %s", self.guest or self.primary, outcome.value)
        except CheckpointError as error:
            await self._receiver_ended(error)
        if self._shell is None or self.machine.state is StandbyState.RUNNING:
            self.over.set()

    async def _receiver_ended(self, error: CheckpointError) -> None:
        if isinstance(error, PeerSilent):
            return  # the watch decides, or halted the receiver because it has decided
        async with self._deciding:
            if self.machine.over:
                return
            self.why = f"the link to {self.primary} ended: {error}"
            if self._receiver.stood_down or not isinstance(error, PeerClosed):
                # The primary was told so, or cannot be told any more what went wrong here.
                await self._do(self.machine.link_dead())
                return
            if self.machine.state is StandbyState.READY:
                self._probe()
                self.note(
                    "link-closed",
                    f"the daemon of {self.primary} is gone but its host lives; "
                    f"the copy of {self.guest} is kept until it is back",
                )
            await self._do(self.machine.link_closed())

    def _probe(self) -> None:
        """Look for signs of life of the primary's host by connecting to it."""
        if not self._probing:
            self._probing = True
            self._peers.want(self.primary_id, self._further)

    async def _watch(self) -> None:
        await self._watching.wait()
        watch = Watch(self._host.config.heartbeat, time.monotonic())
        closed_at: float | None = None
        while not self.over.is_set():
            await sleep_until(watch.due)
            now = time.monotonic()
            if not self._link.closed:
                watch.heard(REPLICATION, self._peers.heard(self._link))
            elif closed_at is None:
                closed_at = now
                if self._link.failure is None or host_is_alive(self._link.failure):
                    watch.closed(REPLICATION, now)
            for path, when in self._peers.evidence(self.primary_id).items():
                watch.heard(path, when)
            verdict = watch.tick(now)
            if self.machine.over:
                continue
            if verdict is Verdict.DEAD:
                silence = watch.silence(now)
                if self.machine.state is StandbyState.COPYING:
                    self.note(
                        "lost",
                        f"{self.primary} is dead (silent for {silence:.1f} s on every path) before "
                        f"the first copy of {self.guest} was complete: the guest is lost with it",
                    )
                await self.take_over(f"{self.primary} was silent for {silence:.1f} s on every path")
            elif verdict is Verdict.LINK_DEAD:
                await self._link_is_dead()
            elif self._shell is not None:
                self._prepare_takeover(self._shell, watch.silence(now))

    def _prepare_takeover(self, shell: Shell, silence: float) -> None:
        """Do what can be done before it is known whether the primary is dead, or undo it."""
        self._interim.watch(self.guest, shell.nics, silence)
        committed = self._receiver.at_rest
        if suspected(silence, self._host.config.heartbeat) and committed is not None:
            self._foresight.look(self.guest, shell, committed)

    async def _link_is_dead(self) -> None:
        await self._receiver.halt()
        async with self._deciding:
            if not self.machine.over:
                self.why = f"the replication link to {self.primary} is silent but its host lives"
            await self._do(self.machine.link_dead())

    # ---- Section: actions ----

    async def _do(self, actions: Actions) -> Actions:
        """Carry out decisions, in order; returns them all, with those that followed from them."""
        done: Actions = []
        for action in actions:
            done.append(action)
            match action:
                case Revive(number):
                    done += await self._do(await self._revive(number))
                case DestroyShell():
                    reach("promise")
                    await self._record_end()
                    reach("promised")
                    # Nobody waits for it: the toolstack takes seconds, and the primary's output
                    # waits for the answer.
                    self._host.spawn(self._remove_shell(), f"{self.guest}: remove the shell")
                case TellRunning() | PromiseStoodDown() | Discard():
                    pass  # the caller answers; the receiver has dropped what was incomplete
                case _:
                    raise AssertionError(f"{action} is not an action of a standby")
        return done

    async def _revive(self, number: int) -> Actions:
        committed = self._receiver.committed
        assert self._shell is not None
        assert committed is not None
        silence = time.monotonic() - max(
            [self._peers.heard(self._link), *self._peers.evidence(self.primary_id).values()]
        )
        legacy = Legacy(
            self.uuid,
            self.guest,
            self.generation + 1,
            self.primary,
            self.why,
            self.machine.planned,
        )
        takeover = Takeover(self._host, legacy, self._shell, self._disks, self._interim)
        try:
            await takeover.revive(number, committed)
        except Exception as error:
            log.debug("%s: revive failed", self.guest, exc_info=error)
            self._revive_error = error
            self.why = f"{self.guest} could not be brought to life: {error}"
            self.note("failed", self.why)
            return self.machine.revive_failed()
        reach("revived")
        actions = self.machine.revived()
        await takeover.settle(committed.epoch, silence)
        self.over.set()
        return actions

    async def _record_end(self) -> None:
        record = self._host.ledger.get(self.uuid)
        if record is not None and record.role is not Role.RELEASED:
            update = functools.partial(
                self._host.ledger.update, self.uuid, role=Role.RELEASED, reason=self.why
            )
            await self._attempt("record the end", asyncio.to_thread(update))

    async def _remove_shell(self) -> None:
        if self._shell is not None:
            await self._attempt("remove the shell", asyncio.to_thread(self._shell.destroy))
            reach("shell-removed")
            self.note("stood-down", f"no longer stands by for {self.guest}: {self.why}")
        # What is sealed still goes to the targets: the next session must not begin before.
        await self._attempt("close the disks", self._disks.close())
        self.over.set()
