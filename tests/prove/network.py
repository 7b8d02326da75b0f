# SPDX-License-Identifier: Apache-2.0
"""TCP between simulated processes: late, torn off, or silent, but never reordered."""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from tests.prove.simulation import Process, Simulation

#: Virtual seconds from one host to the other, at least and at most.
LATENCY: Final = (0.00005, 0.002)
#: Share of writes that go in two pieces.
SPLIT: Final = 0.5
#: Bytes at the end of an epoch that hold its last frames, and how often these come later.
END: Final = 200
LATE: Final = 0.8
#: Virtual seconds after which a kernel repeats what was not acknowledged.
REPEAT: Final = 0.2
#: Virtual seconds after which it gives up: ``user_timeout`` of ``LinkOptions``.
GIVE_UP: Final = 30.0

Address = tuple[str, int]


class _Socket:
    """What :func:`checkpoint.link.set_socket_options` wants to see."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def setsockopt(self, *_: Any) -> None:
        """There is no kernel to tell."""

    def getsockname(self) -> Address:
        return self._address


class End(asyncio.Transport):
    """One end of a connection.

    What is written goes, piece by piece, to the other end's process.  ``None`` among the pieces is
    an end of stream, an exception a reset.
    """

    def __init__(
        self,
        network: Network,
        process: Process,
        protocol: asyncio.BufferedProtocol,
        local: Address,
        remote: Address,
        path: tuple[str, str],
    ) -> None:
        super().__init__()
        self.process = process
        self.other: End
        self.open = True
        self._network = network
        self._protocol = protocol
        self._extra = {"peername": remote, "sockname": local, "socket": _Socket(local)}
        self._path = path
        self._pieces: deque[bytes | Exception | None] = deque()
        self._arrives = 0.0
        self._moving = False
        self._stuck_since: float | None = None
        self._reading = True
        self._unread: deque[bytes | Exception | None] = deque()
        self.cut_after: int | None = None

    # ---- what asyncio's users call ----

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._extra.get(name, default)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Everything is taken; the daemons under test send little."""

    def is_closing(self) -> bool:
        return not self.open

    def write(self, data: Any) -> None:
        if not self.open or not data:
            return
        data = bytes(data)
        chance = self._network.simulation.random
        late = self._network.late_ends and len(data) > END and chance.random() < LATE
        if late or (len(data) > 1 and chance.random() < SPLIT):
            # Two segments of their own: the second may come later, or never.
            place = chance.randrange(1, len(data))
            if late:
                place = len(data) - chance.randrange(1, END)
            self.send(data[:place])
            data = data[place:]
        self.send(data)

    def close(self) -> None:
        if self.open:
            self.send(None)
            self._shut(None)

    def abort(self) -> None:
        if self.open:
            self._pieces.clear()
            self.send(ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)))
            self._shut(None)

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        if self._unread:
            self.process.call_soon(self._read)

    # ---- the kernel and the wire ----

    def send(self, piece: bytes | Exception | None) -> None:
        """Put something on its way to the other end."""
        self._pieces.append(piece)
        self._move()

    def _move(self) -> None:
        if self._pieces and not self._moving:
            self._moving = True
            simulation = self._network.simulation
            latency = simulation.random.uniform(*LATENCY)
            self._arrives = max(self._arrives, simulation.now + latency)
            simulation.later(self._arrives - simulation.now, self._arrive)

    def _arrive(self) -> None:
        self._moving = False
        if not self._pieces:
            return
        network, now = self._network, self._network.simulation.now
        if not network.carries(*self._path):
            if self._stuck_since is None:
                self._stuck_since = now
            if now - self._stuck_since > GIVE_UP:
                self._pieces.clear()
                self._lose(TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
            elif network.powered(self.process.name):
                self._moving = True
                network.simulation.later(REPEAT, self._arrive)
            return
        self._stuck_since = None
        piece = self._pieces.popleft()
        if self.cut_after is not None:
            # Power failed while this was on the wire: so much of it still came.
            if isinstance(piece, bytes) and len(piece) > self.cut_after:
                piece = piece[: self.cut_after]
                self._pieces.clear()
            if not isinstance(piece, bytes):
                self._pieces.clear()
                return
            self.cut_after -= len(piece)
        self.other.receive(piece)
        self._move()

    def receive(self, piece: bytes | Exception | None) -> None:
        """Something arrives from the other end."""
        if not self.open:
            if isinstance(piece, bytes) and self._network.powered(self.process.name):
                # Nobody has this port any more.
                self.send(ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)))
            return
        self._unread.append(piece)
        self.process.call_soon(self._read)

    def _read(self) -> None:
        while self._unread and self._reading and self.open:
            piece = self._unread.popleft()
            if piece is None:
                if not self._protocol.eof_received():
                    self.close()
            elif isinstance(piece, Exception):
                self._shut(piece)
            else:
                while piece and self.open:
                    room = memoryview(self._protocol.get_buffer(len(piece)))
                    size = min(len(room), len(piece))
                    room[:size] = piece[:size]
                    piece = piece[size:]
                    self._protocol.buffer_updated(size)

    def _lose(self, error: Exception) -> None:
        """The kernel tells this end's process."""
        if self.open:
            self.process.call_soon(self._shut, error)

    def _shut(self, error: Exception | None) -> None:
        if self.open:
            self.open = False
            self.process.call_soon(self._protocol.connection_lost, error)

    def reset(self) -> None:
        """The connection is torn off; both ends hear of it."""
        error = ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        self._pieces.clear()
        self._lose(error)
        self.other._pieces.clear()
        self.other._lose(error)

    def die(self) -> None:
        """This end's process was killed: its kernel ends the stream."""
        if self.open:
            self.send(None)
            self.open = False

    def power_fails(self, still: int) -> None:
        """This end's host has no power; so many bytes of what is on the wire still arrive."""
        self.open = False
        self.cut_after = still
        if not self._moving:
            self._pieces.clear()


class Server:
    """See :class:`asyncio.Server`."""

    def __init__(self, network: Network, address: Address) -> None:
        self.sockets = (_Socket(address),)
        self._network = network
        self._address = address

    def close(self) -> None:
        """Listen no more."""
        self._network.listening.pop(self._address, None)


class Network:
    """All wires.

    :param where: address -> (machine, name of the network)
    :param powered: whether a machine has power
    :ivar unplugged: names of networks that carry nothing
    :ivar late_ends: writes are often split within their last bytes, so that an epoch with much in
        it is often there but for its COMMIT
    """

    def __init__(
        self,
        simulation: Simulation,
        where: dict[str, tuple[str, str]],
        powered: Callable[[str], bool],
    ) -> None:
        self.simulation = simulation
        self.powered = powered
        self.unplugged: set[str] = set()
        self.late_ends = False
        self.listening: dict[Address, tuple[Process, Callable[[], Any]]] = {}
        self.ends: list[End] = []
        self._where = where
        self._ports = 40000
        simulation.network = self

    def carries(self, target: str, wire: str) -> bool:
        """Whether bytes get to that machine over that network now."""
        return self.powered(target) and wire not in self.unplugged

    def listen(self, process: Process, factory: Callable[[], Any], host: str, port: int) -> Server:
        """See :meth:`asyncio.loop.create_server`."""
        address = (host, port)
        if address in self.listening:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        self.listening[address] = (process, factory)
        process.dying.append(lambda: self._unlisten(process))
        return Server(self, address)

    def _unlisten(self, process: Process) -> None:
        for address, (owner, _) in list(self.listening.items()):
            if owner is process:
                del self.listening[address]

    async def connect(
        self, process: Process, factory: Callable[[], Any], host: str, port: int
    ) -> tuple[End, Any]:
        """See :meth:`asyncio.loop.create_connection`."""
        target, wire = self._where[host]
        await asyncio.sleep(self.simulation.random.uniform(*LATENCY))
        while not (self.carries(target, wire) and self.carries(process.name, wire)):  # noqa: ASYNC110 - SYN is repeated
            await asyncio.sleep(REPEAT)
        found = self.listening.get((host, port))
        if found is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        there, make = found
        self._ports += 1
        own_host = next(
            address for address, at in self._where.items() if at == (process.name, wire)
        )
        own, far = (own_host, self._ports), (host, port)
        mine, theirs = factory(), make()
        near_end = End(self, process, mine, own, far, (target, wire))
        far_end = End(self, there, theirs, far, own, (process.name, wire))
        near_end.other, far_end.other = far_end, near_end
        self.ends = [end for end in self.ends if end.open or end.other.open]
        self.ends += [near_end, far_end]
        process.dying.append(near_end.die)
        there.dying.append(far_end.die)
        there.call_soon(theirs.connection_made, far_end)
        mine.connection_made(near_end)
        return near_end, mine

    def reset(self, process: Process) -> None:
        """Tear off all connections of a process."""
        for end in list(self.ends):
            if end.process is process and end.open:
                end.reset()

    def power_fails(self, machine: str) -> None:
        """What a machine had sent and is still on the wire may arrive, in part."""
        for end in self.ends:
            if end.process.name == machine and end.open:
                end.power_fails(self.simulation.random.choice((0, 10, 100, 10_000, 1 << 30)))
