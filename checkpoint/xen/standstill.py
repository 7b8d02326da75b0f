# SPDX-License-Identifier: Apache-2.0
"""What is done while one guest stands still for a checkpoint, step by step.

:class:`checkpoint.xen.source.XenSource` says when; ``docs/xen.md`` says why in this order.
:mod:`checkpoint.xen.shortcut` does the same in native code as long as nothing is out of the
ordinary.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack

from checkpoint import native
from checkpoint.driver import PAGE_SIZE, Staging
from checkpoint.errors import NotQuiescent, UnsupportedGuest
from checkpoint.xen import rings
from checkpoint.xen.dirty import MARK_FRAME, DirtyLog
from checkpoint.xen.mapping import GrantFrames, Mapping
from checkpoint.xen.moment import Moment, Resumption
from checkpoint.xen.rest import Rest
from checkpoint.xen.rings import Kind, Ring
from checkpoint.xen.state import MachineState

#: how long a paused guest waits for its backends to answer what they consumed, seconds: a network's
#: backend only hands frames on, a disk has to be waited for
_QUIET_BOUND = {Kind.TRANSMIT: 0.020, Kind.RECEIVE: 0.020, Kind.DISK: 1.0}


class Standstill:
    """The steps, in the order of the methods from :meth:`stop` to :meth:`let_go`.

    :param context_size: bytes that the domain's vCPU context may have
    :param ram: its memory from frame 0 on, mapped
    :param special: guest frames outside RAM that backends share; the first is xenstore's ring
    :param absent: frames that have no memory and never get any, ascending
    :raise HypervisorError: Xen refuses one of the questions that will be asked
    """

    def __init__(
        self,
        domid: int,
        context_size: int,
        log: DirtyLog,
        ram: Mapping,
        special: Sequence[int],
        absent: Iterable[int],
        rest: Rest,
    ) -> None:
        self._domid = domid
        self._log = log
        self._ram = ram.view
        self._pages = len(ram.view) // PAGE_SIZE
        self._special = special
        self._absent = array("Q", absent)
        self._rest = rest
        with ExitStack() as held:
            self._moment = Moment(domid, context_size)
            held.callback(self._moment.close)
            self._resumption = Resumption(domid, MARK_FRAME)
            held.callback(self._resumption.close)
            self._outside = Mapping(domid, special)
            held.callback(self._outside.close)
            # With the context as well: where Xen refuses it, protection shall not begin.
            self._moment.take(pause=False)
            self._moment.context()
            _events, frames = self._moment.tables()
            self._map_grants(GrantFrames(domid, frames))
            held.callback(lambda: self._grants.close())
            self._held = held.pop_all()
        self._most_pages = self._moment.pages
        self._under_grants = 0
        self._carried: bytes | None = None
        self._log_was_read = False

    def close(self) -> None:
        """Give back what is mapped (idempotent)."""
        self._held.close()

    # ---- Section: while the guest runs ----

    def look_at_grants(self) -> memoryview:
        """The entries of the guest's grant table, as large as it is now.

        :raise HypervisorError: Xen refuses the question
        """
        _events, frames = self._moment.read_tables()
        self._follow_grants(frames)
        return self._grants.view

    def _follow_grants(self, frames: int) -> None:
        if frames != self._grants.frames:
            grown = GrantFrames(self._domid, frames)
            self._grants.close()
            self._map_grants(grown)

    def _map_grants(self, grants: GrantFrames) -> None:
        self._grants = grants
        self._granted = array("Q", bytes(len(grants.view)))

    def prepare(
        self, shared: Sequence[int], shared_rings: Sequence[Ring], holes: Collection[int]
    ) -> None:
        """Prepare the copying of frames that the dirty log knows nothing of.

        :param shared: these frames, ascending, those of the rings among them
        :param holes: frames without memory
        """
        self._shared = array("Q", shared)
        self._left_out = array("Q", sorted({*shared, *holes}))
        self._awaited = [
            (ring.kind, self._page(ring.gfn))
            for ring in shared_rings
            if ring.kind is not Kind.RECEIVE
        ]
        self._receiving = [
            (shared.index(ring.gfn), self._page(ring.gfn))
            for ring in shared_rings
            if ring.kind is Kind.RECEIVE
        ]

    def get_ready(self) -> None:
        """Do now what may be done before :meth:`stop`; to be called before each one."""

    def _page(self, gfn: int) -> memoryview:
        return self._ram[gfn * PAGE_SIZE : (gfn + 1) * PAGE_SIZE]

    def disks_busy(self) -> bool:
        """Whether a request to a disk waits for its answer."""
        return not all(rings.answered(page) for kind, page in self._awaited if kind is Kind.DISK)

    def check_absent(self) -> None:
        """Look whether the log has a frame that the guest did not have when it was mapped.

        :raise UnsupportedGuest: it has
        """
        filled = native.first_set(self._log.bitmap, self._absent)
        if filled >= 0:
            raise given_memory(filled)

    # ---- Section: while it stands still ----

    def stop(self, *, pause: bool) -> None:
        """Stop the guest, and learn from Xen what it keeps of it.

        :param pause: False for a guest that is paused already
        :raise HypervisorError: the guest was not paused, or it is not known whether
        """
        self._moment.take(pause=pause)

    def judge(self) -> None:
        """Look whether the guest may go on elsewhere from here.

        :raise NotQuiescent: it is in the middle of something
        :raise HypervisorError: Xen did not give its context
        """
        self._context = self._moment.context()
        self._copies = self._split(bytes(self._outside.view))
        self._rest.check(self._context, self._copies[self._special[0]])

    def _split(self, outside: bytes) -> dict[int, bytes]:
        places = range(0, len(outside), PAGE_SIZE)
        pages = (outside[place : place + PAGE_SIZE] for place in places)
        return dict(zip(self._special, pages, strict=True))

    def await_backends(self) -> None:
        """Wait until no backend owes the guest an answer.

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

    def copy_shared(self, staging: Staging) -> None:
        """Copy, before the dirty log is read, rings and what Xen itself writes.

        :raise NotQuiescent: a backend did not finish within the bound
        :raise HypervisorError: Xen refused a question about events, grants or memory
        :raise UnsupportedGuest: the guest was given pages after they were mapped here
        :raise OverflowError: ``staging`` is too small
        """
        self._events, frames = self._moment.tables()
        self._check_size()
        self._follow_grants(frames)
        self._entries = bytes(self._grants.view)
        # Data, as opposed to rings: copied after the log is read, since a backend may be at it now.
        self._under_grants = native.active_writable(self._entries, self._granted)
        count = len(self._shared)
        if count > staging.capacity:
            raise OverflowError(f"{count} pages to copy (staging holds {staging.capacity})")
        staging.gfns[:count] = self._shared
        native.gather(self._ram, self._shared, count, staging.data)
        staging.count = count
        self._check_receive_rings(staging, frames * rings.GRANTS_PER_FRAME)

    def _check_size(self) -> None:
        # What it gave away before stays counted, since the mapping here holds it: a guest that
        # takes memory back under the same frame numbers can only have more than at the start.
        pages = self._moment.pages
        if pages > self._most_pages:
            raise UnsupportedGuest(
                f"the guest's memory has grown from {self._most_pages} to {pages} pages "
                "(expected it to stay as it is while protected)"
            )

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

    def read_log(self, keep: int) -> None:
        """Read the dirty log, and clean it if more than ``keep`` frames are in it.

        :raise LogTaken: it does not tell all that was written
        """
        self._log.read(keep)
        self._log_was_read = True

    def copy_dirty(self, staging: Staging) -> None:
        """Copy what the log says, and pages that backends write through grants.

        :raise OverflowError: more than ``staging`` holds; the message gives the number
        :raise UnsupportedGuest: the guest was given memory where it had none
        """
        if self._carried is not None:
            self._merge_carried()
        self.check_absent()
        staging.count = native.stage(
            self._ram, self._log.bitmap, self._pages, self._granted, self._under_grants,
            self._left_out, staging.gfns, staging.count, staging.data,
        )  # fmt: skip

    def _merge_carried(self) -> None:
        assert self._carried is not None
        merged = int.from_bytes(self._log.bitmap, "little") | int.from_bytes(
            self._carried, "little"
        )
        self._log.bitmap[:] = merged.to_bytes(len(self._log.bitmap), "little")
        self._carried = None

    def let_go(self) -> None:
        """Put the mark into the log, and then let the guest run.

        :raise HypervisorError: it is still paused, or it is not known whether
        """
        self._resumption.make()

    # ---- Section: afterwards ----

    def check_mark(self) -> None:
        """Look whether :meth:`let_go` has put the mark into the log.

        :raise HypervisorError: it has not, and the guest runs
        """
        self._resumption.check()

    def state(self, params: dict[int, int], store: dict[str, str]) -> MachineState:
        """What was learned, after :meth:`copy_shared` and before the next :meth:`stop`."""
        return MachineState(
            context=self._context,
            events=self._events,
            grants=[self._entries],
            pages=self._copies,
            params=params,
            store=store,
        )

    def keep_log(self, *, paused: bool) -> None:
        """After an attempt that failed: what the log said is in the next one's.

        :param paused: the guest still stands still, so that the mark is to come
        """
        if self._log_was_read:
            self._carried = bytes(self._log.bitmap)  # the log itself may be clean now
            if paused:
                self._log.mark()

    def over(self) -> None:
        """The attempt has ended, one way or the other."""
        self._log_was_read = False


def given_memory(gfn: int) -> UnsupportedGuest:
    """The error of a guest that has memory where it had none when it was mapped."""
    return UnsupportedGuest(
        f"the guest was given memory at frame {gfn:#x} "
        "(expected its memory to stay as it is while protected)"
    )
