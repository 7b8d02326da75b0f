# SPDX-License-Identifier: Apache-2.0
"""The running guest on a Xen primary: dirty tracking and the capture of checkpoints.

The order inside :meth:`XenSource.capture` is the whole point; it is that of ``docs/xen.md``: close
the output epoch, pause, let the backends answer, shared pages ("rings") before the dirty log, the
log before data, run on.  Backends write data first and the ring after, so this order can only give
a snapshot in which an answer is missing, never one in which data is.  vCPUs do not change while
they are paused, so that their state may be saved first.
"""

from __future__ import annotations

import gc
import os
import time
from array import array
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from checkpoint import native
from checkpoint.driver import PAGE_SIZE, Auditor, Captured, Description, Disk, Nic, Staging
from checkpoint.errors import NotQuiescent, UnsupportedGuest
from checkpoint.faultpoints import reach
from checkpoint.guest.events import event_pages
from checkpoint.guest.layout import LinuxLayout
from checkpoint.guest.memory import PhysicalMemory, RamView
from checkpoint.xen import rings, toolstack
from checkpoint.xen.control import HVM_PARAM_CALLBACK_IRQ, Domain
from checkpoint.xen.dirty import MARK_FRAME, DirtyLog
from checkpoint.xen.mapping import MMIO_HOLE, GrantFrames, Mapping, PresentRam, map_ram
from checkpoint.xen.moment import Moment, Resumption
from checkpoint.xen.processors import Processors
from checkpoint.xen.rest import Rest
from checkpoint.xen.rings import Kind
from checkpoint.xen.state import EventChannel, MachineState, StateEncoder
from checkpoint.xen.store import Store

#: how long a paused guest waits for its backends to answer what they consumed, seconds: a network's
#: backend only hands frames on, a disk has to be waited for
_QUIET_BOUND = {Kind.TRANSMIT: 0.020, Kind.RECEIVE: 0.020, Kind.DISK: 1.0}
#: frames per batch of a live copy: 4 MiB
_BATCH = 1024


class XenSource:
    """Implements :class:`checkpoint.driver.Source` on Xen; made by ``Hypervisor.open_source``."""

    def __init__(
        self,
        domain: Domain,
        description: Description,
        nics: list[Nic],
        disks: list[Disk],
        layout: LinuxLayout,
        special: list[int],
    ) -> None:
        """:param special: guest frames outside RAM that backends share (xenstore, console)"""
        self.description = description
        self.nics = nics
        self.disks = disks
        self.audit: Auditor | None = None
        self._domain = domain
        self._layout = layout
        self._special = special
        self._pages = description.pages
        self._paused = False
        self._tracking = False
        self._condemned = False
        self._destroyed = False
        self._memory: PhysicalMemory = RamView(b"")
        self._processors = Processors()

    # ---- Section: tracking ----

    @property
    def tracking(self) -> bool:
        """Whether this object has the guest's dirty log, of which Xen keeps only one."""
        return self._tracking

    def track(self) -> None:
        domid = self._domain.domid
        with ExitStack() as held:
            self._store = Store()
            held.callback(self._store.close)
            self._following = self._store.follow(f"/local/domain/{domid}")
            self._stale = True
            self._log = DirtyLog(domid, self._pages)
            held.callback(self._log.close)
            self._moment = Moment(domid, self._domain.context_size())
            held.callback(self._moment.close)
            self._resumption = Resumption(domid, MARK_FRAME)
            held.callback(self._resumption.close)
            self._ram = map_ram(domid, self._pages)
            held.callback(self._ram.close)
            self._outside = Mapping(domid, self._special)
            held.callback(self._outside.close)
            # With the context as well: where Xen refuses it, protection shall not begin.
            self._moment.take(pause=False)
            self._moment.context()
            _events, frames = self._moment.tables()
            self._grants = GrantFrames(domid, frames)
            self._granted = array("Q", bytes(len(self._grants.view)))
            held.callback(lambda: self._grants.close())
            self._outside_pages = {
                gfn: self._outside.page(index) for index, gfn in enumerate(self._special)
            }
            self._memory = PresentRam(self._ram)
            self._holes = self._all_holes()
            # A growing grant table takes frames that the guest keeps free for it, and its rings
            # with xenstored and xenconsoled are among what is no RAM.
            used = {*self._layout.grants.gfns, *MMIO_HOLE}
            self._no_memory = array("Q", (gfn for gfn in self._holes if gfn not in used))
            self._rest = Rest(self._ram.view, self._memory, self._layout)
            self._carried: bytes | None = None
            self._log_was_read = False
            callback = self._domain.get_param(HVM_PARAM_CALLBACK_IRQ)
            self._callback = {HVM_PARAM_CALLBACK_IRQ: callback}
            self._encoder = StateEncoder()
            self._first_round = True
            self._most_pages = self._moment.pages
            self._log.enable()
            self._refresh()
            self._held = held.pop_all()
        self._tracking = True

    def _all_holes(self) -> array[int]:
        """Frames without memory, here or in the shell, which was built for the guest as it was."""
        described = set(self.description.detail.get("holes", ()))
        filled = described.difference(self._ram.holes, self._layout.grants.gfns)
        if filled:
            raise _given_memory(min(filled))
        return array("Q", sorted(described.union(self._ram.holes)))

    def untrack(self) -> None:
        try:
            if self._tracking:
                self._release()
        finally:
            self.unpause()

    def _release(self) -> None:
        self._tracking = False
        self._memory = RamView(b"")
        self._held.close()

    def _refresh(self) -> None:
        """Read again what the guest negotiated with its backends, if it changed."""
        if self._following.changed() or self._stale:
            self._stale = True
            self._tree = self._following.tree()
            _events, frames = self._moment.read_tables()
            self._map_grants(frames)
            self._rings = rings.device_rings(self._tree, self._grants.view)
            self._fifo_pages = -1
            self._stale = False
        count = self._fifo_count()
        if count != self._fifo_pages:
            lasting = self._lasting_frames() | {ring.gfn for ring in self._rings}
            if not lasting.isdisjoint(self._holes):
                raise UnsupportedGuest("the guest shares pages that it does not have")
            self._share(sorted(lasting))
            self._rest.prepare(count)
            self._fifo_pages = count

    def _share(self, frames: list[int]) -> None:
        """Prepare the copying of ``frames``, ascending, which the dirty log knows nothing of."""
        self._shared = array("Q", frames)
        self._left_out = array("Q", sorted({*frames, *self._holes}))
        self._awaited = [
            (ring.kind, self._page(ring.gfn))
            for ring in self._rings
            if ring.kind is not Kind.RECEIVE
        ]
        self._receiving = [
            (frames.index(ring.gfn), self._page(ring.gfn))
            for ring in self._rings
            if ring.kind is Kind.RECEIVE
        ]

    def _fifo_count(self) -> int:
        fifo = self._layout.fifo
        return 0 if fifo is None else int.from_bytes(self._memory.read(fifo.pages, 4), "little")

    def _map_grants(self, frames: int) -> None:
        if frames != self._grants.frames:
            grown = GrantFrames(self._domain.domid, frames)
            self._grants.close()
            self._grants = grown
            self._granted = array("Q", bytes(len(grown.view)))

    def _check_size(self) -> None:
        """:raise UnsupportedGuest: the guest was given pages after they were mapped here"""
        # What it gave away before stays counted, since the mapping here holds it: a guest that
        # takes memory back under the same frame numbers can only have more than at the start.
        pages = self._moment.pages
        if pages > self._most_pages:
            raise UnsupportedGuest(
                f"the guest's memory has grown from {self._most_pages} to {pages} pages "
                "(expected it to stay as it is while protected)"
            )

    def _lasting_frames(self) -> set[int]:
        # Pages that Xen writes through a lasting mapping: the dirty log never sees those writes.
        addresses = [self._layout.shared_info]
        for cpu in self._layout.cpus:
            addresses += [cpu.vcpu_info, cpu.runstate]
            if cpu.control_block is not None:
                addresses.append(cpu.control_block)
        if self._layout.clock.vsyscall_time is not None:
            addresses.append(self._layout.clock.vsyscall_time)
        addresses += event_pages(self._memory, self._layout)
        return {address // PAGE_SIZE for address in addresses}

    # ---- Section: the first copy ----

    def base_round(self) -> Iterable[array[int]]:
        if self._first_round:
            self._first_round = False
            rounds: Iterable[array[int]] = (
                array("Q", range(first, min(first + _BATCH, self._pages)))
                for first in range(0, self._pages, _BATCH)
            )
        else:
            self._log.read_and_clean()
            self._check_holes()
            rounds = self._log.frames()
        for frames in rounds:
            count = native.subtract(frames, len(frames), self._holes)
            for start in range(0, count, _BATCH):
                yield frames[start : min(start + _BATCH, count)]

    def copy_live(self, gfns: array[int], staging: Staging) -> None:
        staging.clear()
        staging.gfns[: len(gfns)] = gfns
        native.gather(self._ram.view, staging.gfns, len(gfns), staging.data)
        staging.count = len(gfns)

    # ---- Section: capture ----

    def stolen(self) -> float:
        return self._processors.stolen()

    def prepared(self) -> bool:
        return not (self._stale or self._following.changed() or self._disks_busy())

    def _disks_busy(self) -> bool:
        return not all(rings.answered(page) for kind, page in self._awaited if kind is Kind.DISK)

    def capture(
        self,
        staging: Staging,
        close_output: Callable[[], None],
        close_writes: Callable[[], None],
        *,
        leave_paused: bool = False,
        keep: int = 0,
    ) -> Captured:
        self._refresh()
        staging.clear()
        waits = leave_paused or self._paused
        closing = time.monotonic_ns()
        if not waits:
            # What the guest sends from here to the pause is in the next epoch: late, never early.
            close_output()
        begun = closed = time.monotonic_ns()
        reach("pause")
        collecting = gc.isenabled()
        gc.disable()  # a collection of garbage may take longer than all that follows
        try:
            self._moment.take(pause=not self._paused)
            self._paused = True
            reach("paused")
            context = self._moment.context()
            outside = {gfn: bytes(page) for gfn, page in self._outside_pages.items()}
            self._rest.check(context, outside[self._special[0]])
            if self._following.changed():
                raise NotQuiescent("the guest's part of xenstore has just changed")
            self._await_backends()
            close_writes()
            settled = time.monotonic_ns()
            if waits:
                close_output()
                closing, closed = settled, time.monotonic_ns()
            events, grants = self._copy_shared(staging)
            reach("rings-copied")
            self._copy_dirty(staging, keep)
            reach("pages-copied")
            if self.audit is not None:
                self.audit(self._ram.view, staging, self._holes)
            pause_ns = time.monotonic_ns() - begun
            self._let_go(leave_paused)
            staging.state = self._encoder.encode(
                MachineState(
                    context=context,
                    events=events,
                    grants=[grants],
                    pages=outside,
                    params=self._callback,  # set once, when the guest boots
                    store=self._tree,
                )
            )
        except BaseException:
            self._keep_log()
            raise
        finally:
            self._log_was_read = False
            if collecting:
                gc.enable()
        close_ns = closed - closing
        copy_ns = pause_ns - (settled - begun) - (close_ns if waits else 0)
        return Captured(staging.count, begun, pause_ns, settled - begun, close_ns, copy_ns)

    def _let_go(self, leave_paused: bool) -> None:
        """Put the mark into the log, and then let the guest run, if it shall."""
        if leave_paused:
            self._log.mark()
            return
        self._resumption.make()
        self._paused = False
        self._resumption.check()
        reach("unpaused")

    def _keep_log(self) -> None:
        """Let the guest run after an attempt that failed; nothing that the log said is lost."""
        try:
            if self._log_was_read:
                self._carried = bytes(self._log.bitmap)  # the log itself may be clean now
                if self._paused:
                    self._log.mark()
        finally:
            self.unpause()

    def _await_backends(self) -> None:
        """Wait until no backend owes the paused guest an answer.

        :raise NotQuiescent: the bound passed
        """
        began = 0.0
        for kind, page in self._awaited:
            while not rings.answered(page):
                now = time.monotonic()
                began = began or now
                if now - began > _QUIET_BOUND[kind]:
                    raise NotQuiescent(
                        f"a {kind.name.lower()} backend has not answered within its bound"
                    )
                os.sched_yield()

    def _page(self, gfn: int) -> memoryview:
        return self._ram.view[gfn * PAGE_SIZE : (gfn + 1) * PAGE_SIZE]

    def _copy_shared(self, staging: Staging) -> tuple[list[EventChannel], bytes]:
        """Copy, before the dirty log is read, rings and what Xen itself writes.

        :return: event channels, grant table
        """
        events, frames = self._moment.tables()
        self._check_size()
        self._map_grants(frames)
        grants = bytes(self._grants.view)
        # Data, as opposed to rings: copied after the log is read, since a backend may be at it now.
        self._under_grants = native.active_writable(grants, self._granted)
        shared = self._shared
        self._need(staging, len(shared))
        staging.gfns[: len(shared)] = shared
        native.gather(self._ram.view, shared, len(shared), staging.data)
        staging.count = len(shared)
        self._check_receive_rings(staging, frames * rings.GRANTS_PER_FRAME)
        return events, grants

    def _check_receive_rings(self, staging: Staging, grants: int) -> None:
        deadline = 0.0
        for place, page in self._receiving:
            copy = staging.data[place * PAGE_SIZE : (place + 1) * PAGE_SIZE]
            while not rings.receive_unambiguous(copy, grants):
                now = time.monotonic()
                if not deadline:
                    deadline = now + _QUIET_BOUND[Kind.RECEIVE]
                elif now > deadline:
                    raise NotQuiescent("a network backend keeps a batch of answers open")
                os.sched_yield()
                copy[:] = page

    def _copy_dirty(self, staging: Staging, keep: int) -> None:
        self._log.read(keep)
        self._log_was_read = True
        reach("log-read")
        if self._carried is not None:
            self._merge_carried()
        self._check_holes()
        staging.count = native.stage(
            self._ram.view, self._log.bitmap, self._pages, self._granted, self._under_grants,
            self._left_out, staging.gfns, staging.count, staging.data,
        )  # fmt: skip

    def _check_holes(self) -> None:
        """:raise UnsupportedGuest: the log has a frame that the guest did not have when mapped"""
        filled = native.first_set(self._log.bitmap, self._no_memory)
        if filled >= 0:
            raise _given_memory(filled)

    def _merge_carried(self) -> None:
        assert self._carried is not None
        merged = int.from_bytes(self._log.bitmap, "little") | int.from_bytes(
            self._carried, "little"
        )
        self._log.bitmap[:] = merged.to_bytes(len(self._log.bitmap), "little")
        self._carried = None

    @staticmethod
    def _need(staging: Staging, pages: int) -> None:
        if pages > staging.capacity:
            raise OverflowError(f"{pages} pages to copy (staging holds {staging.capacity})")

    # ---- Section: life cycle ----

    def pause(self) -> None:
        if not self._paused:
            self._domain.pause()
            self._paused = True

    def unpause(self) -> None:
        if self._condemned:
            return  # another host runs the guest, even where this copy could not be destroyed yet
        if not self._paused:
            # A daemon that was killed inside a capture has left the guest paused.
            info = self._domain.info()
            self._paused = info is not None and info.paused
        if self._paused:
            self._domain.unpause()
            self._paused = False

    def alive(self) -> bool:
        info = self._domain.info()
        return info is not None and not info.dying and (info.suspended or not info.shutdown)

    def destroy(self) -> None:
        self._condemned = True  # from here on it stays paused
        try:
            if self._tracking:
                self._release()
        finally:
            if not self._destroyed:
                toolstack.destroy(self._domain.domid)
                self._destroyed = True


def _given_memory(gfn: int) -> UnsupportedGuest:
    return UnsupportedGuest(
        f"the guest was given memory at frame {gfn:#x} "
        "(expected its memory to stay as it is while protected)"
    )
