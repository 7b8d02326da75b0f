# SPDX-License-Identifier: Apache-2.0
"""Clients of the guest's transactions (``vagrant/guest/transactions.c``), and what must hold.

Each connection has one transaction after the other put 1, 2, 3 ... into both tables.  So a look
at the rows of a client tells everything: those that were acknowledged are there, once, and no
number is in one table only.  A connection is never opened again.

Run as a program of its own, with nothing but the standard library, at the client's place in the
lab's network.  It prints one JSON object a line: ``connected``; ``done`` for each acknowledged
transaction; for each line on standard input ``looked``, with what is wrong with the tables; at the
end, which SIGTERM asks for, a last look and ``end``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from vagrant.demolib.writer import HOST, PATIENCE, connect

PORT: Final = 7979
TABLES: Final = 2


@dataclass(frozen=True, slots=True)
class Held:
    """What a table holds of one client.

    :ivar different: numbers among the rows
    """

    rows: int
    different: int
    least: int
    greatest: int


def faults(client: int, acknowledged: int, asked: int, tables: Sequence[Held]) -> list[str]:
    """One sentence for everything that a database which keeps its word does not hold.

    :param acknowledged: transactions before the look was asked for
    :param asked: transactions that were asked for when the look was answered
    """
    found = []
    for number, held in enumerate(tables, start=1):
        where = f"table {number} of client {client}"
        if held.different != held.rows:
            found.append(f"{where} has {held.rows} rows with {held.different} different numbers")
        if held.rows and (held.least, held.greatest) != (1, held.different):
            found.append(
                f"{where} has {held.different} numbers from {held.least} to {held.greatest}"
            )
        if not acknowledged <= held.greatest <= asked:
            found.append(
                f"{where} goes up to {held.greatest}; {acknowledged} were acknowledged and "
                f"{asked} asked for"
            )
    if len(set(tables)) > 1:
        found.append(f"half a transaction of client {client} is there: {tables}")
    return found


class Refused(Exception):
    """The database answered with an error."""


class Connection:
    """A connection over which one thing is asked after the other.

    :raises OSError: there is no connection
    """

    def __init__(self, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self._reader, self._writer = streams

    async def ask(self, command: str) -> list[int]:
        """The numbers that are the answer.

        :raises Refused: it is an error
        :raises EOFError: the connection ended
        """
        self._writer.write(f"{command}\n".encode())
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the connection ended")
        first, *words = line.decode().split()
        if first != "ok":
            raise Refused(f"{command}: {line.decode().strip()}")
        return [int(word) for word in words]


class Client:
    """One connection that adds transactions.

    :ivar acknowledged: how many were
    :ivar asked: how many were asked for
    :ivar broken: why the connection ended, or ""
    """

    def __init__(self, index: int, pause: float, connection: Connection) -> None:
        self.index = index
        self.acknowledged = 0
        self.asked = 0
        self.broken = ""
        self._pause = pause
        self._chance = random.Random(index)
        self._connection = connection

    async def run(self, ending: asyncio.Event) -> None:
        """Add transactions until ``ending``."""
        try:
            while not ending.is_set():
                self.asked += 1
                sent = time.monotonic()
                await self._connection.ask(f"ADD {self.index} {self.asked}")
                self.acknowledged = self.asked
                tell("done", connection=self.index, sent=sent, answered=time.monotonic())
                await asyncio.sleep(self._pause * self._chance.random())
        except (OSError, EOFError, Refused) as error:
            self.broken = str(error) or type(error).__name__


class Looker:
    """Looks at what the tables hold, over a connection of its own."""

    def __init__(self, clients: Sequence[Client], connection: Connection) -> None:
        self._clients = clients
        self._connection = connection
        self._one_at_a_time = asyncio.Lock()

    async def look(self) -> None:
        """Look once, and tell what is wrong.

        :raises OSError, EOFError: the connection ended
        """
        async with self._one_at_a_time:
            found = []
            for client in self._clients:
                acknowledged = client.acknowledged
                held = await self._connection.ask(f"CHECK {client.index}")
                size = len(held) // TABLES
                tables = [Held(*held[at : at + size]) for at in range(0, len(held), size)]
                found += faults(client.index, acknowledged, client.asked, tables)
            try:
                await self._connection.ask("INTEGRITY")
            except Refused as error:
                found.append(f"the database's own check: {error}")
            tell("looked", faults=found)


def tell(event: str, **values: Any) -> None:
    """Tell whoever waits."""
    print(json.dumps({"event": event, **values}), flush=True)


async def talk(options: argparse.Namespace) -> None:
    """Run the clients."""
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ending.set)
    place = (options.host, options.port)
    clients = []
    for index in range(options.connections):
        clients.append(Client(index, options.pause / 1000, Connection(await connect(*place))))
        tell("connected", connection=index)
    looker = Looker(clients, Connection(await connect(*place)))
    tasks = [asyncio.create_task(client.run(ending)) for client in clients]
    looks: set[asyncio.Task[None]] = set()

    def asked() -> None:
        if sys.stdin.readline():
            looks.add(loop.create_task(looker.look()))
        else:
            loop.remove_reader(sys.stdin)

    loop.add_reader(sys.stdin, asked)
    await ending.wait()
    _, late = await asyncio.wait(tasks, timeout=PATIENCE)
    for task in late:
        task.cancel()
    await asyncio.gather(*looks)
    await asyncio.wait_for(looker.look(), PATIENCE)
    tell("end", broken={c.index: c.broken for c in clients if c.broken}, late=len(late))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="transactions", description="Add transactions.")
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--connections", type=int, default=2)
    parser.add_argument("--pause", type=float, default=100.0, metavar="MS", help="(%(default)s)")
    asyncio.run(talk(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
