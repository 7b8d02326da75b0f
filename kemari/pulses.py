# SPDX-License-Identifier: Apache-2.0
"""Pulses with other hosts, as the daemon sees them: it gives orders and reads the board."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import mmap
import os
import secrets
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final

from checkpoint.turns import next_turn, sleep_until
from kemari.config import Address
from kemari.liveness import BEATS
from kemari.pacemaker import Orders, plain
from kemari.pulse import SLOTS, Board

log = logging.getLogger(__name__)

#: Heartbeat times, and seconds at least, after which a daemon that stands still is as good as dead.
STANDING_BEATS: Final = 10
STANDING_LEAST: Final = 10.0
#: Hosts of which keys are kept; more have greeted this one by mistake or malice.
MOST_KEYS: Final = 1024
#: Seconds until a process that ended by itself is started again.
PAUSE: Final = 1.0


class Pulses:
    """The pacemaker process, while :meth:`run` runs, and what it notes.

    :param host_id: UUID of this host
    :param heartbeat: seconds
    :param listen: where pulses are heard
    :param tell: is given a sentence when the process has ended by itself
    """

    def __init__(
        self,
        host_id: str,
        heartbeat: float,
        listen: Iterable[Address],
        tell: Callable[[str], None] = log.warning,
    ) -> None:
        self._host = uuid.UUID(host_id).bytes
        self._key = secrets.token_bytes(32)
        self._pace = heartbeat / BEATS
        self._limit_ms = int(max(STANDING_BEATS * heartbeat, STANDING_LEAST) * 1000)
        self._listen = tuple(listen)
        self._tell = tell
        self._board_file = os.memfd_create("kemari-pulses")
        os.ftruncate(self._board_file, Board.BYTES)
        self._board = Board(memoryview(mmap.mmap(self._board_file, Board.BYTES)))
        self._board.turn()
        self._keys: dict[bytes, bytes] = {}
        self._wanted: Counter[tuple[bytes, Address]] = Counter()
        self._places: dict[tuple[bytes, Address], tuple[tuple[str, int], ...]] = {}
        self._slots: dict[tuple[bytes, str], int] = {}
        self._free = list(range(SLOTS))
        self._orders: asyncio.StreamWriter | None = None
        self._resolving: set[asyncio.Task[None]] = set()
        self._heard_at: tuple[tuple[str, int], ...] = ()

    @property
    def key(self) -> str:
        """What peers must know to believe this host's pulses."""
        return self._key.hex()

    # ---- Section: who ----

    def learn(self, host_id: str, key: str) -> None:
        """A peer has told its key; one without a proper UUID or key sends no pulses."""
        host = _uuid(host_id)
        if host is None or not key:
            return
        if self._keys.get(host) != bytes.fromhex(key):
            if len(self._keys) >= MOST_KEYS:
                wanted = {known for known, _ in self._wanted}
                self._keys = {known: kept for known, kept in self._keys.items() if known in wanted}
            self._keys[host] = bytes.fromhex(key)
            self._give_orders()

    def want(self, host_id: str, addresses: Iterable[Address]) -> None:
        """Exchange pulses with these addresses of a host, until :meth:`unwant`."""
        host = _uuid(host_id)
        if host is None:
            return
        for address in addresses:
            self._wanted[host, address] += 1
            if self._wanted[host, address] == 1:
                task = asyncio.get_running_loop().create_task(self._resolve(host, address))
                self._resolving.add(task)
                task.add_done_callback(self._resolving.discard)

    async def _resolve(self, host: bytes, address: Address) -> None:
        places = await _places(address)
        if self._wanted[host, address] > 0:
            self._places[host, address] = places
            self._assign()

    def unwant(self, host_id: str, addresses: Iterable[Address]) -> None:
        """The counterpart of :meth:`want`."""
        host = _uuid(host_id)
        if host is None:
            return
        for address in addresses:
            self._wanted[host, address] -= 1
            if self._wanted[host, address] <= 0:
                del self._wanted[host, address]
                self._places.pop((host, address), None)
        self._assign()

    def _assign(self) -> None:
        paths = {(host, ip) for (host, _), places in self._places.items() for ip, _ in places}
        for path in set(self._slots) - paths:
            self._free.append(self._slots.pop(path))
        for path in paths - set(self._slots):
            if not self._free:
                self._tell(f"more than {SLOTS} paths for pulses; heartbeats remain")
                break
            self._slots[path] = self._free.pop()
            self._board.clear(self._slots[path])
        self._give_orders()

    # ---- Section: evidence ----

    def evidence(self, host_id: str) -> dict[str, float]:
        """Address -> ``time.monotonic()`` of the last pulse of that host from there."""
        host = _uuid(host_id)
        heard = {
            ip: self._board.heard(slot)
            for (sender, ip), slot in self._slots.items()
            if sender == host
        }
        return {ip: when for ip, when in heard.items() if when}

    # ---- Section: the process ----

    async def run(self) -> None:
        """Keep the process, and say that this event loop turns, until cancelled."""
        self._heard_at = tuple(
            dict.fromkeys([place for each in self._listen for place in await _places(each)])
        )
        keeper = asyncio.create_task(self._keep())
        try:
            while True:
                self._board.turn()
                if keeper.done():
                    keeper.result()
                await sleep_until(next_turn(time.monotonic(), self._pace))
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, *self._resolving, return_exceptions=True)

    async def _keep(self) -> None:
        while True:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "kemari.pacemaker",
                str(self._board_file),
                stdin=asyncio.subprocess.PIPE,
                pass_fds=[self._board_file],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            try:
                self._orders = process.stdin
                self._give_orders()
                status = await process.wait()
            finally:
                self._orders = None
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            self._tell(f"the process for pulses has ended (status {status}); it is started again")
            await asyncio.sleep(PAUSE)

    def _give_orders(self) -> None:
        if self._orders is None or self._orders.is_closing():
            return
        places = [place for places in self._places.values() for place in places]
        orders = Orders(
            host=self._host,
            key=self._key,
            pace=self._pace,
            limit_ms=self._limit_ms,
            listen=self._heard_at,
            targets=tuple(dict.fromkeys(places)),
            keys={host: key for host, key in self._keys.items() if self._knows(host)},
            slots=self._slots,
        )
        self._orders.write(orders.pack())

    def _knows(self, host: bytes) -> bool:
        return any(host == known for known, _ in self._slots)


def _uuid(untrusted: str) -> bytes | None:
    try:
        return uuid.UUID(untrusted).bytes
    except ValueError:
        return None


async def _places(address: Address) -> tuple[tuple[str, int], ...]:
    """Numeric forms of an address; none if it has none now, which heartbeats have to bear too."""
    try:
        return ((str(ipaddress.ip_address(address.host)), address.port),)
    except ValueError:
        pass
    try:
        found: list[Any] = await asyncio.get_running_loop().getaddrinfo(
            address.host, address.port, type=socket.SOCK_DGRAM
        )
    except OSError as error:
        log.info("%s has no address for pulses: %s", address.host, error)
        return ()
    return tuple((plain(each[4][0]), address.port) for each in found)
