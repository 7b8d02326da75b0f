# SPDX-License-Identifier: Apache-2.0
"""Clients of the guest's registers: everything that they ask and are told, with times.

Run as a program of its own, with nothing but the standard library, at the client's place in the
lab's network.  Each connection asks one thing after the other, chosen at random: ``GET``, ``PUT``,
``CAS`` and ``INCR`` of a few keys that all of them share (``vagrant/guest/demo.c``) and that no
earlier run has used.  A connection is never opened again.

It prints one JSON object a line: ``connected``; for each answer ``done`` with connection, command,
times (this machine's CLOCK_MONOTONIC, seconds) and answer; at the end, which SIGTERM asks for,
``end`` with what was not answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import time
from collections.abc import Sequence
from typing import Final

HOST: Final = "10.77.0.10"
PORT: Final = 7878
#: Seconds that the last answers may take.
PATIENCE: Final = 60.0
REGISTERS: Final = 3
COUNTERS: Final = 2


class Client:
    """One connection.

    :param run: what the names of this run's keys begin with
    :ivar waiting: the command that is not answered yet, and when it was sent
    :ivar broken: why the connection ended, or ""
    """

    def __init__(self, index: int, run: str, pause: float, seed: int) -> None:
        self.index = index
        self.waiting: tuple[list[str], float] | None = None
        self.broken = ""
        self._run = run
        self._pause = pause
        self._chance = random.Random(seed * 1000 + index)
        self._number = 0
        self._known: dict[str, str] = {}

    async def run(self, host: str, port: int, ending: asyncio.Event) -> None:
        """Ask until ``ending``."""
        reader, writer = await asyncio.open_connection(host, port)
        print(json.dumps({"event": "connected", "connection": self.index}), flush=True)
        try:
            while not ending.is_set():
                await self._ask(reader, writer, self._command())
                await asyncio.sleep(self._pause * self._chance.random())
        except (OSError, EOFError) as error:
            self.broken = str(error) or type(error).__name__
        finally:
            writer.close()

    def _command(self) -> list[str]:
        chance = self._chance
        self._number += 1
        fresh = f"{self.index}.{self._number}"
        key = f"{self._run}r{chance.randrange(REGISTERS)}"
        match chance.randrange(5):
            case 0 | 1:
                return ["GET", key]
            case 2:
                return ["PUT", key, fresh]
            case 3:
                return ["CAS", key, self._known.get(key, "-"), fresh]
        return ["INCR", f"{self._run}n{chance.randrange(COUNTERS)}", str(chance.randint(1, 9))]

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: list[str]
    ) -> None:
        sent = time.monotonic()
        self.waiting = command, sent
        writer.write(" ".join(command).encode() + b"\n")
        line = await reader.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the connection ended")
        reply = line.decode().strip()
        self.waiting = None
        if command[0] == "GET":
            self._known[command[1]] = reply
        done = {
            "event": "done",
            "connection": self.index,
            "command": command,
            "sent": sent,
            "answered": time.monotonic(),
            "reply": reply,
        }
        print(json.dumps(done), flush=True)


async def talk(options: argparse.Namespace) -> None:
    """Run the clients."""
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    run = f"{time.time_ns():x}."
    clients = [
        Client(index, run, options.pause / 1000, options.seed)
        for index in range(options.connections)
    ]
    tasks = [
        asyncio.create_task(client.run(options.host, options.port, ending)) for client in clients
    ]
    await ending.wait()
    _, late = await asyncio.wait(tasks, timeout=PATIENCE)
    for task in late:
        task.cancel()
    end = {
        "event": "end",
        "waiting": [[client.index, *client.waiting] for client in clients if client.waiting],
        "broken": {client.index: client.broken for client in clients if client.broken},
    }
    print(json.dumps(end), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="registers", description="Ask the guest's registers.")
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--pause", type=float, default=60.0, metavar="MS", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    asyncio.run(talk(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
