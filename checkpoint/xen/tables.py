# SPDX-License-Identifier: Apache-2.0
"""Questions to Xen about a domain's event channels, grant table and memory, as entries of a
multicall, and the reading of the answers.  :mod:`checkpoint.xen.moment` asks.
"""

from __future__ import annotations

import errno
import struct

from checkpoint.errors import HypervisorError
from checkpoint.xen.multicall import entry
from checkpoint.xen.state import EventChannel

_MEMORY_OP, _GRANT_TABLE_OP, _EVENT_CHANNEL_OP = 12, 20, 32
_EVTCHNOP_STATUS, _GNTTABOP_QUERY_SIZE, _XENMEM_CURRENT_RESERVATION = 5, 6, 3

_RESULT = "8xq48x"
#: struct evtchn_status: dom, port, status, vcpu, union; the union's first words are, by status:
#: unbound {u16 dom}, interdomain {u16 dom, u32 port}, virq {u32 virq}
_STATUS = struct.Struct("<HxxIIIHxxI")
_VIRQ_WORD = struct.Struct("<I")
#: struct gnttab_query_size: dom, nr_frames, max_nr_frames, status
_QUERY = struct.Struct("<HxxIIhxx")
#: the argument of XENMEM_current_reservation: domid_t, here up to the next word; its result is a
#: number of pages (memory.h)
_DOMID = struct.Struct("<H6x")
_VIRQ, _CLOSED = 4, 0


class Tables:
    """The questions about the first ``ports`` ports, and what the last answers said.

    :ivar entries: of the multicall, as bytes; Xen writes the results there
    :ivar arguments: of these; Xen writes the answers there
    :ivar whole: whether the last answers told of every port: Xen refuses one that it has not made
        yet with EINVAL, and not one that is closed, which may lie below others
    :ivar events: bound ports, ascending; the same object as long as nothing has changed
    :ivar frames: of the grant table
    :ivar pages: that the domain has
    :ivar answers: that all this was last read from
    """

    def __init__(self, domid: int, ports: int, address: int) -> None:
        """:param address: at which ``arguments`` will be when Xen is asked"""
        self._domid = domid
        self._ports = ports
        self._query_at = ports * _STATUS.size
        status_at, query_at = address, address + self._query_at
        entries = [
            entry(_EVENT_CHANNEL_OP, _EVTCHNOP_STATUS, status_at + port * _STATUS.size)
            for port in range(ports)
        ]
        entries += [
            entry(_GRANT_TABLE_OP, _GNTTABOP_QUERY_SIZE, query_at, 1),
            entry(_MEMORY_OP, _XENMEM_CURRENT_RESERVATION, query_at + _QUERY.size),
        ]
        arguments = [_STATUS.pack(domid, port, 0, 0, 0, 0) for port in range(ports)]
        arguments += [_QUERY.pack(domid, 0, 0, 0), _DOMID.pack(domid)]
        self.entries = b"".join(entries)
        self.arguments = b"".join(arguments)
        self.whole = False
        self.events: list[EventChannel] = []
        self.frames = self.pages = 0
        self._results = struct.Struct("<" + len(entries) * _RESULT)
        self.answers = b""

    @staticmethod
    def entry_count(ports: int) -> int:
        """How many entries there are for so many ports."""
        return ports + 2

    @staticmethod
    def argument_bytes(ports: int) -> int:
        """How long ``arguments`` is for so many ports; whole 64-bit words."""
        return ports * _STATUS.size + _QUERY.size + _DOMID.size

    def read(self, answers: bytes) -> None:
        """Take over what Xen has made of ``entries`` and ``arguments``, which lie side by side.

        :raise HypervisorError: when Xen refuses, also for a port that Xen itself listens to
        """
        if answers == self.answers:
            return
        self.answers = b""
        *ports, query, pages = self._results.unpack_from(answers)
        who = f"domain {self._domid}"
        if pages < 0:
            raise HypervisorError("XENMEM_current_reservation", -pages, who)
        if query:
            raise HypervisorError("GNTTABOP_query_size", -query, who)
        for number in set(ports).difference((0, -errno.EINVAL)):
            raise HypervisorError("EVTCHNOP_status", -number, who)
        raw = answers[len(self.entries) :]
        _dom, frames, _most, error = _QUERY.unpack_from(raw, self._query_at)
        if error:
            raise HypervisorError("GNTTABOP_query_size", 1, f"status {error}")
        self.whole = ports[-1] == -errno.EINVAL
        self.events = [
            _event(raw, at)
            for at in range(0, self._query_at, _STATUS.size)
            if _STATUS.unpack_from(raw, at)[2] != _CLOSED
        ]
        self.frames, self.pages = frames, pages
        self.answers = answers


def _event(raw: bytes, at: int) -> EventChannel:
    _dom, number, status, vcpu, remote, _port = _STATUS.unpack_from(raw, at)
    detail = _VIRQ_WORD.unpack_from(raw, at + 16)[0] if status == _VIRQ else remote
    return EventChannel(number, status, vcpu, detail)
