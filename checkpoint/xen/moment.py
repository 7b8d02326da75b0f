# SPDX-License-Identifier: Apache-2.0
"""The two trips into Xen between which a domain stands still for a checkpoint.

:class:`Moment` stops it and learns all that Xen keeps of it, :class:`Resumption` lets it go.
libxenctrl makes a call for each part of that, and for a vCPU context, which is more than a page, it
maps and unmaps a buffer each time.
"""

from __future__ import annotations

import errno
import struct

from checkpoint.errors import HypervisorError
from checkpoint.xen.libs import Libraries, libraries
from checkpoint.xen.multicall import (
    COMMAND_ROOM,
    COMMAND_SIZE_AT,
    DOMCTL,
    ENTRY,
    Multicall,
    command,
    entry,
)
from checkpoint.xen.state import EventChannel
from checkpoint.xen.tables import Tables

#: xen/include/public/domctl.h
_PAUSEDOMAIN, _UNPAUSEDOMAIN, _GETHVMCONTEXT = 3, 4, 33
_SIZE = struct.Struct("<I")

#: Xen makes event channels by the page, 64 or more of them (EVTCHNS_PER_BUCKET, xen/sched.h); the
#: port after the last one is asked for as well, to see that it is the last
_PORTS, _MOST_PORTS = 64 + 1, 4096 + 1
#: entries before those of the tables
_PAUSE, _CONTEXT, _TABLES = 0, 1, 2

#: ``__HYPERVISOR_dm_op``, XEN_DMOP_modified_memory (xen/include/public/hvm/dm_op.h)
_DM_OP, _MODIFIED_MEMORY = 41, 11
#: struct xen_dm_op with that operation's part, and the rest of its union; the one extent: pages,
#: first frame; two struct xen_dm_op_buf: address and size of the former two
_MODIFIED = struct.Struct("<I4xII56x")
_EXTENT = struct.Struct("<I4xQ")
_BUFFERS = struct.Struct("<4Q")
_MARK, _UNPAUSE = 0, 1


class Moment:
    """Stops one domain and learns its vCPU context and its tables, again and again.

    :param context_size: bytes that a vCPU context may have; no more than at the domain's creation
    :ivar request: what the buffer must begin with when a trip is made
    :ivar count: its entries: the first one pauses, the second one asks for the context
    :ivar size_at: where in the buffer the size of the context is afterwards
    :ivar context_at: and the context
    :ivar answers: and what Xen says about the tables
    """

    def __init__(self, domid: int, context_size: int, libs: Libraries | None = None) -> None:
        self._libs = libs or libraries()
        self._domid = domid
        self._context_size = context_size
        self._calls: Multicall | None = None
        self._prepare(_PORTS)

    def _prepare(self, ports: int) -> None:
        """Lay a buffer out: entries, arguments of the tables, two control calls, the context."""
        count = _TABLES + Tables.entry_count(ports)
        arguments_at = count * ENTRY.size
        commands_at = arguments_at + Tables.argument_bytes(ports)
        context_at = commands_at + 2 * COMMAND_ROOM
        calls = Multicall(context_at + self._context_size, self._libs)
        self.close()
        self._calls, base = calls, calls.address
        self._tables = tables = Tables(self._domid, ports, base + arguments_at)
        entries = [entry(DOMCTL, base + commands_at + at) for at in (0, COMMAND_ROOM)]
        commands = [
            command(self._libs, self._domid, _PAUSEDOMAIN),
            command(self._libs, self._domid, _GETHVMCONTEXT, self._context_size, base + context_at),
        ]
        self.request = b"".join([*entries, tables.entries, tables.arguments, *commands])
        self._ports, self.count = ports, count
        self.context_at = context_at
        self.size_at = commands_at + COMMAND_ROOM + COMMAND_SIZE_AT
        self.answers = slice(_TABLES * ENTRY.size, commands_at)

    def take(self, *, pause: bool) -> None:
        """Pause the domain and learn its context and its tables.

        :param pause: False for a domain that is paused already: pauses nest in Xen's counter
        :raise HypervisorError: Xen did not pause it, or it is not known whether; what else it
            refused is said when that is asked for
        """
        first = _PAUSE if pause else _CONTEXT
        self._open().make(self.request, first, self.count - first)
        if pause:
            self.check_paused()

    def check_paused(self) -> None:
        """Look whether the trip that was just made has paused the domain.

        :raise HypervisorError: Xen refused to
        """
        self._open().check(_PAUSE, "XEN_DOMCTL_pausedomain", self._who())

    def context(self) -> bytes:
        """The HVM save records of vCPUs and platform devices (``hvm/save.h``), of the last moment.

        To be asked for before :meth:`tables`.

        :raise HypervisorError: Xen refused
        """
        calls = self._open()
        calls.check(_CONTEXT, "XEN_DOMCTL_gethvmcontext", self._who())
        (used,) = _SIZE.unpack_from(calls.view, self.size_at)
        return bytes(calls.view[self.context_at : self.context_at + used])

    def tables(self) -> tuple[list[EventChannel], int]:
        """(bound ports in ascending order, number of grant-table frames) of the last moment.

        Asks again, in further trips, where the domain has got more ports than were asked for.

        :raise HypervisorError: when Xen refuses, also for a port that Xen itself listens to
        """
        while True:
            self._tables.read(bytes(self._open().view[self.answers]))
            if self._tables.whole:
                return self._tables.events, self._tables.frames
            if self._ports >= _MOST_PORTS:
                raise HypervisorError("EVTCHNOP_status", errno.E2BIG, "event channels")
            self._prepare(2 * self._ports - 1)
            self._ask_tables()

    def read_tables(self) -> tuple[list[EventChannel], int]:
        """As :meth:`tables`, of this moment; the domain is left as it is.

        :raise HypervisorError: as there
        """
        self._ask_tables()
        return self.tables()

    def _ask_tables(self) -> None:
        self._open().make(self.request, _TABLES, self.count - _TABLES)

    @property
    def address(self) -> int:
        """Of the buffer; :meth:`tables` may make another one."""
        return self._open().address

    @property
    def known(self) -> bytes:
        """The answers that :meth:`tables` was last read from."""
        return self._tables.answers

    @property
    def events(self) -> list[EventChannel]:
        """What :meth:`tables` last said of event channels."""
        return self._tables.events

    @property
    def pages(self) -> int:
        """Pages that the domain had when its tables were last looked at."""
        return self._tables.pages

    def _open(self) -> Multicall:
        assert self._calls is not None, "nothing is asked after close"
        return self._calls

    def _who(self) -> str:
        return f"domain {self._domid}"

    def close(self) -> None:
        """Free the buffer (idempotent)."""
        if self._calls is not None:
            self._calls.close()
            self._calls = None


class Resumption:
    """Reports one frame of a paused domain as modified, and lets the domain run, in this order.

    :param frame: guest frame, to be found in the dirty log when it is read next
    :ivar address: of the buffer
    :ivar request: what it must begin with when its two entries are made
    """

    def __init__(self, domid: int, frame: int, libs: Libraries | None = None) -> None:
        libs = libs or libraries()
        self._domid = domid
        operation_at = 2 * ENTRY.size
        extent_at = operation_at + _MODIFIED.size
        buffers_at = extent_at + _EXTENT.size
        command_at = buffers_at + _BUFFERS.size
        self._calls = Multicall(command_at + COMMAND_ROOM, libs)
        base = self._calls.address
        buffers = _BUFFERS.pack(
            base + operation_at, _MODIFIED.size, base + extent_at, _EXTENT.size
        )  # fmt: skip
        self.address = base
        self.request = b"".join(
            [
                entry(_DM_OP, domid, 2, base + buffers_at),
                entry(DOMCTL, base + command_at),
                _MODIFIED.pack(_MODIFIED_MEMORY, 1, 0),
                _EXTENT.pack(1, frame),
                buffers,
                command(libs, domid, _UNPAUSEDOMAIN),
            ]
        )

    def make(self) -> None:
        """Do it.

        :raise HypervisorError: the domain is still paused, or it is not known whether
        """
        self._calls.make(self.request, _MARK, 2)
        self.check_unpaused()

    def check_unpaused(self) -> None:
        """Look whether the trip that was just made has let the domain run.

        :raise HypervisorError: Xen refused to
        """
        self._calls.check(_UNPAUSE, "XEN_DOMCTL_unpausedomain", f"domain {self._domid}")

    def check(self) -> None:
        """Look whether the frame was reported by the last :meth:`make`.

        :raise HypervisorError: it was not, and the domain runs
        """
        self._calls.check(_MARK, "XEN_DMOP_modified_memory", f"domain {self._domid}")

    def close(self) -> None:
        """Free the buffer (idempotent)."""
        self._calls.close()
