# SPDX-License-Identifier: Apache-2.0
"""The hypervisor's dirty log of one domain.

Needs hardware-assisted paging: distribution Xens are built without shadow paging, so that a PV
guest has no dirty log there.

Xen has one log for each domain, for whoever asks, and says nobody that somebody else has asked:
``paging_log_dirty_op`` (``xen/arch/x86/mm/paging.c``) does not even look whether the log is on, and
answers that nothing is dirty.  So a *mark* is left in it: after each reading, frame
:data:`MARK_FRAME` is told to Xen as modified.  Whoever else switches the log off or cleans it takes
the mark away, and the next reading notices; a log that is on without the mark is not ours.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from typing import Final

from checkpoint import native
from checkpoint.driver import PAGE_SIZE
from checkpoint.errors import HypervisorError, LogTaken, UnsupportedGuest
from checkpoint.xen.libs import Libraries, ffi, libraries

#: XEN_DOMCTL_SHADOW_OP_* (xen/include/public/domctl.h)
_OFF, _ENABLE_LOGDIRTY, _CLEAN, _PEEK = 0, 2, 11, 12

#: Frames looked at together: a multiple of 8.  A list of all of a large guest's would take Dom0's
#: memory for nothing.
_WINDOW: Final = 1 << 15

#: The first frame of RAM: ``meminit_hvm`` (``xg_dom_x86.c``) fills a PVH guest's memory from there
#: on, and Linux leaves it alone for fear of firmware (``early_reserve_memory`` in
#: ``arch/x86/kernel/setup.c``).  It is copied each time, as if the guest had written it.
MARK_FRAME: Final = 0


class DirtyLog:
    """Dirty tracking of ``pages`` guest frames from frame 0.

    A frame whose page was written stays in the log until that is cleaned.  From then on the guest's
    next write to each page is a fault that Xen handles, and so is its first access by each part of
    the tables that Xen keeps of its memory (``p2m_change_entry_type_global``).  That costs the
    guest more than copying a page again does, so :meth:`read` can do without.

    :ivar bitmap: one bit per frame, filled by a reading, in which the mark's is set
    :ivar buffer: the library's description of it
    """

    def __init__(self, domid: int, pages: int, libs: Libraries | None = None) -> None:
        self._libs = libs or libraries()
        self._domid = domid
        self._pages = pages
        self.buffer = ffi.new("xc_hypercall_buffer_t *")
        self._buffer_pages = (pages + 8 * PAGE_SIZE - 1) // (8 * PAGE_SIZE)
        memory = self._libs.xc.xc__hypercall_buffer_alloc_pages(
            self._libs.xch, self.buffer, self._buffer_pages
        )
        if memory == ffi.NULL:
            raise HypervisorError("xc__hypercall_buffer_alloc_pages", ffi.errno)
        self.bitmap = memoryview(ffi.buffer(memory, -(-pages // 64) * 8)).cast("B")
        self._open = True
        self._enabled = False

    def enable(self) -> None:
        """Begin tracking; every frame but the mark counts as clean from here.

        A log that a killed daemon left on is switched off first.

        :raise LogTaken: somebody else has it on
        :raise UnsupportedGuest: when Xen has no dirty log for this kind of guest
        """
        try:
            self._control(_ENABLE_LOGDIRTY)
        except HypervisorError as exc:
            if exc.errno == errno.EINVAL:
                if not self.marked():
                    raise LogTaken from exc
                self._control(_OFF)
                self._control(_ENABLE_LOGDIRTY)
            elif exc.errno == errno.EOPNOTSUPP:
                raise UnsupportedGuest(
                    "Xen has no dirty log for this guest (expected a PVH or HVM guest with "
                    "hardware-assisted paging)"
                ) from exc
            else:
                raise
        self._enabled = True
        self.mark()
        if not self.marked():
            raise UnsupportedGuest(
                f"the dirty log keeps no mark at frame {MARK_FRAME} (expected memory there)"
            )

    def read(self, keep: int) -> None:
        """Copy the log of a paused domain into :attr:`bitmap`, and clean it if more than ``keep``
        frames are in it.  The domain gets its mark before it runs: by :meth:`mark`, or from a
        :class:`checkpoint.xen.moment.Resumption`.

        Either way the bitmap has all that was written since the last reading.  What was not cleaned
        is in the next one again.

        :raise LogTaken: it does not tell all that was written since the last reading
        """
        if keep > 0:
            self._read_ours(_PEEK, "peek")
            if native.count_set(self.bitmap, self._pages) <= keep:
                return
        # What backends wrote meanwhile is in this one.
        self.clean()

    @property
    def ours(self) -> bool:
        """Whether the log is on, and nobody else was seen to have it."""
        return self._enabled

    def clean(self) -> None:
        """As :meth:`read`, and clean it, whatever is in it.

        :raise LogTaken: as there
        """
        self._read_ours(_CLEAN, "read and clean")

    def read_and_clean(self) -> None:
        """Move the log into :attr:`bitmap`, clean it, and put the mark into it.

        :raise LogTaken: as :meth:`read`
        """
        self.clean()
        self.mark()

    def _read_ours(self, operation: int, what: str) -> None:
        if not self._enabled:
            raise LogTaken
        # Xen 4.17 answers for a dying domain without filling the bitmap.
        self.bitmap[MARK_FRAME // 8] &= ~(1 << MARK_FRAME % 8)
        self._read(operation, self._pages, what)
        if not self._shows_mark():
            self._enabled = False  # it is somebody else's, or off
            if operation == _CLEAN:
                self._give_back()
            raise LogTaken

    def mark(self) -> None:
        """Put the mark into the log that was read; whatever the domain writes comes after it."""
        self._report(MARK_FRAME)

    def marked(self) -> bool:
        """Whether the mark is in the log; destroys what is in :attr:`bitmap`."""
        self.bitmap[MARK_FRAME // 8] = 0
        self._read(_PEEK, 8 * (MARK_FRAME // 8 + 1), "peek")
        return self._shows_mark()

    def _shows_mark(self) -> bool:
        return bool(self.bitmap[MARK_FRAME // 8] >> MARK_FRAME % 8 & 1)

    def _read(self, operation: int, pages: int, what: str) -> None:
        result = self._libs.xc.xc_logdirty_control(
            self._libs.xch, self._domid, operation, self.buffer, pages, 0, ffi.NULL
        )
        if result != pages:
            raise HypervisorError("xc_logdirty_control", ffi.errno, what)

    def _report(self, frame: int) -> None:
        """Tell Xen that a frame was modified; where no log is on, nothing happens."""
        result = self._libs.model.xendevicemodel_modified_memory(
            self._libs.modelh, self._domid, frame, 1
        )
        if result < 0:
            raise HypervisorError("xendevicemodel_modified_memory", ffi.errno)

    def frames(self) -> Iterator[array[int]]:
        """Frames of the log that was read, ascending, some at a time."""
        found = array("Q", bytes(8 * _WINDOW))
        for first in range(0, self._pages, _WINDOW):
            count = min(_WINDOW, self._pages - first)
            window = self.bitmap[first // 8 : (first + count + 7) // 8]
            yield found[: native.scan_bitmap(window, count, found, first)]

    def _give_back(self) -> None:
        """Put what was just read back into the log: another program waits for it."""
        for frames in self.frames():
            for frame in frames:
                self._report(frame)

    def _control(self, operation: int) -> None:
        result = self._libs.xc.xc_logdirty_control(
            self._libs.xch, self._domid, operation, ffi.NULL, 0, 0, ffi.NULL
        )
        if result < 0:
            raise HypervisorError("xc_logdirty_control", ffi.errno, f"operation {operation}")

    def close(self) -> None:
        """End tracking, unless somebody else has taken it, and free the buffer (idempotent)."""
        if not self._open:
            return
        self._open = False
        self.bitmap.release()
        self._libs.xc.xc__hypercall_buffer_free_pages(
            self._libs.xch, self.buffer, self._buffer_pages
        )
        if self._enabled:
            self._enabled = False
            switch_off(self._domid, self._libs)


def left_behind(domid: int) -> bool:
    """Whether the log of a domain is on, and ours."""
    log = DirtyLog(domid, 8 * (MARK_FRAME // 8 + 1))
    try:
        return log.marked()
    finally:
        log.close()


def switch_off(domid: int, libs: Libraries | None = None) -> None:
    """End dirty tracking of a domain; nothing happens where none is on or the domain is gone."""
    libs = libs or libraries()
    result = libs.xc.xc_logdirty_control(libs.xch, domid, _OFF, ffi.NULL, 0, 0, ffi.NULL)
    if result < 0 and ffi.errno not in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
        raise HypervisorError("xc_logdirty_control", ffi.errno, "switch off")
