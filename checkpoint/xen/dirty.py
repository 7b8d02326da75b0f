# SPDX-License-Identifier: Apache-2.0
"""The hypervisor's dirty log of one domain.

Needs hardware-assisted paging: distribution Xens are built without shadow paging, so that a PV
guest has no dirty log there.
"""

from __future__ import annotations

import errno

from checkpoint.driver import PAGE_SIZE
from checkpoint.errors import HypervisorError, UnsupportedGuest
from checkpoint.xen.libs import Libraries, ffi, libraries

#: XEN_DOMCTL_SHADOW_OP_* (xen/include/public/domctl.h)
_OFF, _ENABLE_LOGDIRTY, _CLEAN = 0, 2, 11


class DirtyLog:
    """Dirty tracking of ``pages`` guest frames from frame 0.

    :ivar bitmap: one bit per frame, filled by :meth:`read_and_clean`
    """

    def __init__(self, domid: int, pages: int, libs: Libraries | None = None) -> None:
        self._libs = libs or libraries()
        self._domid = domid
        self._pages = pages
        self._buffer = ffi.new("xc_hypercall_buffer_t *")
        self._buffer_pages = (pages + 8 * PAGE_SIZE - 1) // (8 * PAGE_SIZE)
        memory = self._libs.xc.xc__hypercall_buffer_alloc_pages(
            self._libs.xch, self._buffer, self._buffer_pages
        )
        if memory == ffi.NULL:
            raise HypervisorError("xc__hypercall_buffer_alloc_pages", ffi.errno)
        self.bitmap = memoryview(ffi.buffer(memory, -(-pages // 64) * 8)).cast("B")
        self._open = True
        self._enabled = False

    def enable(self) -> None:
        """Begin tracking; every frame counts as clean from here.

        A log that a killed daemon left on is switched off first.

        :raise UnsupportedGuest: when Xen has no dirty log for this kind of guest
        """
        try:
            self._control(_ENABLE_LOGDIRTY)
        except HypervisorError as exc:
            if exc.errno == errno.EINVAL:
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

    def read_and_clean(self) -> None:
        """Move the log into :attr:`bitmap` and clean it."""
        result = self._libs.xc.xc_logdirty_control(
            self._libs.xch, self._domid, _CLEAN, self._buffer, self._pages, 0, ffi.NULL
        )
        if result != self._pages:
            raise HypervisorError("xc_logdirty_control", ffi.errno, "read and clean")

    def _control(self, operation: int) -> None:
        result = self._libs.xc.xc_logdirty_control(
            self._libs.xch, self._domid, operation, ffi.NULL, 0, 0, ffi.NULL
        )
        if result < 0:
            raise HypervisorError("xc_logdirty_control", ffi.errno, f"operation {operation}")

    def close(self) -> None:
        """End tracking and free the buffer (idempotent)."""
        if not self._open:
            return
        self._open = False
        self.bitmap.release()
        self._libs.xc.xc__hypercall_buffer_free_pages(
            self._libs.xch, self._buffer, self._buffer_pages
        )
        if self._enabled:
            self._enabled = False
            switch_off(self._domid, self._libs)


def switch_off(domid: int, libs: Libraries | None = None) -> None:
    """End dirty tracking of a domain; nothing happens where none is on or the domain is gone."""
    libs = libs or libraries()
    result = libs.xc.xc_logdirty_control(libs.xch, domid, _OFF, ffi.NULL, 0, 0, ffi.NULL)
    if result < 0 and ffi.errno not in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
        raise HypervisorError("xc_logdirty_control", ffi.errno, "switch off")
