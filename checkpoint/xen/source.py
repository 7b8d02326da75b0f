# SPDX-License-Identifier: Apache-2.0
"""The running guest on a Xen primary: dirty tracking and the capture of checkpoints.

The order inside :meth:`XenSource.capture` is the whole point; it is that of ``docs/xen.md``:
pause, let the backends answer, close the output epoch, shared pages ("rings") before the dirty log,
the log before data, run on.  Backends write data first and the ring after, so this order can only
give a snapshot in which an answer is missing, never one in which data is.  vCPUs do not change
while they are paused, so that their state may be saved first.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from checkpoint import native
from checkpoint.driver import PAGE_SIZE, Captured, Description, Disk, Nic, Staging
from checkpoint.errors import NotQuiescent, UnsupportedGuest
from checkpoint.faultpoints import reach
from checkpoint.guest.clock import reads_clock, timekeeping_at_rest
from checkpoint.guest.events import event_pages
from checkpoint.guest.layout import LinuxLayout
from checkpoint.guest.memory import PhysicalMemory, RamView
from checkpoint.guest.xenstore import xenstore_at_rest
from checkpoint.xen import rings, toolstack
from checkpoint.xen.context import Context
from checkpoint.xen.control import HVM_PARAM_CALLBACK_IRQ, Domain
from checkpoint.xen.dirty import DirtyLog
from checkpoint.xen.mapping import GrantFrames, Mapping, PresentRam
from checkpoint.xen.processors import Processors
from checkpoint.xen.rings import Kind
from checkpoint.xen.state import MachineState, StateEncoder
from checkpoint.xen.store import Store
from checkpoint.xen.tables import Tables

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
            self._tables = Tables(domid)
            held.callback(self._tables.close)
            self._ram = Mapping(domid, range(self._pages), allow_holes=True)
            held.callback(self._ram.close)
            self._outside = Mapping(domid, self._special)
            held.callback(self._outside.close)
            _events, frames = self._tables.read()
            self._grants = GrantFrames(domid, frames)
            held.callback(lambda: self._grants.close())
            self._memory = PresentRam(self._ram)
            self._holes = self._all_holes()
            self._found = array("Q", bytes(8 * self._pages))
            self._carried: bytes | None = None
            self._log_was_read = False
            self._context_size = 0
            callback = self._domain.get_param(HVM_PARAM_CALLBACK_IRQ)
            self._callback = {HVM_PARAM_CALLBACK_IRQ: callback}
            self._encoder = StateEncoder()
            self._first_round = True
            self._most_pages = self._tables.pages
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
            _events, frames = self._tables.read()
            self._map_grants(frames)
            self._rings = rings.device_rings(self._tree, self._grants.view)
            self._fifo_pages = -1
            self._stale = False
        count = self._fifo_count()
        if count != self._fifo_pages:
            lasting = self._lasting_frames() | {ring.gfn for ring in self._rings}
            if not lasting.isdisjoint(self._holes):
                raise UnsupportedGuest("the guest shares pages that it does not have")
            self._shared = sorted(lasting)
            self._fifo_pages = count

    def _fifo_count(self) -> int:
        fifo = self._layout.fifo
        return 0 if fifo is None else int.from_bytes(self._memory.read(fifo.pages, 4), "little")

    def _map_grants(self, frames: int) -> None:
        if frames != self._grants.frames:
            grown = GrantFrames(self._domain.domid, frames)
            self._grants.close()
            self._grants = grown

    def _check_size(self) -> None:
        """:raise UnsupportedGuest: the guest was given pages after they were mapped here"""
        # What it gave away before stays counted, since the mapping here holds it: a guest that
        # takes memory back under the same frame numbers can only have more than at the start.
        pages = self._tables.pages
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
            holes = set(self._holes)
            everything = array("Q", (g for g in range(self._pages) if g not in holes))
            count = len(everything)
        else:
            self._log.read_and_clean()
            everything = self._found
            count = self._scan()
        for start in range(0, count, _BATCH):
            yield everything[start : min(start + _BATCH, count)]

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
        return not all(
            rings.answered(self._page(ring.gfn)) for ring in self._rings if ring.kind is Kind.DISK
        )

    def capture(
        self, staging: Staging, close_output: Callable[[], None], *, leave_paused: bool = False
    ) -> Captured:
        self._refresh()
        staging.clear()
        begun = time.perf_counter_ns()
        reach("pause")
        self.pause()
        try:
            reach("paused")
            context = self._domain.get_context()
            special = {
                gfn: bytes(self._outside.page(index)) for index, gfn in enumerate(self._special)
            }
            self._check_at_rest(context, special[self._special[0]])
            self._await_backends()
            settled = time.perf_counter_ns()
            close_output()
            closed = time.perf_counter_ns()
            state = self._copy_shared(staging, context, special)
            reach("rings-copied")
            self._copy_dirty(staging)
            reach("pages-copied")
            pause_ns = time.perf_counter_ns() - begun
            if not leave_paused:
                self.unpause()
                reach("unpaused")
            staging.state = self._encoder.encode(state)
        except BaseException:
            if self._log_was_read:
                # The log is clean now: what it said must not be lost with this attempt.
                self._carried = bytes(self._log.bitmap)
            self.unpause()
            raise
        finally:
            self._log_was_read = False
        return Captured(staging.count, pause_ns, settled - begun, closed - settled)

    def _check_at_rest(self, context: bytes, store_page: bytes) -> None:
        """Look whether this pause point will do.

        :param store_page: the copy of the xenstore ring that goes with the checkpoint: xenstored
            may put an event into the live one at any time
        :raise NotQuiescent: the guest itself is in the middle of something that cannot move
        """
        if len(context) != self._context_size:  # a vCPU came up or went down
            self._context_size = len(context)
            self._pointers_at = Context(context).instruction_pointers_at()
        pointers = [int.from_bytes(context[at : at + 8], "little") for at in self._pointers_at]
        if any(reads_clock(self._layout, pointer) for pointer in pointers):
            raise NotQuiescent("the guest was paused while it read its clock")
        if not timekeeping_at_rest(self._memory, self._layout):
            raise NotQuiescent("the guest was paused while it updated its clock")
        if not (rings.xenstore_empty(store_page) and xenstore_at_rest(self._memory, self._layout)):
            raise NotQuiescent("the guest was paused in a conversation with xenstore")
        if self._following.changed():
            raise NotQuiescent("the guest's part of xenstore has just changed")
        if self._fifo_count() != self._fifo_pages:
            raise NotQuiescent("the guest has just added a page of event channels")

    def _await_backends(self) -> None:
        """Wait until no backend owes the paused guest an answer.

        :raise NotQuiescent: the bound passed
        """
        began = 0.0
        for ring in self._rings:
            if ring.kind is Kind.RECEIVE:
                continue
            page = self._page(ring.gfn)
            while not rings.answered(page):
                now = time.monotonic()
                began = began or now
                if now - began > _QUIET_BOUND[ring.kind]:
                    raise NotQuiescent(
                        f"a {ring.kind.name.lower()} backend has not answered within its bound"
                    )
                os.sched_yield()

    def _page(self, gfn: int) -> memoryview:
        return self._ram.view[gfn * PAGE_SIZE : (gfn + 1) * PAGE_SIZE]

    def _copy_shared(
        self, staging: Staging, context: bytes, special: dict[int, bytes]
    ) -> MachineState:
        """Copy, before the dirty log is read, rings and what Xen itself writes."""
        events, frames = self._tables.read()
        self._check_size()
        self._map_grants(frames)
        grants = bytes(self._grants.view)
        written = {gfn for gfn in native.active_writable(grants) if gfn < self._pages}
        written.difference_update(self._holes)
        shared = self._shared
        # Data, as opposed to rings: copied after the log is read, since a backend may be at it now.
        self._granted = array("Q", sorted(written.difference(shared)))
        self._copied_first = array("Q", shared)
        self._need(staging, len(shared))
        staging.gfns[: len(shared)] = self._copied_first
        native.gather(self._ram.view, staging.gfns, len(shared), staging.data)
        staging.count = len(shared)
        self._check_receive_rings(staging, frames * rings.GRANTS_PER_FRAME)
        return MachineState(
            context=context,
            events=events,
            grants=[grants],
            pages=special,
            params=self._callback,  # set once, when the guest boots
            store=self._tree,
        )

    def _check_receive_rings(self, staging: Staging, grants: int) -> None:
        deadline = 0.0
        for ring in self._rings:
            if ring.kind is not Kind.RECEIVE:
                continue
            index = self._copied_first.index(ring.gfn)
            copy = staging.data[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
            while not rings.receive_unambiguous(copy, grants):
                now = time.monotonic()
                if not deadline:
                    deadline = now + _QUIET_BOUND[ring.kind]
                elif now > deadline:
                    raise NotQuiescent("a network backend keeps a batch of answers open")
                os.sched_yield()
                copy[:] = self._page(ring.gfn)

    def _copy_dirty(self, staging: Staging) -> None:
        self._log.read_and_clean()
        self._log_was_read = True
        reach("log-read")
        if self._carried is not None:
            self._merge_carried()
        count = native.subtract(self._found, self._scan(), self._copied_first)
        if self._granted:
            count = native.subtract(self._found, count, self._granted)
            self._found[count : count + len(self._granted)] = self._granted
            count += len(self._granted)
        first = staging.count
        self._need(staging, first + count)
        staging.gfns[first : first + count] = self._found[:count]
        native.gather(self._ram.view, self._found, count, staging.data[first * PAGE_SIZE :])
        staging.count = first + count

    def _scan(self) -> int:
        """Put the frames of the log that was read into ``_found``; how many they are.

        :raise UnsupportedGuest: among them is one that the guest did not have when it was mapped
        """
        count = native.scan_bitmap(self._log.bitmap, self._pages, self._found)
        if self._holes:
            logged = self._found[:count]
            left = native.subtract(self._found, count, self._holes)
            if left < count:
                # A growing grant table takes frames that the guest keeps free for it.
                new = set(logged).intersection(self._holes).difference(self._layout.grants.gfns)
                if new:
                    raise _given_memory(min(new))
            count = left
        return count

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
        return info is not None and not info.dying and not info.shutdown

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
