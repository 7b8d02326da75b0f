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
from checkpoint.xen.dirty import DirtyLog
from checkpoint.xen.mapping import MMIO_HOLE, PresentRam, map_ram
from checkpoint.xen.processors import Processors
from checkpoint.xen.rest import Rest
from checkpoint.xen.shortcut import implementation
from checkpoint.xen.standstill import given_memory
from checkpoint.xen.state import StateEncoder
from checkpoint.xen.store import Store

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
            self._ram = map_ram(domid, self._pages)
            held.callback(self._ram.close)
            self._memory = PresentRam(self._ram)
            self._holes = self._all_holes()
            # A growing grant table takes frames that the guest keeps free for it, and its rings
            # with xenstored and xenconsoled are among what is no RAM.
            used = {*self._layout.grants.gfns, *MMIO_HOLE}
            self._rest = Rest(self._ram.view, self._memory, self._layout)
            self._still = implementation()(
                domid, self._domain.context_size(), self._log, self._ram, self._special,
                (gfn for gfn in self._holes if gfn not in used), self._rest,
            )  # fmt: skip
            held.callback(self._still.close)
            callback = self._domain.get_param(HVM_PARAM_CALLBACK_IRQ)
            self._callback = {HVM_PARAM_CALLBACK_IRQ: callback}
            self._encoder = StateEncoder()
            self._first_round = True
            self._log.enable()
            self._refresh()
            self._held = held.pop_all()
        self._tracking = True

    def _all_holes(self) -> array[int]:
        """Frames without memory, here or in the shell, which was built for the guest as it was."""
        described = set(self.description.detail.get("holes", ()))
        filled = described.difference(self._ram.holes, self._layout.grants.gfns)
        if filled:
            raise given_memory(min(filled))
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
            self._rings = rings.device_rings(self._tree, self._still.look_at_grants())
            self._fifo_pages = -1
            self._stale = False
        count = self._fifo_count()
        if count != self._fifo_pages:
            lasting = self._lasting_frames() | {ring.gfn for ring in self._rings}
            if not lasting.isdisjoint(self._holes) or max(lasting) >= self._pages:
                raise UnsupportedGuest("the guest shares pages that it does not have")
            self._rest.prepare(count)
            self._still.prepare(sorted(lasting), self._rings, self._holes)
            self._fifo_pages = count
        self._still.get_ready()

    def _fifo_count(self) -> int:
        fifo = self._layout.fifo
        return 0 if fifo is None else int.from_bytes(self._memory.read(fifo.pages, 4), "little")

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
            self._still.check_absent()
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
        return not (self._stale or self._following.changed() or self._still.disks_busy())

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
        still = self._still
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
            still.stop(pause=not self._paused)
            self._paused = True
            reach("paused")
            still.judge()
            if self._following.changed():
                raise NotQuiescent("the guest's part of xenstore has just changed")
            still.await_backends()
            close_writes()
            settled = time.monotonic_ns()
            if waits:
                close_output()
                closing, closed = settled, time.monotonic_ns()
            still.copy_shared(staging)
            reach("rings-copied")
            still.read_log(keep)
            reach("log-read")
            still.copy_dirty(staging)
            reach("pages-copied")
            if self.audit is not None:
                self.audit(self._ram.view, staging, self._holes)
            pause_ns = time.monotonic_ns() - begun
            self._let_go(leave_paused)
            # The callback is set once, when the guest boots.
            staging.state = self._encoder.encode(still.state(self._callback, self._tree))
        except BaseException:
            self._keep_log()
            raise
        finally:
            still.over()
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
        self._still.let_go()
        self._paused = False
        self._still.check_mark()
        reach("unpaused")

    def _keep_log(self) -> None:
        """Let the guest run after an attempt that failed; nothing that the log said is lost."""
        try:
            self._still.keep_log(paused=self._paused)
        finally:
            self.unpause()

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
