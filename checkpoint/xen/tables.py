# SPDX-License-Identifier: Apache-2.0
"""A domain's event channels, and the sizes of its grant table and its memory, in one multicall.

Asking port by port costs a trip into Xen each; a multicall asks for all of them in one, which
matters because the guest is paused meanwhile.
"""

from __future__ import annotations

import errno
import struct

from checkpoint.driver import PAGE_SIZE
from checkpoint.errors import HypervisorError
from checkpoint.xen.libs import Libraries, ffi, libraries
from checkpoint.xen.state import EventChannel

_HYPERVISOR_MEMORY_OP, _HYPERVISOR_MULTICALL = 12, 13
_HYPERVISOR_GRANT_TABLE_OP, _HYPERVISOR_EVENT_CHANNEL_OP = 20, 32
_EVTCHNOP_STATUS, _GNTTABOP_QUERY_SIZE, _XENMEM_CURRENT_RESERVATION = 5, 6, 3

#: struct multicall_entry (xen.h): op, result, six arguments
_ENTRY = struct.Struct("<Qq6Q")
_RESULT = "8xq48x"
#: struct evtchn_status: dom, port, status, vcpu, union; the union's first words are, by status:
#: unbound {u16 dom}, interdomain {u16 dom, u32 port}, virq {u32 virq}
_STATUS = struct.Struct("<HxxIIIHxxI")
_VIRQ_WORD = struct.Struct("<I")
#: struct gnttab_query_size: dom, nr_frames, max_nr_frames, status
_QUERY = struct.Struct("<HxxIIhxx")
#: the argument of XENMEM_current_reservation: domid_t; its result is a number of pages (memory.h)
_DOMID = struct.Struct("<H")

#: Xen makes event channels by the page, 64 or more of them (EVTCHNS_PER_BUCKET, xen/sched.h); the
#: port after the last one is asked for as well, to see that it is the last
_PORTS, _MOST_PORTS = 64 + 1, 4096 + 1
_VIRQ, _CLOSED = 4, 0


class Tables:
    """Reader of one domain's event-channel table and grant-table size.

    :ivar pages: pages that the domain had when :meth:`read` was last called
    """

    def __init__(self, domid: int, libs: Libraries | None = None) -> None:
        self._libs = libs or libraries()
        self._domid = domid
        self.pages = 0
        self._whole = b""
        self._parsed: tuple[list[EventChannel], int] = ([], 0)
        self._allocate(_PORTS)

    def _allocate(self, ports: int) -> None:
        self._ports = ports
        size = (ports + 2) * (_ENTRY.size + _STATUS.size) + _QUERY.size
        self._pages = -(-size // PAGE_SIZE)
        self._memory = self._libs.call.xencall_alloc_buffer_pages(self._libs.callh, self._pages)
        if self._memory == ffi.NULL:
            raise HypervisorError("xencall_alloc_buffer_pages", ffi.errno)
        self._view = memoryview(ffi.buffer(self._memory, self._pages * PAGE_SIZE)).cast("B")
        self._base = int(ffi.cast("uintptr_t", self._memory))
        self._entries = bytearray((ports + 2) * _ENTRY.size)
        self._results = struct.Struct("<" + (ports + 2) * _RESULT)
        self._status_at = len(self._entries)
        self._query_at = self._status_at + ports * _STATUS.size
        self._domid_at = self._query_at + _QUERY.size
        self._requests = bytearray(ports * _STATUS.size + _QUERY.size + _DOMID.size)
        for port in range(ports):
            _ENTRY.pack_into(
                self._entries, port * _ENTRY.size,
                _HYPERVISOR_EVENT_CHANNEL_OP, 0, _EVTCHNOP_STATUS,
                self._base + self._status_at + port * _STATUS.size, 0, 0, 0, 0,
            )  # fmt: skip
            _STATUS.pack_into(self._requests, port * _STATUS.size, self._domid, port, 0, 0, 0, 0)
        _ENTRY.pack_into(
            self._entries, ports * _ENTRY.size,
            _HYPERVISOR_GRANT_TABLE_OP, 0, _GNTTABOP_QUERY_SIZE,
            self._base + self._query_at, 1, 0, 0, 0,
        )  # fmt: skip
        _QUERY.pack_into(self._requests, ports * _STATUS.size, self._domid, 0, 0, 0)
        _ENTRY.pack_into(
            self._entries, (ports + 1) * _ENTRY.size,
            _HYPERVISOR_MEMORY_OP, 0, _XENMEM_CURRENT_RESERVATION,
            self._base + self._domid_at, 0, 0, 0, 0,
        )  # fmt: skip
        _DOMID.pack_into(self._requests, ports * _STATUS.size + _QUERY.size, self._domid)

    def read(self) -> tuple[list[EventChannel], int]:
        """(bound ports in ascending order, number of grant-table frames).

        A port that Xen has not made yet is refused with EINVAL, one that is closed is not: the
        guest may have closed some below the last one.

        :raise HypervisorError: when Xen refuses, also for a port that Xen itself listens to
        """
        while True:
            events, frames, whole = self._read_once()
            if whole:
                return events, frames
            if self._ports >= _MOST_PORTS:
                raise HypervisorError("EVTCHNOP_status", errno.E2BIG, "event channels")
            self.close()
            self._allocate(2 * self._ports - 1)

    def _read_once(self) -> tuple[list[EventChannel], int, bool]:
        # The last: whether that was the whole table.
        view, status_at = self._view, self._status_at
        view[:status_at] = self._entries
        view[status_at : status_at + len(self._requests)] = self._requests
        result = self._libs.call.xencall2(
            self._libs.callh, _HYPERVISOR_MULTICALL, self._base, self._ports + 2
        )
        if result < 0:
            raise HypervisorError("multicall", ffi.errno, "event channels")
        answer = bytes(view[: self._query_at + _QUERY.size])
        if answer == self._whole:
            return *self._parsed, True
        *ports, query, pages = self._results.unpack_from(view)
        if pages < 0:
            raise HypervisorError("XENMEM_current_reservation", -pages, f"domain {self._domid}")
        if query:
            raise HypervisorError("GNTTABOP_query_size", -query, f"domain {self._domid}")
        for number in set(ports).difference((0, -errno.EINVAL)):
            raise HypervisorError("EVTCHNOP_status", -number, f"domain {self._domid}")
        whole = ports[-1] == -errno.EINVAL
        raw = answer[status_at:]
        events: list[EventChannel] = []
        for port in range(self._ports):
            at = port * _STATUS.size
            _dom, number, status, vcpu, remote, _port = _STATUS.unpack_from(raw, at)
            if status == _CLOSED:
                continue
            detail = _VIRQ_WORD.unpack_from(raw, at + 16)[0] if status == _VIRQ else remote
            events.append(EventChannel(number, status, vcpu, detail))
        _dom, frames, _most, error = _QUERY.unpack_from(raw, self._query_at - status_at)
        if error:
            raise HypervisorError("GNTTABOP_query_size", 1, f"status {error}")
        self._parsed = (events, frames)
        self.pages = pages
        self._whole = answer if whole else b""
        return events, frames, whole

    def close(self) -> None:
        """Free the hypercall buffer (idempotent)."""
        if self._memory is not None:
            self._libs.call.xencall_free_buffer_pages(self._libs.callh, self._memory, self._pages)
            self._memory = None
