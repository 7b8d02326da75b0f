# SPDX-License-Identifier: Apache-2.0
"""The protection of one guest on the host that runs it.

:class:`Protection` carries out what :class:`kemari.epoch.Primary` decides, and feeds it with what
happens.  Events are handled in the loop's thread as they come: a held frame makes the tap readable,
the capture runs at once, in the same callback, unless it is a big one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from checkpoint.codec import Encoder
from checkpoint.driver import Captured, Source, Staging
from checkpoint.errors import CheckpointError, NotQuiescent
from checkpoint.link import Link, PeerRefused
from checkpoint.runstate import StateError
from checkpoint.sender import Declined, Sender
from kemari import epoch
from kemari.config import Address
from kemari.copying import Progress, base_copy
from kemari.epoch import LetGoReason, Primary, PrimaryState
from kemari.errors import PeerError, Refused
from kemari.host import Host
from kemari.ledger import Record, Role
from kemari.liveness import REPLICATION, Verdict, Watch
from kemari.output import Output
from kemari.peers import OWNING, Peers, further_addresses
from kemari.statistics import Statistics

log = logging.getLogger(__name__)

#: Captures of at most this many pages run in the loop's thread: handing one to another thread costs
#: more than it takes.
INLINE_PAGES: Final = 1024
#: Pages that the staging buffer holds at first (8 MiB); it grows when a capture needs more.
STAGING_PAGES: Final = 2048
#: Seconds after an unusable pause point, doubled each time up to the limit.
RETRY: Final = 0.001
RETRY_LIMIT: Final = 0.1
#: Heartbeat times that a standby has to answer "stand down".
PATIENCE: Final = 2
#: Seconds to wait for the daemon of a standby whose host is alive: its supervisor restarts it.
RESTART_PATIENCE: Final = 15.0


@dataclass(frozen=True, slots=True)
class Options:
    """Options of ``kemari start``.

    :ivar interval_ms: longest time between two checkpoints
    :ivar interval_only: checkpoints by the timer only, not for held output
    :ivar compression: of replicated pages
    """

    interval_ms: int = 1000
    interval_only: bool = False
    compression: str = "lz4"


class Protection:
    """One guest, protected to one standby.

    :param peers: paths to the standby's host
    :param domain: the guest's name or number on this host
    :param addresses: of the standby, best first
    :ivar ended: set once the protection is over, whatever the end was
    :ivar lost: it ended because the standby was lost, not because somebody wanted it
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
        self.addresses = addresses
        self.options = options
        self.guest = domain
        self.uuid = ""
        self.generation = 0
        self.standby = str(addresses[0])
        self.standby_id = ""
        self.machine = Primary(interval_only=options.interval_only)
        self.statistics = Statistics()
        self.progress = Progress()
        self.protected = asyncio.Event()
        self.ended = asyncio.Event()
        self.why = "connecting"
        self.lost = False
        self.since = time.time()
        self._host = host
        self._peers = peers
        self._establishing: asyncio.Task[Any] | None = None
        self._cancelled = ""
        self._loop = asyncio.get_running_loop()
        self._further: tuple[Address, ...] = ()
        self._tasks: set[asyncio.Task[None]] = set()
        self._capture_task: asyncio.Task[None] | None = None
        self._send_task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._retry_delay = RETRY
        self._pages_before = 0
        self._captured_ns = 0
        self._stalled_at = 0.0
        self._source: Source | None = None
        self._output: Output | None = None
        self._link: Link | None = None
        self._sender: Sender | None = None
        self._encoder: Encoder | None = None
        self._staging = Staging(0)

    # ---- Section: what the daemon calls ----

    async def establish(self, report: Callable[[Progress], None] = lambda progress: None) -> None:
        """Bring the protection about; returns when the first checkpoint is acknowledged.

        :param report: called as the base copy goes on
        :raise CheckpointError, KemariError: it cannot be; the guest runs on as before, nothing of
            the protection is left on either host
        """
        self._establishing = asyncio.current_task()
        try:
            await self._prepare()
            await self._copy(report)
            await self._begin()
        except asyncio.CancelledError:
            await self._undo(self._cancelled or "kemarid stops")
            if self._cancelled:
                raise Refused(f"{self.guest}: {self._cancelled}") from None
            raise
        except BaseException as error:
            await self._undo(str(error) or type(error).__name__)
            raise
        finally:
            self._establishing = None
        # From here on the machine answers for what becomes of the guest.
        await _first(self.protected.wait(), self.ended.wait())
        if not self.protected.is_set():
            raise PeerError(f"The first checkpoint of {self.guest} failed: {self.why}")

    async def stop(self, reason: str, *, force: bool = False) -> None:
        """End the protection; returns when output flows freely again.

        :param force: do not wait for the standby's promise to stand down
        :raise Refused: the standby runs the guest, or does not answer and output stays held
        """
        self.why = reason
        self._do(self.machine.stop())
        if force:
            self._do(self.machine.force())
        await _first(self.ended.wait(), self._until_holding())
        if self.machine.state is PrimaryState.HOLDING:
            raise Refused(
                f"{self.standby} does not answer, so output of {self.guest} stays held; "
                "expected its promise to stand down"
            )
        if self.machine.state is PrimaryState.MOVED:
            raise Refused(f"{self.guest} runs on {self.standby} since it took over")

    async def cancel(self, reason: str) -> None:
        """End a protection that is still coming about; returns when nothing of it is left."""
        if self._establishing is not None:
            self._cancelled = reason
            self._establishing.cancel()
        await self.ended.wait()

    async def failover(self) -> None:
        """Move the guest to its standby, planned; returns when it runs there.

        :raise Refused: the guest is not protected
        :raise PeerError: the standby could not run it; the guest goes on here
        """
        if not self.machine.protected:
            raise Refused(f"{self.guest} is {self.state}; expected protected")
        self.note("failover", f"moving {self.guest} to {self.standby}, as asked")
        self._do(self.machine.handover())
        await _first(self.ended.wait(), self._until_holding())
        if self.machine.state is not PrimaryState.MOVED:
            raise PeerError(f"{self.guest} was not moved to {self.standby}: {self.why}")

    @property
    def state(self) -> str:
        """One word for ``kemari list``."""
        if self.machine.state is PrimaryState.COPYING:
            return "copying" if self.progress.round else "connecting"
        if self.machine.state is PrimaryState.PROTECTED and not self.protected.is_set():
            return "copying"
        return self.machine.state.name.lower().replace("_", "-")

    def status(self) -> dict[str, Any]:
        """What ``kemari status`` shows."""
        machine = self.machine
        return {
            "guest": self.guest,
            "uuid": self.uuid,
            "role": "primary",
            "state": self.state,
            "protected": machine.protected,
            "peer": self.standby,
            "addresses": [str(address) for address in self.addresses],
            "generation": self.generation,
            "epoch": machine.acked,
            "since": round(self.since, 3),
            "why": self.why,
            "options": asdict(self.options),
            "progress": self.progress.as_json(),
            "statistics": self.statistics.as_json(),
        }

    def note(self, event: str, text: str, **figures: Any) -> None:
        """Put a sentence about this guest into the event log."""
        self._host.journal.note(self.guest, event, text, **figures)

    # ---- Section: coming about ----

    async def _prepare(self) -> None:
        host = self._host
        source = await asyncio.to_thread(host.hypervisor.open_source, self.domain)
        self._source = source
        self.guest, self.uuid = source.description.name, source.description.uuid
        link, address = await host.connect_any(self.addresses, "replicate")
        self._link = link
        if link.peer.host_id == host.host_id:
            raise Refused(f"{address} is this host itself; expected another one")
        self.standby, self.standby_id = link.peer.host, link.peer.host_id
        self._further = further_addresses(link, address)
        self._peers.want(self.standby_id, self._further)
        self._spawn(self._watch(), "watch")
        self.generation = await self._next_generation(address)
        self._sender = Sender(link)
        self._encoder = Encoder(source.description.pages, compression=self.options.compression)
        self.note(
            "start",
            f"protecting {self.guest} to {self.standby} as generation {self.generation}",
        )
        await self._sender.prepare(
            source.description, self.generation, {"host": host.config.host} | asdict(self.options)
        )

    async def _next_generation(self, address: Address) -> int:
        """The generation after all that either host knows; also asks who owns the guest."""
        own = self._host.ledger.generation(self.uuid)
        answer = await self._peers.inquire(address, self.uuid, own)
        if answer.state == "standby":
            # What an earlier protection by this host left there: the guest runs here.
            await self._peers.ask_to_stand_down(
                self.standby_id,
                (address,),
                self.uuid,
                answer.generation,
                self._host.config.heartbeat * PATIENCE,
            )
            answer = await self._peers.inquire(address, self.uuid, own)
        if answer.state in OWNING and answer.generation >= own:
            raise Refused(
                f"{self.standby} is {answer.state} of {self.guest} in generation "
                f"{answer.generation}; expected it to have nothing of that guest"
            )
        return max(own, answer.generation) + 1

    async def _copy(self, report: Callable[[Progress], None]) -> None:
        assert self._source and self._encoder and self._sender
        self.why = "first copy under way"
        await asyncio.to_thread(self._source.track)
        await base_copy(
            self._source,
            self._encoder,
            self._sender,
            self.progress,
            lambda: report(self.progress),
        )
        self.statistics.base_bytes = self.progress.wire_bytes

    async def _begin(self) -> None:
        """Hold output, make the ownership durable, take the first checkpoint."""
        assert self._source and self._link
        pages = self._source.description.pages
        self._staging = Staging(min(STAGING_PAGES, pages))
        await asyncio.to_thread(
            self._host.ledger.put,
            Record(
                uuid=self.uuid,
                guest=self.guest,
                role=Role.PRIMARY,
                generation=self.generation,
                peer=self.standby,
                addresses=tuple(str(each) for each in (*self.addresses, *self._further)),
                options=asdict(self.options)
                | {
                    "peer_id": self.standby_id,
                    "devices": [nic.vif for nic in self._source.nics],
                    "standby": [str(each) for each in self.addresses],
                },
                reason="protection started",
            ),
        )
        output = self._host.network.output(self._source.nics, self._host.config.buffer_limit)
        self._output = output
        await asyncio.to_thread(output.setup)
        self._loop.add_reader(output.fileno(), self._on_frame)
        self._spawn(self._await_close(self._link), "link")
        self._do(self.machine.begin())

    async def _undo(self, why: str) -> None:
        """Remove what a start that failed has built; the guest goes on."""
        self.why = why
        if self._output is not None:
            with contextlib.suppress(ValueError):
                self._loop.remove_reader(self._output.fileno())
            await self._attempt("remove the buffer", self._output.teardown, drop=False)
        if self._source is not None:
            await self._attempt("end tracking", self._source.untrack)
        if self._sender is not None and self._link is not None and not self._link.closed:
            try:
                async with asyncio.timeout(self._host.config.heartbeat * PATIENCE):
                    await self._sender.stop(self.why)
            except (CheckpointError, StateError, TimeoutError) as failure:
                log.info("%s: the standby was not told of the end: %s", self.guest, failure)
        record = self._host.ledger.get(self.uuid)
        if record and record.role is Role.PRIMARY and record.generation == self.generation:
            await self._attempt("record", self._record, role=Role.OWNER, reason=self.why)
        if self.uuid:
            self.note("refused", f"{self.guest} is not protected: {self.why}")
        await self._dispose()

    # ---- Section: events ----

    def _on_frame(self) -> None:
        """The tap is readable: a frame of the guest is held."""
        output = self._output
        if output is None or output.drain() == 0:
            return
        if self.machine.capturing or self.machine.captured > self.machine.acked:
            self._check_backlog(output)
        else:
            self.statistics.by_output += 1
        self._do(self.machine.output_held())

    def _check_backlog(self, output: Output) -> None:
        if not self.machine.stalled and output.full():
            self._do(self.machine.buffer_full())

    def _on_interval(self) -> None:
        self._timer = None
        self.statistics.by_interval += 1
        self._do(self.machine.interval_elapsed())

    def _link_lost(self, why: str, error: CheckpointError | None = None) -> None:
        if self.machine.state in (PrimaryState.PROTECTED, PrimaryState.HANDING_OVER):
            self.lost = True
            self.why = why
            self.note(
                "standby-lost", f"{self.guest}: {why}; its output is held until that is clear"
            )
        if isinstance(error, PeerRefused) and self.machine.state is not PrimaryState.COPYING:
            self._do(self.machine.stood_down())  # docs/protocol.md: ERROR is such a promise
        self._do(self.machine.link_lost())

    async def _await_close(self, link: Link) -> None:
        error = await link.wait_closed()
        self._link_lost(f"the link to {self.standby} ended: {error or 'closed'}", error)

    async def _watch(self) -> None:
        """Judge the standby's life at a steady pace."""
        assert self._link
        watch = Watch(self._host.config.heartbeat, time.monotonic())
        while not self.ended.is_set():
            await asyncio.sleep(watch.pace)
            if not self._link.closed:
                watch.heard(REPLICATION, self._link.last_heard)
            for path, when in self._peers.evidence(self.standby_id).items():
                watch.heard(path, when)
            now = time.monotonic()
            verdict = watch.tick(now)
            if verdict is not Verdict.ALIVE and not self._link.closed:
                what = (
                    "is silent on every path"
                    if verdict is Verdict.DEAD
                    else ("is silent on the replication link but alive on another path")
                )
                if self.machine.state is PrimaryState.COPYING:
                    await self._link.fail("silent", f"{self.standby} {what}")
                self._link_lost(f"{self.standby} {what}")
                return

    # ---- Section: actions ----

    def _do(self, actions: epoch.Actions) -> None:
        """Carry out decisions; what takes time goes on as a task."""
        for action in actions:
            match action:
                case epoch.Capture(number, keep_paused):
                    self._capture(number, keep_paused)
                case epoch.Send(number):
                    self._send_task = self._spawn(self._send(number), "send")
                case epoch.Release():
                    self._release()
                case epoch.ArmInterval():
                    self._arm()
                case epoch.ArmRetry():
                    self._loop.call_later(self._retry_delay, self._retry)
                    self._retry_delay = min(self._retry_delay * 2, RETRY_LIMIT)
                case epoch.Pause():
                    self._pause()
                case epoch.Unpause():
                    self._unpause()
                case epoch.Ask():
                    self._spawn(self._ask(), "ask")
                case epoch.Handover(number):
                    self._spawn(self._hand_over(number), "handover")
                case epoch.LetGo():
                    self._spawn(self._let_go(), "let go")
                case epoch.Abandon(generation):
                    self._spawn(self._abandon(generation), "abandon")
                case _:
                    raise AssertionError(f"{action} is not an action of a primary")

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self.options.interval_ms / 1000, self._on_interval)

    def _retry(self) -> None:
        self._do(self.machine.retry())

    def _pause(self) -> None:
        self.statistics.stalls += 1
        self._stalled_at = time.monotonic()
        if self._source is not None and self._capture_task is None:
            self._source.pause()

    def _unpause(self) -> None:
        if self._stalled_at:
            self.statistics.stalled_ms += (time.monotonic() - self._stalled_at) * 1000
            self._stalled_at = 0.0
        if self._source is not None and not self.machine.over:
            self._source.unpause()

    def _release(self) -> None:
        assert self._output
        try:
            self._output.release_epoch()
        except Exception as error:  # noqa: BLE001 - whatever it is, the guest must not stay mute
            self._link_lost(f"the output buffer failed: {error}")
        if not self.protected.is_set():
            self.protected.set()
            self.why = "protected"
            self.note(
                "protected",
                f"{self.guest} is protected to {self.standby}: the first checkpoint is there",
            )

    # -- capture and send --

    def _capture(self, number: int, keep_paused: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if number > 1 and self._pages_before <= INLINE_PAGES:
            self._captured(number, self._capture_now(keep_paused))
        else:
            self._capture_task = self._spawn(self._capture_aside(number, keep_paused), "capture")

    async def _capture_aside(self, number: int, keep_paused: bool) -> None:
        outcome = await asyncio.to_thread(self._capture_now, keep_paused)
        self._capture_task = None
        self._captured(number, outcome)

    def _capture_now(self, keep_paused: bool) -> Captured | Exception:
        assert self._source
        self._captured_ns = time.monotonic_ns()
        try:
            return self._source.capture(self._staging, self._close_output, leave_paused=keep_paused)
        except Exception as error:  # noqa: BLE001 - judged by the caller, in the loop's thread
            return error

    def _close_output(self) -> None:
        assert self._output
        # Frames that were seen until now belong to the epoch that is closed: no new trigger.
        self._output.drain()
        self._output.close_epoch()

    def _captured(self, number: int, outcome: Captured | Exception) -> None:
        match outcome:
            case Captured():
                self._retry_delay = RETRY
                self._pages_before = outcome.pages
                self.statistics.checkpoints += 1
                self.statistics.pages.add(outcome.pages)
                self.statistics.pause_ms.add(outcome.pause_ns / 1e6)
                self._do(self.machine.captured_epoch(number))
            case NotQuiescent():
                self.statistics.not_quiescent += 1
                self._do(self.machine.capture_failed())
            case OverflowError():
                self._enlarge_staging()
                self._do(self.machine.capture_failed())
            case _:
                self._do(self.machine.capture_failed())
                self._spawn(self._capture_broke(outcome), "capture failed")

    def _enlarge_staging(self) -> None:
        assert self._source
        pages = self._source.description.pages
        self.statistics.staging_grown += 1
        self._staging = Staging(min(pages, max(1, self._staging.capacity) * 4))
        # The next capture is a big one.
        self._pages_before = self._staging.capacity

    async def _capture_broke(self, error: Exception) -> None:
        assert self._source
        log.debug("%s: capture failed", self.guest, exc_info=error)
        if await asyncio.to_thread(self._source.alive):
            self._link_lost(f"a checkpoint failed: {error}")
        else:
            self.why = "the guest is gone or has shut down"
            self.note("guest-gone", f"{self.guest} is gone or has shut down; protection ends")
            self._do(self.machine.stop())

    async def _send(self, number: int) -> None:
        assert self._encoder and self._sender
        self._do(self.machine.sent_epoch(number))
        try:
            if self._staging.count <= INLINE_PAGES:
                batches = list(self._encoder.encode(self._staging))
            else:
                batches = await asyncio.to_thread(
                    lambda encoder, staging: list(encoder.encode(staging)),
                    self._encoder,
                    self._staging,
                )
            state = self._encoder.encode_state(self._staging.state)
            sent = await self._sender.send_epoch(number, batches, state, self._captured_ns)
        except CheckpointError as error:
            self._link_lost(f"a checkpoint did not reach {self.standby}: {error}", error)
            return
        self.statistics.wire_bytes.add(sent.wire_bytes)
        self.statistics.total_bytes += sent.wire_bytes
        self._do(self.machine.acked_epoch(number))
        self.statistics.commit_ms.add((time.monotonic_ns() - self._captured_ns) / 1e6)

    # -- the end --

    async def _hand_over(self, number: int) -> None:
        assert self._sender
        log.debug("%s: handing over epoch %d", self.guest, number)
        try:
            await self._sender.handover(self.generation + 1)
        except Declined as error:
            self.why = f"{self.standby} could not run it: {error}"
            self._do(self.machine.stood_down())
        except CheckpointError as error:
            self._link_lost(f"the handover to {self.standby} was not answered: {error}")
        else:
            self.why = f"moved to {self.standby}, as asked"
            self._do(self.machine.standby_runs(self.generation + 1))

    async def _ask(self) -> None:
        """Ask the standby to stand down until something is certain or patience is over."""
        holding = self.machine.state is PrimaryState.HOLDING
        if not holding and await self._stop_over_link():
            self._do(self.machine.stood_down())
            return
        heartbeat = self._host.config.heartbeat
        started = self._loop.time()
        while not self.machine.over:
            answer = await self._peers.ask_to_stand_down(
                self.standby_id,
                (*self.addresses, *self._further),
                self.uuid,
                self.generation,
                heartbeat,
            )
            if answer.stood_down:
                self._do(self.machine.stood_down())
                return
            if answer.runs_since:
                self._do(self.machine.standby_runs(answer.runs_since))
                return
            waited = self._loop.time() - started
            if waited >= (RESTART_PATIENCE if answer.alive else heartbeat * PATIENCE):
                break
            await asyncio.sleep(heartbeat / 4)
        if not self.machine.over:
            release = self._host.config.on_standby_loss == "release"
            if not holding and not (release and not self.machine.handed):
                self.note(
                    "holding",
                    f"{self.standby} gives no answer; the output of {self.guest} stays held",
                )
            self._do(self.machine.no_answer(release=release))

    async def _stop_over_link(self) -> bool:
        """Ask over the replication link itself; True once the standby has stood down."""
        if self._link is None or self._sender is None or self._link.closed or self.lost:
            return False
        try:
            async with asyncio.timeout(self._host.config.heartbeat * PATIENCE):
                if self._send_task is not None:
                    await asyncio.wait({self._send_task})
                await self._sender.stop(self.why)
        except (CheckpointError, StateError, TimeoutError) as error:
            log.info("%s: no answer to stop over the link: %s", self.guest, error)
            return False
        return True

    async def _let_go(self) -> None:
        """Nobody else runs this guest: let its output pass and remove what protection has built."""
        source, output = self._source, self._output
        assert source and output
        await self._quiet()
        self._output = None
        reason = self.machine.let_go or LetGoReason.FORCE
        await self._attempt("record", self._record, role=Role.OWNER, reason=self.why)
        await self._attempt("unpause", source.unpause)
        await self._attempt("release", output.release_all)
        await self._attempt("remove the buffer", output.teardown, drop=False)
        await self._attempt("end tracking", source.untrack)
        ground = {
            LetGoReason.NOTHING_SENT: "the standby has nothing of it",
            LetGoReason.PROMISE: f"{self.standby} stood down",
            LetGoReason.POLICY: f"{self.standby} gives no answer and on_standby_loss is release",
            LetGoReason.FORCE: "an administrator forced it",
        }[reason]
        self.note(
            "unprotected",
            f"{self.guest} runs on UNPROTECTED ({self.why}; {ground})",
            ground=reason.name.lower(),
        )
        await self._dispose()

    async def _abandon(self, generation: int) -> None:
        """The standby runs the guest: nothing that this copy did since may ever be seen."""
        source, output = self._source, self._output
        assert source and output
        await self._quiet()
        self._output = None
        await self._attempt(
            "record",
            self._record,
            role=Role.MOVED,
            generation=generation,
            reason=f"{self.standby} runs it",
        )
        await self._attempt("pause", source.pause)
        await self._attempt("end tracking", source.untrack)
        await self._attempt("destroy", source.destroy)
        await self._attempt("remove the buffer", output.teardown, drop=True)
        self.note(
            "moved",
            f"{self.standby} runs {self.guest} since generation {generation}; "
            "the copy here was destroyed and its held output dropped",
            generation=generation,
        )
        await self._dispose()

    def _record(self, **changes: Any) -> None:
        self._host.ledger.update(self.uuid, **changes)

    async def _attempt(self, what: str, call: Callable[..., Any], **arguments: Any) -> None:
        """One step of an ending: when it fails, say so and go on with the others."""
        try:
            await asyncio.to_thread(functools.partial(call, **arguments))
        except Exception as error:
            log.debug("%s: %s", self.guest, what, exc_info=error)
            self.note("trouble", f"{self.guest}: could not {what}: {error}")

    async def _quiet(self) -> None:
        """Wait until no capture runs, and hear no more of the tap and the timer."""
        if self._output is not None:
            self._loop.remove_reader(self._output.fileno())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._capture_task is not None:
            await asyncio.wait({self._capture_task})

    async def _until_holding(self) -> None:
        while self.machine.state is not PrimaryState.HOLDING:
            await asyncio.sleep(0.05)

    async def _dispose(self) -> None:
        self._peers.unwant(self.standby_id, self._further)
        self._further = ()
        if self._sender is not None:
            await self._sender.close()
        elif self._link is not None:
            await self._link.close()
        self.ended.set()
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()

    def _spawn(self, work: Any, name: str) -> asyncio.Task[None]:
        task = self._host.spawn(work, f"{self.guest}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _first(*waits: Any) -> None:
    """Return when the first of these is done; cancel the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
