# SPDX-License-Identifier: Apache-2.0
"""The process that sends and hears pulses, so that a busy daemon does not look like a dead host.

Started by :class:`kemari.pulses.Pulses` as ``python -m kemari.pacemaker BOARD``, where BOARD is the
number of an open file that both have mapped (:class:`kemari.pulse.Board`).  Its orders come on
standard input, a line of JSON for each change, which replaces the one before; it ends with that
stream.  It imports little, allocates little, and has a real-time priority where it may.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import selectors
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Final

from kemari import pulse

#: Datagrams that are read from one socket at a time: orders and pulses wait for no flood.
_BATCH: Final = 64
#: The lowest priority above all ordinary processes (sched(7)).
_PRIORITY: Final = 1
#: mlockall(2): MCL_CURRENT | MCL_FUTURE
_LOCK_ALL: Final = 3

Place = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Orders:
    """What to do from now on.

    :ivar host: UUID of this host, 16 bytes
    :ivar pace: seconds between two pulses
    :ivar listen: where to hear
    :ivar targets: where to send
    :ivar slots: (peer's UUID, its address) -> slot on the board
    """

    host: bytes
    key: bytes
    pace: float
    limit_ms: int
    listen: tuple[Place, ...] = ()
    targets: tuple[Place, ...] = ()
    keys: dict[bytes, bytes] = field(default_factory=dict)
    slots: dict[tuple[bytes, str], int] = field(default_factory=dict)

    def pack(self) -> bytes:
        """A line that :func:`unpack` reads."""
        return (
            json.dumps(
                {
                    "host": self.host.hex(),
                    "key": self.key.hex(),
                    "pace": self.pace,
                    "limit_ms": self.limit_ms,
                    "listen": self.listen,
                    "targets": self.targets,
                    "keys": {host.hex(): key.hex() for host, key in self.keys.items()},
                    "slots": [[host.hex(), ip, slot] for (host, ip), slot in self.slots.items()],
                }
            ).encode()
            + b"\n"
        )


def unpack(line: bytes) -> Orders:
    """What :meth:`Orders.pack` made; it comes from the daemon, which is trusted."""
    said: dict[str, Any] = json.loads(line)
    of_hex = bytes.fromhex
    return Orders(
        host=of_hex(said["host"]),
        key=of_hex(said["key"]),
        pace=said["pace"],
        limit_ms=said["limit_ms"],
        listen=tuple((host, port) for host, port in said["listen"]),
        targets=tuple((host, port) for host, port in said["targets"]),
        keys={of_hex(host): of_hex(key) for host, key in said["keys"].items()},
        slots={(of_hex(host), ip): slot for host, ip, slot in said["slots"]},
    )


class Pacemaker:
    """See the module's text.

    :param orders: file number of the stream of orders
    """

    def __init__(self, board: pulse.Board, orders: int) -> None:
        self._board = board
        self._orders_from = orders
        self._unread = b""
        self._orders: Orders | None = None
        self._ear: pulse.Ear | None = None
        self._number = 0
        self._bound: dict[Place, socket.socket] = {}
        self._mouths: dict[socket.AddressFamily, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(orders, selectors.EVENT_READ)

    def run(self) -> None:
        """Work until the stream of orders ends."""
        due = time.monotonic()
        while True:
            for key, _ in self._selector.select(max(0.0, due - time.monotonic())):
                if key.data is not None:
                    self._hear(key.data)
                elif not self._read_orders():
                    return
            now = time.monotonic()
            if now >= due:
                self._beat()
                due = max(due, now - self._pace) + self._pace

    @property
    def _pace(self) -> float:
        return self._orders.pace if self._orders else 1.0

    def _read_orders(self) -> bool:
        chunk = os.read(self._orders_from, 1 << 16)
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        if lines:
            self._obey(unpack(lines[-1]))
        return bool(chunk)

    def _obey(self, orders: Orders) -> None:
        self._orders = orders
        if self._ear is None:
            self._ear = pulse.Ear(orders.limit_ms)
        self._ear.know(orders.keys)
        self._listen()
        self._beat()

    def _listen(self) -> None:
        assert self._orders
        for place in self._orders.listen:
            if place in self._bound:
                continue
            try:
                self._bound[place] = bound = _bind(place)
            except OSError as error:
                # Perhaps an address that comes later; the next orders try again.
                print(f"pulses to {place[0]} cannot be heard: {error}", file=sys.stderr)
            else:
                self._selector.register(bound, selectors.EVENT_READ, bound)

    def _hear(self, bound: socket.socket) -> None:
        assert self._orders
        assert self._ear
        for _ in range(_BATCH):
            try:
                untrusted, sender = bound.recvfrom(pulse.SIZE + 1)
            except BlockingIOError:
                return
            host = self._ear.hear(untrusted)
            if host is None:
                continue
            slot = self._orders.slots.get((host, plain(sender[0])))
            if slot is not None:
                self._board.note(slot)

    def _beat(self) -> None:
        if self._orders is None:
            return
        # Restarted with the same key, it must go on above where it was.
        self._number = max(self._number + 1, time.monotonic_ns())
        datagram = pulse.pack(
            self._orders.key, self._orders.host, self._number, self._board.stood_ms
        )
        for host, port in self._orders.targets:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                # Not the bound sockets: the kernel takes the address of the way out as the source.
                self._mouth(family).sendto(datagram, (host, port))
            except OSError:
                continue  # no way there now: that is what the peer is to notice

    def _mouth(self, family: socket.AddressFamily) -> socket.socket:
        if family not in self._mouths:
            self._mouths[family] = mouth = socket.socket(family, socket.SOCK_DGRAM)
            mouth.setblocking(False)
        return self._mouths[family]


def _bind(place: Place) -> socket.socket:
    family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_DGRAM)
    try:
        bound.setblocking(False)
        bound.bind(place)
    except BaseException:
        bound.close()
        raise
    return bound


def plain(address: str) -> str:
    """An address as text, without what only makes sense on this host or socket."""
    return address.partition("%")[0].removeprefix("::ffff:")


def take_priority() -> None:
    """Have this process run before all ordinary ones, from memory that is never paged out."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mlockall(_LOCK_ALL) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    except OSError as error:
        print(f"pulses have no real-time priority or memory: {error.strerror}", file=sys.stderr)


def main() -> None:
    """Entry point."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it lives as long as its daemon, whatever it is sent
    memory = mmap.mmap(int(sys.argv[1]), pulse.Board.BYTES)
    take_priority()
    Pacemaker(pulse.Board(memoryview(memory)), sys.stdin.fileno()).run()


if __name__ == "__main__":
    main()
