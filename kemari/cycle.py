# SPDX-License-Identifier: Apache-2.0
"""The checkpoint cycle of one guest: capture, send, release, and the guest's output buffer.

The hot path.  A held frame makes the tap readable; the capture runs at once, in that callback, in
the loop's thread, unless it is a big one; so do coding and sending.  The ACK is judged in the
callback that receives it, and lets the output go there.  No task is woken for a small epoch: in a
slow Dom0 that costs more than all the rest.  Nothing here decides: events go to
:class:`kemari.epoch.Primary`, whose actions come back through :class:`Keeper`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final, Protocol

from checkpoint.audit import audit
from checkpoint.codec import Coded, Encoder
from checkpoint.driver import Captured, Source, Staging
from checkpoint.errors import CheckpointError, NotQuiescent
from checkpoint.faultpoints import reach
from checkpoint.sender import Sender, Sent
from diskbuffer.held import boot_ns
from kemari.actions import Actions
from kemari.coding import Coding
from kemari.deadline import Deadline
from kemari.disks import Pending, SourceDisks
from kemari.epoch import Primary, PrimaryState
from kemari.output import Output
from kemari.pace import Pace
from kemari.statistics import Statistics
from kemari.throttle import Throttle

log = logging.getLogger(__name__)

#: Captures of at most this many pages, prepared ones, run in the loop's thread: handing one to
#: another thread costs more than it takes.
INLINE_PAGES: Final = 1024
#: Pages that the staging buffer holds at first (8 MiB); it grows when a capture needs more.
STAGING_PAGES: Final = 2048
GROWTH: Final = 4
#: Frames that may stay in the dirty log although some of their pages did not change, so that the
#: guest can write them without a fault: so many for each page that changed in the last epoch, and
#: so many more, 1 MiB, but no more than a share of a small guest.  A page too much costs a copy of
#: it in the pause and a comparison after it; a fault costs the guest several times that.
KEPT_FOR_CHANGED: Final = 2
KEPT_PAGES: Final = 256
KEPT_SHARE: Final = 32
#: Seconds after an unusable pause point, doubled each time up to the limit.
RETRY: Final = 0.001
RETRY_LIMIT: Final = 0.1
#: Seconds without a usable pause point, or without an ack from a standby that still beats, after
#: which protection is given up: the guest's output must not be held for ever.
CAPTURE_LIMIT: Final = 10.0
ACK_LIMIT: Final = 20.0
#: Nanoseconds between two looks whether the guest has shut down: its domain may stay, by
#: ``on_crash = "preserve"`` or the like, and can be captured on and on.
ALIVE_PAUSE: Final = 1_000_000_000
#: Seconds between two looks at how much output is held while no epoch can begin: what may come
#: meanwhile must fit between high water and limit (``docs/netbuffer.md``).
LOOK_PAUSE: Final = 0.100


class Keeper(Protocol):
    """What the cycle needs of the protection that it belongs to."""

    guest: str
    machine: Primary
    statistics: Statistics

    def do(self, actions: Actions) -> None:
        """Carry out what the machine decided."""

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a task that ends with the protection."""

    def link_lost(self, why: str, error: CheckpointError | None = None) -> None:
        """The standby cannot be relied on any more."""

    async def confirmed(self) -> bool:
        """Whether the standby has surely not taken over by now: it is asked."""

    def guest_gone(self) -> None:
        """There is no guest to protect any more."""


class Cycle:
    """See the module's text.

    :param interval: seconds between two checkpoints at most
    :param pace: one of :data:`kemari.pace.PACES`
    """

    def __init__(
        self,
        keeper: Keeper,
        source: Source,
        output: Output,
        encoder: Encoder,
        sender: Sender,
        interval: float,
        disks: SourceDisks,
        pace: str,
    ) -> None:
        self._keeper = keeper
        self._source = source
        source.audit = audit(keeper.guest, encoder)
        self._output = output
        self._encoder = encoder
        self._sender = sender
        self._interval = interval
        self._disks = disks
        disks.full = self._on_interval
        disks.overfull = self._on_overfull
        self._loop = asyncio.get_running_loop()
        self._staging = Staging(min(STAGING_PAGES, source.description.pages))
        self._pages_before = source.description.pages
        self._changed = 0  # pages of the last epoch that the standby did not have so
        self._kept_pages = min(KEPT_PAGES, source.description.pages // KEPT_SHARE)
        self._begun_ns = self._captured_ns = self._release_ns = 0
        #: When the first frame was seen that no capture has begun for, 0 without one; and how long
        #: the first one of the last epoch had waited for its capture.
        self._held_since_ns = self._wait_ns = 0
        #: Boot times: of the capture, and when the standby surely had not taken over.
        self._captured_boot_ns = self._trusted_ns = 0
        self._stages: tuple[int, ...] = ()
        self._stalled_at = 0.0
        self._looked_at = 0.0
        self._alive_ns = 0
        self._retry_delay = RETRY
        self._interval_timer = Deadline(self._on_interval)
        self._ack_timer = Deadline(self._on_ack_limit)
        self._late_timer = Deadline(self._on_late)
        self._throttle = Throttle(sender.link.peer.heartbeat)
        self._sent_at = 0.0
        self._restless_since = 0.0
        self._listening = False
        self._closed = self._left = False
        self._capturing: asyncio.Task[None] | None = None
        self._sending: asyncio.Task[None] | None = None
        self._pace = Pace(pace)
        self._put_off: asyncio.TimerHandle | None = None
        self._drained = False
        self._at_rest = asyncio.Event()
        self._at_rest.set()

    def listen(self) -> None:
        """Begin to hear of held frames; the output buffer is set up."""
        self._listening = True
        self._loop.add_reader(self._output.fileno(), self._on_frame)

    async def quiet(self) -> None:
        """Hear no more of frames and timers, and wait until no capture runs."""
        if self._listening:
            self._listening = False
            self._loop.remove_reader(self._output.fileno())
        self._interval_timer.close()
        self._ack_timer.close()
        self._late_timer.close()
        if self._put_off is not None:
            self._put_off.cancel()
        if self._capturing is not None:
            await asyncio.wait({self._capturing})

    async def close(self) -> None:
        """Give the memory for epochs back.

        :meth:`quiet` was awaited, and the tasks that the cycle has spawned were cancelled.
        """
        if self._sending is not None:
            await asyncio.wait({self._sending})
        self._staging.close()

    async def at_rest(self) -> None:
        """Wait until no epoch is on its way to the standby; for ever once the connection ended."""
        await self._at_rest.wait()

    # ---- Events ----

    def _on_frame(self) -> None:
        machine = self._keeper.machine
        try:
            awaited = machine.capturing or machine.captured > machine.acked
            aside = awaited or machine.state is not PrimaryState.PROTECTED
            if aside and self._output.drain() == 0:
                return
            self._held_since_ns = self._held_since_ns or time.monotonic_ns()
            if aside:
                full = not machine.stalled and self._look()
                self._keeper.do(machine.buffer_full() if full else machine.output_held())
                return
            self._keeper.statistics.by_output += 1
            self._drained = False
            self._keeper.do(machine.output_held())
            # Closing the epoch drains: here only if that is still to come.
            if not self._drained:
                self._output.drain()
        except Exception as error:  # noqa: BLE001 - of netbuffer or the kernel: the guest must not stay mute
            self._output_broke(error)

    def _look(self) -> bool:
        """Whether so much is held that the guest must wait; asks the kernel now and then."""
        now = self._loop.time()
        if now - self._looked_at < LOOK_PAUSE:
            return False
        self._looked_at = now
        return self._output.full()

    def _on_ack_limit(self) -> None:
        self._keeper.link_lost(f"no acknowledgement within {ACK_LIMIT:g} s")

    def _on_late(self) -> None:
        actions = self._keeper.machine.epoch_late()
        self._keeper.statistics.late += bool(actions)
        self._keeper.do(actions)

    def _on_interval(self) -> None:
        self._keeper.statistics.by_interval += 1
        self._keeper.do(self._keeper.machine.interval_elapsed())

    def _on_overfull(self) -> None:
        self._keeper.do(self._keeper.machine.buffer_full())

    def _on_retry(self) -> None:
        self._keeper.do(self._keeper.machine.retry())

    def _output_broke(self, error: Exception) -> None:
        log.debug("%s: output buffer failed", self._keeper.guest, exc_info=error)
        if self._listening:
            self._listening = False
            self._loop.remove_reader(self._output.fileno())
        # The device goes before the domain does: this may be the guest's own end.
        self._keeper.spawn(self._capture_broke(error), "output failed")

    # ---- Actions ----

    def arm(self) -> None:
        """Start the interval anew."""
        self._interval_timer.set(self._interval)

    def arm_retry(self) -> None:
        """Come back after a short while, a longer one each time."""
        self._loop.call_later(self._retry_delay, self._on_retry)
        self._retry_delay = min(self._retry_delay * 2, RETRY_LIMIT)

    def pause(self) -> None:
        """Stall the guest: its output buffer is full, or it waits for an ack."""
        self._keeper.statistics.stalls += 1
        self._stalled_at = time.monotonic()
        if self._capturing is None:
            self._source.pause()

    def unpause(self) -> None:
        """End the stall."""
        if self._stalled_at:
            self._keeper.statistics.stalled_ms += (time.monotonic() - self._stalled_at) * 1000
            self._stalled_at = 0.0
        if not self._keeper.machine.over:
            self._source.unpause()

    def release(self) -> None:
        """Let the output of the acknowledged epoch leave."""
        left, self._closed, self._left = self._left, False, False
        reach("release")
        began = time.monotonic_ns()
        try:
            self._output.release_epoch()
            if left and self._keeper.machine.handed:
                # No epoch comes after the final one.  All of it was sent before the guest was
                # paused for good, so the standby's copy has sent it.
                self._output.close_epoch()
                self._output.release_epoch()
        except Exception as error:  # noqa: BLE001 - as in _on_frame
            self._output_broke(error)
        self._disks.acknowledged(self._trusted_ns + int(self._sender.link.peer.heartbeat * 1e9))
        self._release_ns = time.monotonic_ns() - began
        reach("released")

    def capture(self, number: int, keep_paused: bool) -> None:
        """Take a checkpoint, here or in a thread, now or when it is time."""
        self._interval_timer.clear()
        wait = 0.0 if keep_paused else self._pace.wait(self._loop.time())
        if wait > 0:
            self._put_off = self._loop.call_later(wait, self._capture, number, keep_paused)
        else:
            self._capture(number, keep_paused)

    def _capture(self, number: int, keep_paused: bool) -> None:
        self._put_off = None
        if self._pages_before <= INLINE_PAGES and self._source.prepared():
            self._captured(number, self._capture_now(keep_paused))
        else:
            self._capturing = self._keeper.spawn(
                self._capture_aside(number, keep_paused), "capture"
            )

    async def _capture_aside(self, number: int, keep_paused: bool) -> None:
        outcome = await asyncio.to_thread(self._capture_now, keep_paused)
        self._capturing = None
        self._captured(number, outcome)

    def _capture_now(self, keep_paused: bool) -> Captured | Exception:
        self._begun_ns, self._captured_boot_ns = time.monotonic_ns(), boot_ns()
        reach("capture")
        try:
            self._require_guest()
            # Disks at each attempt: what was answered since the last one is in the epoch as well.
            return self._source.capture(
                self._staging,
                self._close_output,
                self._disks.close_epoch,
                leave_paused=keep_paused,
                keep=KEPT_FOR_CHANGED * self._changed + self._kept_pages,
            )
        except Exception as error:  # noqa: BLE001 - judged by the caller, in the loop's thread
            return error

    def _require_guest(self) -> None:
        """:raise CheckpointError: it has shut down or crashed: its copy must not run anywhere"""
        if self._begun_ns - self._alive_ns >= ALIVE_PAUSE:
            self._alive_ns = self._begun_ns
            if not self._source.alive():
                raise CheckpointError("the guest has shut down; expected it to run")

    def _close_output(self) -> None:
        if self._closed:
            # By an attempt that failed after it.  What was sent since waits for the epoch after
            # this one, and its frames go on asking for that one.
            self._left = True
            return
        # Frames that were seen until now belong to the epoch that is closed: no new trigger.
        since, self._held_since_ns = self._held_since_ns, 0
        self._wait_ns = max(0, self._begun_ns - since) if since else 0
        reach("output-close")
        self._output.drain()
        self._drained = True
        self._output.close_epoch()
        reach("output-closed")
        self._closed = True

    def _captured(self, number: int, outcome: Captured | Exception) -> None:
        keeper = self._keeper
        match outcome:
            case Captured():
                reach("captured")
                self._retry_delay = RETRY
                self._restless_since = 0.0
                self._pages_before = outcome.pages
                keeper.statistics.checkpoints += 1
                keeper.statistics.pages.add(outcome.pages)
                keeper.statistics.pause_ms.add(outcome.pause_ns / 1e6)
                measured = (outcome.settle_ns, outcome.close_ns, outcome.copy_ns)
                self._captured_ns = outcome.at_ns
                whole = time.monotonic_ns() - self._begun_ns
                self._stages = (self._wait_ns, whole - sum(measured), *measured)
                keeper.do(keeper.machine.captured_epoch(number))
            case NotQuiescent():
                keeper.statistics.not_quiescent += 1
                self._be_patient()
                keeper.do(keeper.machine.capture_failed())
            case OverflowError() if self._staging.capacity < self._source.description.pages:
                keeper.do(keeper.machine.capture_failed())
                self._enlarge_staging()
            case _:
                keeper.do(keeper.machine.capture_failed())
                keeper.spawn(self._capture_broke(outcome), "capture failed")

    def _be_patient(self) -> None:
        now = time.monotonic()
        self._restless_since = self._restless_since or now
        if now - self._restless_since > CAPTURE_LIMIT:
            self._restless_since = 0.0
            self._keeper.link_lost(f"no usable pause point within {CAPTURE_LIMIT:g} s")

    def _enlarge_staging(self) -> None:
        pages = self._source.description.pages
        capacity = min(pages, self._staging.capacity * GROWTH)
        try:
            self._staging = Staging(capacity)
        except OSError as error:
            # More than all of Dom0's memory: the kernel refuses (Documentation/mm/overcommit).
            short = CheckpointError(f"no memory for {capacity} pages: {error.strerror}")
            self._keeper.spawn(self._capture_broke(short), "no staging buffer")
            return
        self._keeper.statistics.staging_grown += 1
        # The next capture is a big one: in a thread.
        self._pages_before = self._staging.capacity

    async def _capture_broke(self, error: Exception) -> None:
        log.debug("%s: capture failed", self._keeper.guest, exc_info=error)
        try:
            alive = await asyncio.to_thread(self._source.alive)
        except Exception as unknown:
            log.debug("%s: nor can it be looked at", self._keeper.guest, exc_info=unknown)
            alive = True  # output must not stay held: the end that asks the standby
        if alive:
            self._keeper.link_lost(f"a checkpoint failed: {error}")
        else:
            self._keeper.guest_gone()

    def send(self, number: int) -> None:
        """Send the captured epoch; its ack is the next event."""
        self._keeper.do(self._keeper.machine.sent_epoch(number))
        self._ack_timer.set(ACK_LIMIT)
        self._sent_at = self._loop.time()
        self._late_timer.set(self._throttle.patience)
        self._at_rest.clear()
        pending = self._disks.pending()
        try:
            # Before what was put into the room of it.
            for disk, position in self._disks.issued():
                self._sender.put_issued(disk, position)
        except CheckpointError as error:
            self._send_failed(error)
            return
        if pending or self._staging.count > INLINE_PAGES:
            self._sending = self._keeper.spawn(self._send_aside(number, pending), "send")
            return
        began = time.monotonic_ns()
        try:
            batches = self._encode()
            state = self._encoder.encode_state(self._staging.state)
            encode_ns = time.monotonic_ns() - began
            self._sender.start_epoch(
                number, batches, state, self._captured_ns,
                lambda sent: self._acked(number, encode_ns, sent),
            )  # fmt: skip
        except CheckpointError as error:
            self._send_failed(error)

    async def _send_aside(self, number: int, pending: Pending) -> None:
        began, encoder, at = time.monotonic_ns(), self._encoder, self._captured_ns
        try:
            state = encoder.encode_state(self._staging.state)
            async with aclosing(self._disks.read(pending)) as writes:
                if self._staging.count <= INLINE_PAGES:
                    coded = self._encode()
                    encode_ns = time.monotonic_ns() - began
                    sent = await self._sender.send_epoch(number, coded, state, at, writes)
                else:
                    async with Coding(encoder, self._staging) as coding:
                        sent = await self._sender.send_epoch(number, coding, state, at, writes)
                    self._changed, encode_ns = coding.pages, coding.ns
                    # Both went on at once; what sending took is what it took longer.
                    sent = replace(sent, send_ns=max(0, sent.send_ns - encode_ns))
        except CheckpointError as error:
            self._send_failed(error)
        else:
            self._acked(number, encode_ns, sent)

    def _encode(self) -> list[Coded]:
        batches = list(self._encoder.encode(self._staging))
        self._changed = sum(batch.pages for batch in batches)
        return batches

    def _send_failed(self, error: CheckpointError) -> None:
        self._ack_timer.clear()
        self._late_timer.clear()
        self._at_rest.set()
        self._keeper.link_lost(f"a checkpoint did not get through: {error}", error)

    def _acked(self, number: int, encode_ns: int, sent: Sent) -> None:
        """The standby holds epoch ``number``: its output leaves first of all."""
        commit_ms = (time.monotonic_ns() - self._begun_ns) / 1e6
        self._ack_timer.clear()
        self._late_timer.clear()
        self._throttle.acked(self._loop.time() - self._sent_at, sent.wire_bytes)
        self._at_rest.set()
        if commit_ms < self._sender.link.peer.heartbeat * 1000:
            self._trusted_ns = self._captured_boot_ns
            self._let_out(number, commit_ms, encode_ns, sent)
        else:
            # Until a heartbeat time after the capture the standby cannot have taken us for dead.
            # Later it can, after it sent this ack: one of us stood still, or the network did.
            self._keeper.spawn(self._confirm(number, commit_ms, encode_ns, sent), "confirm")

    async def _confirm(self, number: int, commit_ms: float, encode_ns: int, sent: Sent) -> None:
        asked_ns = boot_ns()
        if await self._keeper.confirmed():
            self._trusted_ns = asked_ns
            self._let_out(number, commit_ms, encode_ns, sent)
        else:
            self._keeper.link_lost("an acknowledgement came too late to be trusted")

    def _let_out(self, number: int, commit_ms: float, encode_ns: int, sent: Sent) -> None:
        keeper, stages = self._keeper, self._stages
        self._pace.ended(self._loop.time(), commit_ms / 1000, self._source.stolen())
        # This may capture and send the next epoch already.
        keeper.do(keeper.machine.acked_epoch(number))
        statistics = keeper.statistics
        statistics.commit_ms.add(commit_ms)
        statistics.wire_bytes.add(sent.wire_bytes)
        statistics.total_bytes += sent.wire_bytes
        statistics.stages.add(*stages, encode_ns, sent.send_ns, sent.ack_ns, self._release_ns)
