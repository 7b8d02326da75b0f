# SPDX-License-Identifier: Apache-2.0
"""The daemon's end of a disk server's control socket: which answer is whose."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from diskbuffer.control import Control
from diskbuffer.errors import ServerError
from tests.unit.patience import PATIENCE


class Server:
    """Hears commands; says what it is told to."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[str] = asyncio.Queue()
        self.writer: asyncio.StreamWriter | None = None
        self.ended = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        while line := (await reader.readline()).decode():
            self.heard.put_nowait(line.strip())
        self.ended.set()

    def say(self, *lines: str) -> None:
        assert self.writer is not None
        self.writer.write("".join(f"{line}\n" for line in lines).encode())


def with_server(
    folder: Path, body: Callable[[Server, Control, list[str]], Awaitable[None]]
) -> None:
    async def bounded() -> None:
        server, news = Server(), list[str]()
        async with asyncio.timeout(PATIENCE):
            listener = await asyncio.start_unix_server(server.serve, folder / "control")
            control = await Control.connect(folder / "control", news.append)
            try:
                await body(server, control, news)
            finally:
                await control.close()
                listener.close()
                await server.ended.wait()

    asyncio.run(bounded())


def test_the_answer_to_a_cancelled_command_is_nobody_elses(tmp_path: Path) -> None:
    async def body(server: Server, control: Control, news: list[str]) -> None:
        issue = asyncio.create_task(control.ask("issue 1 4096 0"))
        assert await server.heard.get() == "issue 1 4096 0"
        waiting = asyncio.create_task(control.ask("never sent"))
        await asyncio.sleep(0)
        for task in (waiting, issue):
            task.cancel()
        await asyncio.wait([issue, waiting])
        halt = asyncio.create_task(control.ask("halt"))
        assert await server.heard.get() == "halt"
        server.say("!failing", "ok 1", "error a change is still on its way")
        with pytest.raises(ServerError, match="refused 'halt': a change is still on its way"):
            await halt
        drop = asyncio.create_task(control.ask("drop"))
        await server.heard.get()
        server.say("ok 3")
        assert await drop == [3]
        assert news == ["failing"]

    with_server(tmp_path, body)


def test_a_server_that_ends_answers_nobody_who_waits_or_comes_later(tmp_path: Path) -> None:
    async def body(server: Server, control: Control, news: list[str]) -> None:
        issue = asyncio.create_task(control.ask("issue 1 4096 0"))
        await server.heard.get()
        assert server.writer is not None
        server.writer.close()
        for asked in (issue, control.ask("halt")):
            with pytest.raises(ServerError, match="is gone"):
                await asked
        assert news == ["closed"]

    with_server(tmp_path, body)


def test_an_answer_to_nothing_ends_the_connection(tmp_path: Path) -> None:
    async def body(server: Server, control: Control, news: list[str]) -> None:
        hello = asyncio.create_task(control.ask("hello"))
        await server.heard.get()
        server.say("ok 1", "ok 2")
        assert await hello == [1]
        with pytest.raises(ServerError, match="is gone"):
            await control.ask("halt")
        assert news == ["closed"]

    with_server(tmp_path, body)
