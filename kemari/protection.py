# SPDX-License-Identifier: Apache-2.0
"""The protection of one guest on the host that runs it, from start to end.

:class:`Protection` carries out what :class:`kemari.epoch.Primary` decides, and feeds it with what
happens; :mod:`kemari.cycle` does the same for the checkpoints themselves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Any

from checkpoint.codec import Encoder
from checkpoint.driver import Source
from checkpoint.errors import CheckpointError
from checkpoint.faultpoints import reach
from checkpoint.link import Link, PeerRefused
from checkpoint.runstate import StateError
from checkpoint.sender import Declined, Sender
from kemari import actions as act
from kemari.coming import Coming
from kemari.config import Address, Options
from kemari.copying import Progress, base_copy
from kemari.cycle import Cycle
from kemari.disks import SourceDisks
from kemari.endings import STOP_PATIENCE, Ending
from kemari.epoch import LetGoReason, Primary, PrimaryState
from kemari.errors import PeerError, Refused
from kemari.headroom import Headroom
from kemari.host import Host, first_of, in_thread
from kemari.ledger import Record
from kemari.output import Output
from kemari.ownership import handing_over, is_wished, primary_record
from kemari.peers import Peers
from kemari.route import Route
from kemari.statistics import Statistics

log = logging.getLogger(__name__)


class Protection:
    """One guest, protected to one standby.

    :param peers: paths to the standby's host
    :param domain: the guest's name or number on this host
    :param addresses: of the standby, best first
    :ivar route: the way to its standby
    :ivar coming: its beginning, to wait for
    :ivar by_itself: nobody waits for it: one attempt of many
    :ivar stopped: why it was asked to end; "" if it was not
    :ivar lost: it ended because the standby was lost, not because somebody wanted it
    :ivar unrecorded: what the ledger should say of its end and does not: it could not be written
    """

    def __init__(
        self,
        host: Host,
        peers: Peers,
        domain: str,
        addresses: tuple[Address, ...],
        options: Options,
    ) -> None:
        self.domain = domain
        self.options = options
        self.guest = domain
        self.uuid = ""
        self.generation = 0
        self.machine = Primary(interval_only=options.interval_only)
        self.statistics = Statistics()
        self.coming = Coming()
        self.why = "connecting"
        self.lost = False
        self.unrecorded: Record | None = None
        self.since = time.time()
        self._host = host
        self.route = Route(host, peers, addresses)
        self.by_itself = False
        self._gone = False
        self._holding = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._establishing: asyncio.Task[Any] | None = None
        self._wished = False
        self.stopped = ""
        self._source: Source | None = None
        self._sender: Sender | None = None
        self._encoder: Encoder | None = None
        self._output: Output | None = None
        self._cycle: Cycle | None = None
        self._disks = SourceDisks(host.config.paths.run, host.locate, self.link_lost, self.note)

    # ---- Section: what the daemon calls ----

    async def establish(self) -> None:
        """Bring the protection about; returns when the first checkpoint is acknowledged.

        :raise CheckpointError, KemariError: it cannot be; the guest runs on as before, nothing of
            the protection is left on either host
        """
        self._establishing = asyncio.current_task()
        try:
            source = await in_thread(self._open_source)
            sender = await self._prepare(source)
            pages, percent = source.description.pages, self._host.config.reference_percent
            room, compression = max(1, pages * percent // 100), self.options.compression
            headroom = Headroom(self.guest)
            self._encoder = Encoder(
                pages, compression=compression, reference_pages=room, spare=headroom.pages
            )
            await self._copy(source, self._encoder, sender)
            if headroom.short:
                self.note(
                    "trouble",
                    f"Dom0 has no memory left for a whole copy of {self.guest}'s: it holds "
                    f"{self._encoder.held >> 8} MiB, and the rest goes over the link whole when it "
                    "changes; expected a larger Dom0 or a smaller reference_percent",
                )
            await self._begin(source, self._encoder, sender)
        except asyncio.CancelledError:
            why = self.stopped or "kemarid stops"
            self.coming.failure = Refused(f"{self.guest} is not protected: {why}")
            await self._undo(why)
            if self.stopped:
                raise self.coming.failure from None
            raise
        except Exception as error:
            self.coming.failure = error
            await self._undo(str(error) or type(error).__name__)
            raise
        finally:
            self._establishing = None
        # From here on the machine answers for what becomes of the guest.
        await self.established()

    async def established(self, report: Callable[[Progress], None] | None = None) -> None:
        """Wait until the first checkpoint is acknowledged, whoever has it brought about.

        :param report: called as the base copy goes on
        :raise CheckpointError, KemariError: as :meth:`establish`
        """
        if not await self.coming.wait(report):
            raise PeerError(f"The first checkpoint of {self.guest} failed: {self.why}")

    def matches(self, standby: tuple[Address, ...], options: Options) -> bool:
        """Whether this is the protection that is asked for, and it is there or comes about."""
        goes_on = self.machine.state in (PrimaryState.COPYING, PrimaryState.PROTECTED)
        same = options == self.options and not set(standby).isdisjoint(self.route.addresses)
        return goes_on and same and not self.stopped

    async def cancel(self) -> None:
        """End a protection that is still coming about; returns when nothing of it is left."""
        if self._establishing is not None:
            self._establishing.cancel()
        await self.coming.ended.wait()

    async def stop(self, reason: str, *, force: bool = False) -> None:
        """End the protection; returns when output flows freely again.

        :param force: do not wait for the standby's promise to stand down
        :raise Refused: the standby runs the guest, or does not answer and output stays held
        """
        self.stopped = reason
        if self.machine.state is PrimaryState.COPYING:
            await self.cancel()
            return
        if self.machine.over:
            await self.coming.ended.wait()  # it is being taken down
            return
        self.why = reason
        self._holding.clear()
        self.do(self.machine.stop())
        if force:
            self.do(self.machine.force())
        elif self.machine.state is PrimaryState.HOLDING:
            self._holding.set()
        await first_of(self.coming.ended.wait(), self._holding.wait())
        if self.machine.state is PrimaryState.HOLDING:
            raise Refused(
                f"{self.route.name} does not answer, so output of {self.guest} stays held; "
                "expected its promise to stand down"
            )
        if self.machine.state is PrimaryState.MOVED:
            raise Refused(f"{self.guest} runs on {self.route.name} since it took over")

    async def failover(self) -> None:
        """Move the guest to its standby, planned; returns when it runs there.

        :raise Refused: the guest is not protected
        :raise PeerError: the standby could not run it; the guest goes on here
        :raise LedgerError: it cannot be recorded that the standby may run it from now on
        """
        if not self.machine.protected:
            raise Refused(f"{self.guest} is {self.state}; expected protected")
        await in_thread(self._host.ledger.amend, self.uuid, handing_over)  # before the pause
        if self.machine.protected:
            self.note("failover", f"moving {self.guest} to {self.route.name}, as asked")
            self.do(self.machine.handover())
        await first_of(self.coming.ended.wait(), self._holding.wait())
        if self.machine.state is not PrimaryState.MOVED:
            raise PeerError(f"{self.guest} was not moved to {self.route.name}: {self.why}")

    @property
    def state(self) -> str:
        """One word for ``kemari list``."""
        if self.machine.state is PrimaryState.COPYING:
            return "copying" if self.coming.progress.begun else "connecting"
        if self.machine.state is PrimaryState.PROTECTED and not self.coming.protected.is_set():
            return "copying"
        return self.machine.state.name.lower().replace("_", "-")

    @property
    def only_tried(self) -> bool:
        """Whether it has not even begun, and may never: nothing that is worth telling."""
        return self.by_itself and self.state == "connecting"

    def status(self) -> dict[str, Any]:
        """What ``kemari status`` shows."""
        return {
            "guest": self.guest,
            "uuid": self.uuid,
            "role": "primary",
            "state": self.state,
            "protected": self.machine.protected,
            "peer": self.route.name,
            "addresses": [str(address) for address in self.route.asked],
            "generation": self.generation,
            "epoch": self.machine.acked,
            "since": round(self.since, 3),
            "why": self.why,
            "options": asdict(self.options),
            "progress": self.coming.progress.as_json(),
            "disks": self._disks.status(),
            "statistics": self.statistics.as_json(),
        }

    def note(self, event: str, text: str, **figures: Any) -> None:
        """Put a sentence about this guest into the event log."""
        self._host.journal.note(self.guest, event, text, **figures)

    # ---- Section: coming about ----

    def _open_source(self) -> Source:
        self._source = self._host.hypervisor.open_source(self.domain)
        return self._source

    async def _prepare(self, source: Source) -> Sender:
        """Connect, agree on a generation, have the shell built."""
        host = self._host
        self.guest, self.uuid = source.description.name, source.description.uuid
        await self._disks.open(source.disks)
        link = await self.route.open()
        self.spawn(self._watch(link), "watch")
        self.generation = await self.route.next_generation(self.guest, self.uuid)
        whom = f"{self.guest} to {self.route.name}"
        self.note("start", f"protecting {whom} as generation {self.generation}")
        self._sender = Sender(link)
        options = {"host": host.config.host, "disks": self._disks.offer()} | asdict(self.options)
        detail = await self._sender.prepare(source.description, self.generation, options)
        for text in await self._disks.begin(detail, self.route.host_id, self.uuid, self.generation):
            self.note("disk", text)
        return self._sender

    async def _copy(self, source: Source, encoder: Encoder, sender: Sender) -> None:
        self.why = "first copy under way"
        await in_thread(source.track)
        progress, report = self.coming.progress, self.coming.report
        progress.begin()
        await self._disks.copy(sender, self._host.config.disk_rate, progress, report)
        await base_copy(source, encoder, sender, progress, report, self._disks.end_base)
        self.statistics.base_bytes = progress.wire_bytes

    async def _begin(self, source: Source, encoder: Encoder, sender: Sender) -> None:
        """Make the ownership durable, hold output, take the first checkpoint."""
        reach("owner-record")
        domain = await in_thread(self._host.hypervisor.incarnation, self.guest)
        route = self.route
        whose, where = (route.name, route.host_id), (route.asked, route.further)
        before = self._host.ledger.get(self.uuid)
        self._wished = self.by_itself or is_wished(before)
        resume = self._host.config.resume or self.by_itself
        record = primary_record(
            source, self.generation, whose, where, self.options, domain, resume=resume
        )
        await in_thread(self._host.ledger.put, record)
        reach("owner-recorded")
        output = self._host.network.output(source.nics, self._host.config.buffer_limit)
        self._output = output
        await in_thread(output.setup)
        reach("output-held")
        await self._disks.hold(route.host_id, self.uuid, self.generation)
        options = self.options
        interval = options.interval_ms / 1000
        self._cycle = Cycle(
            self, source, output, encoder, sender, interval, self._disks, options.pace
        )
        self._cycle.listen()
        self.spawn(self._await_close(sender.link), "link")
        self.do(self.machine.begin())

    async def _undo(self, why: str) -> None:
        """Remove what a start that failed has built; the guest goes on."""
        self._establishing = None  # whoever cancels from here on only waits for the end of this
        self.why = why
        ending = Ending(self._host, self.guest, self.uuid)
        if self._cycle is not None:
            await self._cycle.quiet()
        await ending.attempt_here("issue what is held", self._disks.shared.release())
        if self._output is not None:
            await ending.attempt("remove the output buffer", self._output.teardown, drop=False)
        if self._source is not None:
            await ending.attempt("end tracking", self._source.untrack)
        await self._stop_over_link(why)
        # Who asked for it is told; what was wished before still is, unless it was stopped.
        wished = self._wished and not self.stopped
        await ending.not_begun(self.generation, why, wished=wished)
        if self.generation:
            self.note("refused", f"{self.guest} is not protected: {why}")
        await self._dispose()

    # ---- Section: events ----

    def link_lost(self, why: str, error: CheckpointError | None = None) -> None:
        """The standby, or what leads to it, cannot be relied on any more."""
        if self.machine.state is PrimaryState.COPYING:
            return  # the copy fails by itself, and nothing is held yet
        if self.machine.state in (PrimaryState.PROTECTED, PrimaryState.HANDING_OVER):
            self.lost = True
            self.why = why
            self.note(
                "standby-lost",
                f"{self.guest}: {why}; its output is held until {self.route.name} has answered",
            )
        if isinstance(error, PeerRefused):
            self.do(self.machine.stood_down())  # docs/protocol.md: ERROR is such a promise
        self.do(self.machine.link_lost())

    async def confirmed(self) -> bool:
        """Whether the standby has surely not taken over by now."""
        return await self.route.still_stands_by(self.uuid, self.generation)

    def guest_gone(self) -> None:
        """The guest has shut down or crashed."""
        self._gone = True
        self.why = "the guest is gone or has shut down"
        self.note("guest-gone", f"{self.guest} is gone or has shut down; its protection ends")
        self.do(self.machine.stop())

    async def _await_close(self, link: Link) -> None:
        error = await link.wait_closed()
        self.link_lost(f"the link to {self.route.name} ended: {error or 'closed'}", error)

    async def _watch(self, link: Link) -> None:
        """Judge the standby's life at a steady pace."""
        if what := await self.route.until_silent(lambda: self.machine.over):
            if self.machine.state is PrimaryState.COPYING:
                link.end(CheckpointError(what))  # ends the copy
            self.link_lost(what)

    # ---- Section: actions ----

    def do(self, actions: act.Actions) -> None:
        """Carry out decisions; what takes time goes on as a task."""
        cycle = self._cycle
        for action in actions:
            assert cycle is not None, "no decision before there is a cycle"
            match action:
                case act.Capture(number, keep_paused):
                    cycle.capture(number, keep_paused)
                case act.Send(number):
                    cycle.send(number)
                case act.Release():
                    cycle.release()
                    self._say_protected()
                case act.ArmInterval():
                    cycle.arm()
                case act.ArmRetry():
                    cycle.arm_retry()
                case act.Pause():
                    cycle.pause()
                case act.Unpause():
                    cycle.unpause()
                case act.Ask():
                    self.spawn(self._ask(), "ask")
                case act.Handover(number):
                    self.spawn(self._hand_over(number), "handover")
                case act.LetGo():
                    self.spawn(self._let_go(), "let go")
                case act.Abandon(generation):
                    self.spawn(self._abandon(generation), "abandon")
                case _:
                    raise AssertionError(f"{action} is not an action of a primary")

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a task that ends with the protection."""
        task = self._host.spawn(work, f"{self.guest}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _say_protected(self) -> None:
        if not self.coming.protected.is_set():
            self.coming.protected.set()
            self.why = f"{self.route.name} holds a complete copy"
            self.note("protected", f"{self.guest} is protected: {self.why}")

    async def _hand_over(self, number: int) -> None:
        assert self._sender is not None
        log.debug("%s: handing over epoch %d", self.guest, number)
        try:
            await self._disks.halt()
            await self._sender.handover(self.generation + 1)
        except Declined as error:
            self.why = f"{self.route.name} could not run it: {error}"
            self.do(self.machine.stood_down())
        except CheckpointError as error:
            self.link_lost(f"the handover was not answered: {error}", error)
        else:
            self.why = f"moved to {self.route.name}, as asked"
            self.do(self.machine.standby_runs(self.generation + 1))

    async def _ask(self) -> None:
        """Ask the standby to stand down; over the replication link first, if that still works."""
        reach("ask")
        holding = self.machine.state is PrimaryState.HOLDING
        if holding:
            await asyncio.sleep(self._host.config.heartbeat)
        elif not self.lost and await self._stop_over_link(self.why):
            self.do(self.machine.stood_down())
            return
        answer = await self.route.ask_to_stand_down(self.uuid, self.generation)
        if answer.stood_down:
            self.do(self.machine.stood_down())
        elif answer.runs_since:
            self.do(self.machine.standby_runs(answer.runs_since))
        else:
            # Two guests that live on one disk would destroy it.
            may_release = not self._disks.shared.disks
            policy = self._host.config.on_standby_loss
            self.do(self.machine.no_answer(release=may_release and policy == "release"))
            if self.machine.state is PrimaryState.HOLDING and not holding:
                self._holding.set()
                self.note(
                    "holding",
                    f"{self.route.name} gives no answer; the output of {self.guest} stays held",
                )

    async def _stop_over_link(self, why: str) -> bool:
        """Ask over the replication link itself; True once the standby has stood down."""
        if self._sender is None or self._sender.link.closed:
            return False
        try:
            async with asyncio.timeout(STOP_PATIENCE):
                if self._cycle is not None:
                    # An ack that comes first is judged first.
                    await first_of(self._cycle.at_rest(), self._sender.link.wait_closed())
                await self._sender.stop(why)
        except (CheckpointError, StateError, TimeoutError) as error:
            log.info("%s: no answer to STOP: %s", self.guest, error)
            return False
        return True

    async def _let_go(self) -> None:
        assert self._cycle is not None
        assert self._source is not None
        assert self._output is not None
        await self._cycle.quiet()
        self.unrecorded = await Ending(self._host, self.guest, self.uuid).let_go(
            self._source,
            self._output,
            self.route.name,
            self.why,
            self.machine.let_go or LetGoReason.FORCE,
            self._disks.shared.release,
            gone=self._gone,
        )
        await self._dispose()

    async def _abandon(self, generation: int) -> None:
        assert self._cycle is not None
        assert self._source is not None
        assert self._output is not None
        await self._cycle.quiet()
        await Ending(self._host, self.guest, self.uuid).abandon(
            self._source, self._output, self.route.name, generation, self._disks.shared.drop
        )
        await self._dispose()

    async def _dispose(self) -> None:
        self.route.leave()
        if self._sender is not None:
            await self._sender.close()
        await self.route.close()
        await self._disks.teardown()
        self.coming.ended.set()
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        # By hand: a garbage collection may be far away, and each protection takes a guest's worth.
        if self._cycle is not None:
            await self._cycle.close()
        if self._encoder is not None:
            self._encoder.close()
