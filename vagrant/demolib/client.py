# SPDX-License-Identifier: Apache-2.0
"""The client outside both hosts: numbered requests on connections that are never opened again.

Run as a program of its own, with nothing but the standard library, at the client's place in the
lab's network.  Request *n* of a connection is the line ``n``; the service answers
``n COUNT MONOTONIC BOOTTIME REALTIME``, see ``vagrant/guest/demo.c``.

It writes one JSON object a line to a file: ``start`` with the connections, one ``answer`` for each
answer as it comes, ``closed`` if a connection ends that should not, and at the end ``unanswered``
requests and ``end``.  Times are of this machine's CLOCK_MONOTONIC, in seconds.

On standard output it tells, one JSON object a line, what others may wait for: ``connected``,
``tick`` (each half second, with the number of answers on each connection), ``stopped`` and
``resumed`` (answers of a connection), ``closed``, ``ended``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TextIO

GUEST: Final = ("10.77.0.10", "fd77::10")
PORT: Final = 7777
#: Seconds without the answer that is due after which answers are said to have stopped.
SILENCE: Final = 0.5
TICK: Final = 0.5
#: Bytes of an answer line at most; the service repeats a short number and adds four more.
MAX_LINE: Final = 1024
CLOCKS: Final = ("count", "mono", "boot", "real")


class Connection(asyncio.Protocol):
    """One TCP connection: sends its requests at a steady pace, records the answers.

    :param index: its place in the list of connections
    :param interval: seconds between two requests
    :param closed_loop: each request waits for the answer to the one before
    :param backlog: requests that may be unanswered; further ones are not sent until it shrinks
    """

    def __init__(
        self, client: Client, index: int, interval: float, closed_loop: bool, backlog: int
    ) -> None:
        self.answers = 0
        self.unanswered: dict[int, float] = {}
        self.silent = False
        self.closed = ""
        self._client = client
        self._index = index
        self._interval = interval
        self._closed_loop = closed_loop
        self._backlog = backlog
        self._number = 0
        self._read = b""
        self._last_heard = 0.0
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    # ---- Section: sending ----

    def begin(self) -> None:
        """Send the first request and go on from there."""
        self._last_heard = time.monotonic()
        self._send(asyncio.get_running_loop().time())

    def _send(self, due: float) -> None:
        """Send the request that was due then, and arm the timer for the next one."""
        loop = asyncio.get_running_loop()
        assert self._transport is not None
        if len(self.unanswered) < self._backlog:
            self._number += 1
            # Before the write, which may hand it to the network at once.
            self.unanswered[self._number] = time.monotonic()
            self._transport.write(b"%d\n" % self._number)
        if not self._closed_loop:
            # From when it was due, so that the pace is kept; not faster after a stall of our own.
            due = max(due + self._interval, loop.time() - self._interval)
            self._timer = loop.call_at(due, self._send, due)

    def hush(self) -> None:
        """Send no more requests."""
        if self._timer is not None:
            self._timer.cancel()
        self._closed_loop = False

    def close(self) -> None:
        """Close the connection."""
        self.hush()
        self.closed = self.closed or "by the client"
        if self._transport is not None:
            self._transport.abort()

    # ---- Section: what asyncio calls ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        oldest = next(iter(self.unanswered.values()), now)
        *lines, self._read = (self._read + data).split(b"\n")
        if len(self._read) > MAX_LINE:
            self._lost("the service sent a line without an end")
            return
        for line in lines:
            if not self._answer(line, now):
                return
        if min(now - oldest, now - self._last_heard) > SILENCE:
            self._client.tell("resumed", connection=self._index, at=now, since=self._last_heard)
        self.silent = False
        self._last_heard = now

    def _answer(self, line: bytes, now: float) -> bool:
        try:
            number, *values = (int(word) for word in line.split())
            clocks = dict(zip(CLOCKS, values, strict=True))
        except ValueError:
            self._lost(f"the service sent {line[:80]!r}; expected a number and four more")
            return False
        sent = self.unanswered.pop(number, None)
        self.answers += 1
        self._client.record(
            "answer", connection=self._index, number=number, sent=sent, received=now, **clocks
        )
        if self._closed_loop:
            loop = asyncio.get_running_loop()
            due = loop.time() + self._interval
            self._timer = loop.call_at(due, self._send, due)
        self._client.answered()
        return True

    def eof_received(self) -> bool:
        self._lost("the service closed it")
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._lost(str(error or "closed"))

    def _lost(self, why: str) -> None:
        if not self.closed:
            self.hush()
            self.closed = why
            self._client.lost(self._index, why)
            if self._transport is not None:
                self._transport.abort()

    # ---- Section: silence ----

    def look(self, now: float) -> None:
        """Tell once if answers are overdue."""
        oldest = next(iter(self.unanswered.values()), now)
        overdue = min(now - oldest, now - self._last_heard) > SILENCE
        if overdue and not self.silent and not self.closed:
            self.silent = True
            self._client.tell("stopped", connection=self._index, at=self._last_heard)


class Client:
    """All connections, the records, and the end.

    :param out: the file for records
    """

    def __init__(self, options: argparse.Namespace, out: TextIO) -> None:
        self._options = options
        self._out = out
        self._connections: list[Connection] = []
        self._stop = asyncio.Event()
        self._drained = asyncio.Event()
        self._ending = False
        self._why = "after its time"

    async def run(self) -> int:
        """Talk until told to stop; the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, signal.Signals(number).name)
        if not await self._connect():
            return 1
        for connection in self._connections:
            connection.begin()
        ticking = loop.create_task(self._tick())
        try:
            async with asyncio.timeout(self._options.duration or None):
                await self._stop.wait()
        except TimeoutError:
            self._why = "after its time"
        await self._drain()
        ticking.cancel()
        self._finish()
        return 1 if any(c.closed != "by the client" for c in self._connections) else 0

    async def _connect(self) -> bool:
        options, loop = self._options, asyncio.get_running_loop()
        described = []
        for index, address in enumerate(options.address):
            connection = Connection(
                self, index, options.interval / 1000, options.closed_loop, options.backlog
            )
            try:
                async with asyncio.timeout(options.connect_timeout):
                    transport, _ = await loop.create_connection(
                        lambda connection=connection: connection,  # type: ignore[misc]
                        address,
                        options.port,
                    )
            except (OSError, TimeoutError) as error:
                print(
                    f"client: no connection to {address} port {options.port}: "
                    f"{error or 'no answer in time'}",
                    file=sys.stderr,
                )
                return False
            self._connections.append(connection)
            local = transport.get_extra_info("sockname")
            described.append({"address": address, "local_port": local[1]})
        now = time.monotonic()
        self.record("start", connections=described, at=now, interval_ms=options.interval)
        self.tell("connected", at=now)
        return True

    async def _tick(self) -> None:
        while True:
            now = time.monotonic()
            for connection in self._connections:
                connection.look(now)
            self.tell("tick", at=now, answers=[c.answers for c in self._connections])
            await asyncio.sleep(TICK)

    def _signalled(self, name: str) -> None:
        if self._ending:
            self._drained.set()  # asked twice: do not wait for answers
        self._why = f"by {name}"
        self._stop.set()

    async def _drain(self) -> None:
        """Send no more, and give what is under way its time to be answered."""
        self._ending = True
        for connection in self._connections:
            connection.hush()
        self.answered()
        try:
            async with asyncio.timeout(self._options.drain):
                await self._drained.wait()
        except TimeoutError:
            self.tell("undrained", at=time.monotonic())

    def _finish(self) -> None:
        for index, connection in enumerate(self._connections):
            connection.close()
            for number, sent in connection.unanswered.items():
                self.record("unanswered", connection=index, number=number, sent=sent)
        now = time.monotonic()
        self.record("end", at=now, why=self._why)
        self._out.flush()
        self.tell("ended", at=now)

    # ---- Section: what connections call ----

    def record(self, event: str, **values: Any) -> None:
        """Write a record."""
        self._out.write(json.dumps({"event": event, **values}) + "\n")

    def tell(self, event: str, **values: Any) -> None:
        """Tell whoever waits; if nobody does any more, end."""
        try:
            print(json.dumps({"event": event, **values}), flush=True)
        except BrokenPipeError:
            self._why = "because nobody listens any more"
            self._stop.set()

    def answered(self) -> None:
        """Something was answered: perhaps everything, when that is waited for."""
        if self._ending and not any(c.unanswered for c in self._connections if not c.closed):
            self._drained.set()

    def lost(self, index: int, why: str) -> None:
        """A connection ended that should not have."""
        now = time.monotonic()
        self.record("closed", connection=index, at=now, why=why)
        self.tell("closed", connection=index, at=now, why=why)
        self.answered()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="client", description="Numbered requests on connections that are never opened again."
    )
    parser.add_argument("records", type=Path, metavar="FILE", help="where records go")
    parser.add_argument(
        "--address",
        action="append",
        help=f"of the service, one connection each ({', '.join(GUEST)})",
    )
    parser.add_argument("--port", type=int, default=PORT, help="(%(default)s)")
    parser.add_argument(
        "--interval", type=float, default=20, metavar="MS", help="between requests (%(default)s)"
    )
    parser.add_argument(
        "--closed-loop",
        action="store_true",
        help="send a request only when the one before is answered",
    )
    parser.add_argument(
        "--backlog", type=int, default=10_000, metavar="N", help="requests unanswered (%(default)s)"
    )
    parser.add_argument(
        "--duration", type=float, default=0, metavar="S", help="end by itself (0: on SIGTERM)"
    )
    parser.add_argument(
        "--drain", type=float, default=20, metavar="S", help="for the last answers (%(default)s)"
    )
    parser.add_argument("--connect-timeout", type=float, default=60, metavar="S")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit status is 0 if no connection ended before its time."""
    options = _parser().parse_args(argv)
    options.address = options.address or list(GUEST)
    with options.records.open("w") as out:
        client = Client(options, out)
        return asyncio.run(client.run())


if __name__ == "__main__":
    sys.exit(main())
