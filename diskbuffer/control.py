# SPDX-License-Identifier: Apache-2.0
"""A connection to the control socket of a disk's server: lines asked, answered, and news."""

from __future__ import annotations

import asyncio
from collections import deque
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
        # Oldest first.  A command whose caller was cancelled is answered as well.
        self._asked: deque[asyncio.Future[str | None]] = deque()
        self._turn = asyncio.Lock()
        self._closing = self._ended = False
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
                elif self._asked:
                    _settle(self._asked.popleft(), line.rstrip("\n"))
                else:
                    break  # an answer to nothing: none that follows could be told apart
        except (OSError, ValueError):
            pass  # as good as the end of the connection, which is told below
        self._end()
        if not self._closing:
            self._news("closed")

    def _end(self) -> None:
        self._ended = True
        while self._asked:
            _settle(self._asked.popleft(), None)

    async def ask(self, command: str) -> list[int]:
        """Send a command; the numbers of its answer.

        Whoever is cancelled here may have sent it: the server carries it out all the same, before
        all that is asked later.

        :raise ServerError: with the server's sentence, or because it is gone
        """
        async with self._turn:
            if self._ended:
                raise ServerError("The disk's server is gone")
            asked: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
            self._asked.append(asked)
            try:
                self._writer.write(f"{command}\n".encode())
                await self._writer.drain()
                async with asyncio.timeout(ANSWER_SECONDS):
                    answer = await asked
            except TimeoutError:
                await self.close()
                raise ServerError(
                    f"The disk's server did not answer within {ANSWER_SECONDS:g} s"
                ) from None
            except OSError as error:
                raise ServerError(f"The disk's server is gone: {error.strerror}") from None
        if answer is None:
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
        self._end()


def _settle(asked: asyncio.Future[str | None], answer: str | None) -> None:
    if not asked.done():
        asked.set_result(answer)
