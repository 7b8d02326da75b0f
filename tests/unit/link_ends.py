# SPDX-License-Identifier: Apache-2.0
"""Ends of a connection that speak byte by byte, beside a real one; for tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from checkpoint.link import Link, LinkOptions
from checkpoint.network import listen
from checkpoint.wire import FrameType, Parser, encode_frame, encode_json
from tests.unit.patience import PATIENCE
from tests.unit.session_ends import hello

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def body() -> None:
        async with asyncio.timeout(PATIENCE):
            await scenario()

    asyncio.run(body(), debug=True)


def frame(frame_type: FrameType, value: dict[str, Any] | None = None, epoch: int = 0) -> bytes:
    payload = b"" if value is None else encode_json(value)
    return b"".join(encode_frame(frame_type, payload, epoch=epoch)[0])


HELLO = hello("raw").pack() | {"versions": [1]}
HELLO_ACK = hello("raw").pack() | {"version": 1}


@asynccontextmanager
async def raw_server(talk: Callable[[Streams], Awaitable[None]]) -> AsyncIterator[int]:
    """A server that speaks as ``talk`` does; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk((reader, writer))
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@asynccontextmanager
async def raw_client() -> AsyncIterator[tuple[Streams, asyncio.Future[Link]]]:
    """A plain connection to a listener; the link, once it was greeted."""
    greeted: asyncio.Future[Link] = asyncio.get_running_loop().create_future()

    async def accepted(link: Link) -> None:
        greeted.set_result(link)
        await link.wait_closed()

    options = LinkOptions(connect_timeout=1.0)
    listener = await listen([("127.0.0.1", 0)], hello("b"), accepted, options)
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.ports[0])
    try:
        yield (reader, writer), greeted
    finally:
        writer.close()
        await listener.close()


async def answer(streams: Streams) -> dict[str, Any]:
    """The next frame of the other end other than a heartbeat, as JSON with its type."""
    reader, _ = streams
    parser = Parser()
    while True:
        data = await reader.read(1)
        if not data:
            return {"type": "end"}
        for found in parser.feed(data):
            if found.type is not FrameType.HEARTBEAT:
                return {"type": found.type.name, **json.loads(bytes(found.payload))}
