# SPDX-License-Identifier: Apache-2.0
"""Several hypercalls in one trip into Xen, prepared once and made again and again.

A trip through Dom0's kernel into Xen costs more than most of what is asked for there.  Xen works
the entries off one after the other (``do_multicall``, xen/common/multicall.c), also those after one
that it refused; between two of them it may break off to serve interrupts, and then goes on there.
"""

from __future__ import annotations

import struct
from typing import Any

from checkpoint.driver import PAGE_SIZE
from checkpoint.errors import HypervisorError
from checkpoint.xen.libs import Libraries, ffi

_MULTICALL = 13
DOMCTL = 36
#: struct multicall_entry (xen/include/public/xen.h): op, result, six arguments
ENTRY = struct.Struct("<Qq6Q")
_RESULT = struct.Struct("<8xq48x")

#: struct xen_domctl (xen/include/public/domctl.h): command, interface version, domain; then the
#: operation's own, here that of hvmcontext: a size, and a buffer's address
_COMMAND = struct.Struct("<IIH6xI4xQ")
#: where that size is
COMMAND_SIZE_AT = 16
#: bytes for one; no release has more, and Xen reads and writes as many as its own has
COMMAND_ROOM = 256


def entry(operation: int, *arguments: int) -> bytes:
    """One entry, not yet made; at most six arguments."""
    return ENTRY.pack(operation, 0, *arguments, *[0] * (6 - len(arguments)))


def command(libs: Libraries, domid: int, number: int, size: int = 0, buffer: int = 0) -> bytes:
    """The argument of a control call (``__HYPERVISOR_domctl``), :data:`COMMAND_ROOM` bytes."""
    packed = _COMMAND.pack(number, libs.release.domctl, domid, size, buffer)
    return packed.ljust(COMMAND_ROOM, b"\0")


class Multicall:
    """A buffer that Xen can reach, with entries at its beginning and their arguments behind.

    :param size: bytes
    :ivar address: of the buffer
    :ivar view: its contents
    """

    def __init__(self, size: int, libs: Libraries) -> None:
        self._libs = libs
        self._pages = -(-size // PAGE_SIZE)
        memory: Any = libs.call.xencall_alloc_buffer_pages(libs.callh, self._pages)
        if memory == ffi.NULL:
            raise HypervisorError("xencall_alloc_buffer_pages", ffi.errno)
        self._memory = memory
        self.address = int(ffi.cast("uintptr_t", memory))
        self.view = memoryview(ffi.buffer(memory, self._pages * PAGE_SIZE)).cast("B")

    def make(self, request: bytes, first: int, count: int) -> None:
        """Make ``count`` calls from entry ``first`` on.

        :param request: what the buffer must begin with: Xen writes over entries and arguments
        :raise HypervisorError: which of them were made is not known
        """
        self.view[: len(request)] = request
        result = self._libs.call.xencall2(
            self._libs.callh, _MULTICALL, self.address + first * ENTRY.size, count
        )
        if result < 0:
            raise HypervisorError("multicall", ffi.errno)

    def check(self, number: int, call: str, detail: str) -> None:
        """Look at the result of an entry that was made.

        :raise HypervisorError: Xen refused it; ``call`` and ``detail`` are the words for it
        """
        (result,) = _RESULT.unpack_from(self.view, number * ENTRY.size)
        if result < 0:
            raise HypervisorError(call, -result, detail)

    def close(self) -> None:
        """Free the buffer (idempotent)."""
        if self._memory is not None:
            self.view.release()
            self._libs.call.xencall_free_buffer_pages(self._libs.callh, self._memory, self._pages)
            self._memory = None
