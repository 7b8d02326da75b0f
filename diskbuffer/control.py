# SPDX-License-Identifier: Apache-2.0
"""A connection to the control socket of a disk's server: lines asked, answered, and news."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from diskbuffer.errors import ServerError, ServerGone
from diskbuffer.status import Flag

ANSWER_SECONDS = 60.0
"""An answer may wait for the disk, e.g. for a flush of the bitmap."""

_LINE = 4096
_VERSION = 1
"""Of the table of commands, see docs/disk.md."""


class Control:
    """See the module's text; use :meth:`connect`.

    :param news: called with each line that was not asked for, without its ``!``; and with
        ``closed`` when the server has gone
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        news: Callable[[str], None],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._news = news
        self._answers: asyncio.Queue[str | None] = asyncio.Queue()
        self._turn = asyncio.Lock()
        self._closing = False
        self._listener = asyncio.create_task(self._listen())

    @classmethod
    async def connect(cls, path: Path, news: Callable[[str], None]) -> Control:
        """Connect to the server whose control socket is ``path``.

        :raise ServerGone: nobody listens there
        """
        try:
            reader, writer = await asyncio.open_unix_connection(path, limit=_LINE)
        except OSError as error:
            raise ServerGone(
                f"No disk server answers at {path}: {error.strerror}; expected the one that "
                "block-kemari starts"
            ) from None
        return cls(reader, writer, news)

    async def _listen(self) -> None:
        try:
            while line := (await self._reader.readline()).decode(errors="replace"):
                if line.startswith("!"):
                    self._news(line[1:].rstrip("\n"))
                else:
                    self._answers.put_nowait(line.rstrip("\n"))
        except (OSError, ValueError):
            pass  # as good as the end of the connection, which is told below
        self._answers.put_nowait(None)
        if not self._closing:
            self._news("closed")

    async def ask(self, command: str) -> list[int]:
        """Send a command; the numbers of its answer.

        :raise ServerError: with the server's sentence, or because it is gone
        """
        async with self._turn:
            try:
                self._writer.write(f"{command}\n".encode())
                await self._writer.drain()
                async with asyncio.timeout(ANSWER_SECONDS):
                    answer = await self._answers.get()
            except TimeoutError:
                await self.close()
                raise ServerError(
                    f"The disk's server did not answer within {ANSWER_SECONDS:g} s"
                ) from None
            except OSError as error:
                raise ServerError(f"The disk's server is gone: {error.strerror}") from None
        if answer is None:
            self._answers.put_nowait(None)
            raise ServerError("The disk's server is gone")
        word, _, rest = answer.partition(" ")
        if word != "ok":
            raise ServerError(f"The disk's server refused {command.split()[0]!r}: {rest}")
        return [int(number) for number in rest.split()]

    async def hello(self) -> tuple[int, Flag]:
        """Size of the disk, bytes, and facts about it.

        :raise ServerError: it is gone, or of another version
        """
        version, size, flags = await self.ask("hello")
        if version != _VERSION:
            raise ServerError(f"The disk's server speaks version {version}, expected {_VERSION}")
        return size, Flag(flags)

    async def close(self) -> None:
        """Close the connection (idempotent)."""
        self._closing = True
        self._writer.close()
        if self._listener is not asyncio.current_task():
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
