# SPDX-License-Identifier: Apache-2.0
"""Unix sockets of a simulated host: between a daemon's process and a server that is simulated."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import types
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from tests.prove.simulation import Process, Simulation

#: Virtual seconds that bytes take to the other process, at most.
LATENCY: Final = 0.0005


class Listener(Protocol):
    """Who serves a socket."""

    def accept(self, line: Line) -> None:
        """Somebody has connected."""

    def hear(self, line: Line, data: bytes) -> None:
        """Bytes came; none at all are the end of the connection."""


class Line:
    """One connection.  What one side sends comes later, in order; b"" is the end.

    :param process: of the daemon; the connection ends with it
    """

    def __init__(self, process: Process, server: Listener) -> None:
        self.process = process
        self.server = server
        self.inbox = bytearray()
        self.ended = False
        self._simulation: Simulation = process.simulation
        self._due = [0.0, 0.0]
        self._closed = [False, False]
        self._waiter: asyncio.Future[None] | None = None
        self._protocol: asyncio.Protocol | None = None
        process.dying.append(self.close)

    def divert(self, protocol: asyncio.Protocol) -> None:
        """Have a protocol told of what comes to the daemon."""
        self._protocol = protocol

    def send(self, data: bytes) -> None:
        """From the daemon to the server."""
        if not self._closed[0] and data:
            self._later(0, self._hear, data)

    def close(self) -> None:
        """By the daemon, or because it was killed."""
        if not self._closed[0]:
            self._closed[0] = True
            self._later(0, self._hear, b"")

    def answer(self, data: bytes) -> None:
        """From the server to the daemon."""
        if not self._closed[1] and data:
            self._later(1, self._arrive, data)

    def hang_up(self) -> None:
        """By the server."""
        if not self._closed[1]:
            self._closed[1] = True
            self._later(1, self._arrive, b"")

    def _later(self, way: int, call: Any, data: bytes) -> None:
        simulation = self._simulation
        when = max(self._due[way], simulation.now + simulation.random.uniform(0, LATENCY))
        self._due[way] = when
        simulation.later(when - simulation.now, call, data)

    def _hear(self, data: bytes) -> None:
        if not self._closed[1]:
            self.server.hear(self, data)

    def _arrive(self, data: bytes) -> None:
        if not self._closed[0]:
            self.process.call_soon(self._received, data)

    def _received(self, data: bytes) -> None:
        if self._closed[0]:
            return
        if self._protocol is None:
            self.inbox += data
            self.ended = self.ended or not data
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)
        elif data:
            self._protocol.data_received(data)
        else:
            self._protocol.eof_received()
            self._protocol.connection_lost(None)

    async def take(self, most: int) -> bytes:
        """At least one byte that came; none at the end."""
        while not self.inbox and not self.ended:
            self._waiter = self.process.create_future()
            await self._waiter
        data = bytes(self.inbox[:most])
        del self.inbox[:most]
        return data


class LineTransport(asyncio.Transport):
    """A connection of which a protocol is told."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line
        self._open = True

    def write(self, data: Any) -> None:
        self._line.send(bytes(data))

    def close(self) -> None:
        self._open = False
        self._line.close()

    def is_closing(self) -> bool:
        return not self._open

    def pause_reading(self) -> None:
        """Answers are short."""

    def resume_reading(self) -> None:
        """Answers are short."""


class RawSocket:
    """Stands in for ``socket.socket``."""

    def __init__(self, *_: int) -> None:
        self.line: Line | None = None

    def setblocking(self, _flag: bool) -> None:
        """It never blocks."""

    def close(self) -> None:
        """See ``socket.close``."""
        if self.line is not None:
            self.line.close()


class SocketModule(types.ModuleType):
    """Stands in for the module ``socket`` where a socket is made for a loop's ``sock_`` calls."""

    AF_UNIX = socket.AF_UNIX
    SOCK_STREAM = socket.SOCK_STREAM
    SOCK_CLOEXEC = socket.SOCK_CLOEXEC
    socket = RawSocket


class LocalSockets:
    """All Unix sockets of all hosts.

    :ivar servers: path -> who listens there
    """

    def __init__(self) -> None:
        self.servers: dict[str, Listener] = {}

    def connect(self, process: Process, path: str) -> Line:
        """A connection to whoever listens at ``path``.

        :raise OSError: nobody does
        """
        server = self.servers.get(path)
        if server is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        line = Line(process, server)
        server.accept(line)
        return line
