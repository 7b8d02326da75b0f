# SPDX-License-Identifier: Apache-2.0
"""A client of the guest's database: writes that were acknowledged must be there ever after.

Run as a program of its own, with nothing but the standard library, at the client's place in the
lab's network.  Each connection appends 1, 2, 3 ... to a list of its own (``RPUSH``, which answers
with the list's length), and all of them count one number up (``INCR``), one request at a time.  A
connection is never opened again.

It prints one JSON object a line: ``connected``; for each answer ``done`` with connection, command,
times (this machine's CLOCK_MONOTONIC, seconds) and answer; at the end, which SIGTERM asks for,
``end`` with what was not answered and what the database holds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import time
from collections.abc import Sequence
from typing import Any, Final

HOST: Final = "10.77.0.10"
PORT: Final = 6379
#: Every so many appends the common number is counted up.
COUNTS: Final = 4
#: Seconds that the last answers may take.
PATIENCE: Final = 120.0
#: Seconds between two attempts to connect; a refusal is no event that could be awaited.
RETRY: Final = 0.2
TOTAL: Final = "total"


def list_of(connection: int) -> str:
    """Key of a connection's list."""
    return f"list:{connection}"


def encode(words: Sequence[str]) -> bytes:
    """A command as the database reads it (RESP, https://redis.io/docs/reference/protocol-spec)."""
    parts = [f"*{len(words)}\r\n".encode()]
    parts += [b"$%d\r\n%s\r\n" % (len(word.encode()), word.encode()) for word in words]
    return b"".join(parts)


class Refused(Exception):
    """The database answered with an error."""


async def read_reply(reader: asyncio.StreamReader) -> Any:
    """One answer: an integer, a string, a list of answers, or None.

    :raises Refused: it is an error
    :raises EOFError: the connection ended
    """
    line = await reader.readline()
    if not line.endswith(b"\r\n"):
        raise EOFError("the connection ended")
    kind, text = line[:1], line[1:-2].decode()
    match kind:
        case b":":
            return int(text)
        case b"+":
            return text
        case b"-":
            raise Refused(text)
        case b"$":
            if int(text) < 0:
                return None
            return (await reader.readexactly(int(text) + 2))[:-2].decode()
        case b"*":
            return [await read_reply(reader) for _ in range(int(text))]
    raise Refused(f"an answer that begins with {kind!r}")


class Writer:
    """One connection.

    :param pause: greatest pause between two writes, in seconds
    :ivar waiting: the command that is not answered yet, and when it was sent
    :ivar broken: why the connection ended, or ""
    """

    def __init__(self, index: int, pause: float) -> None:
        self.index = index
        self._pause = pause
        self._chance = random.Random(index)
        self.waiting: tuple[list[str], float] | None = None
        self.broken = ""

    async def run(self, ending: asyncio.Event) -> None:
        """Write until ``ending``."""
        reader, writer = await connect()
        print(json.dumps({"event": "connected", "connection": self.index}), flush=True)
        number = 0
        try:
            while not ending.is_set():
                number += 1
                await self._ask(reader, writer, ["RPUSH", list_of(self.index), str(number)])
                if number % COUNTS == 0:
                    await self._ask(reader, writer, ["INCR", TOTAL])
                await asyncio.sleep(self._pause * self._chance.random())
        except (OSError, EOFError, Refused) as error:
            self.broken = str(error)
        finally:
            writer.close()

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: list[str]
    ) -> None:
        sent = time.monotonic()
        self.waiting = command, sent
        writer.write(encode(command))
        reply = await read_reply(reader)
        self.waiting = None
        done = {
            "event": "done",
            "connection": self.index,
            "command": command,
            "sent": sent,
            "answered": time.monotonic(),
            "reply": reply,
        }
        print(json.dumps(done), flush=True)


async def connect(
    host: str = HOST, port: int = PORT
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect, once the database listens: it may still be starting.

    :raises OSError: it does not within :data:`PATIENCE`
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return await asyncio.open_connection(host, port)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(RETRY)


async def contents(connections: int) -> dict[str, Any]:
    """What the database holds."""
    reader, writer = await connect()
    try:
        lists = []
        for index in range(connections):
            writer.write(encode(["LRANGE", list_of(index), "0", "-1"]))
            lists.append([int(word) for word in await read_reply(reader)])
        writer.write(encode(["GET", TOTAL]))
        return {"lists": lists, "total": int(await read_reply(reader) or 0)}
    finally:
        writer.close()


async def talk(connections: int, pause: float) -> None:
    """Run the client."""
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    writers = [Writer(index, pause) for index in range(connections)]
    tasks = [asyncio.create_task(writer.run(ending)) for writer in writers]
    await ending.wait()
    _, late = await asyncio.wait(tasks, timeout=PATIENCE)
    for task in late:
        task.cancel()
    end = {
        "event": "end",
        "waiting": [[w.index, *w.waiting] for w in writers if w.waiting],
        "broken": {w.index: w.broken for w in writers if w.broken},
        "contents": await asyncio.wait_for(contents(connections), PATIENCE),
    }
    print(json.dumps(end), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="writer", description="Write to the guest's database.")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.0, metavar="MS", help="(%(default)s)")
    options = parser.parse_args(argv)
    asyncio.run(talk(options.connections, options.pause / 1000))


if __name__ == "__main__":
    main()
