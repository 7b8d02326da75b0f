# SPDX-License-Identifier: Apache-2.0
"""A large epoch's pages, coded in a thread while those that are coded already are being sent."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self

from checkpoint.codec import Coded, Encoder
from checkpoint.driver import Staging
from kemari.host import in_thread


class Coding:
    """Iterates over an epoch's batches as they come; to be entered, and left before staging is used
    again: then no thread is at it any more.

    :ivar pages: of which the standby does not have the contents yet, so far
    :ivar ns: how long the coding took, nanoseconds; 0 until its end
    """

    def __init__(self, encoder: Encoder, staging: Staging) -> None:
        self.pages = 0
        self.ns = 0
        self._encoder = encoder
        self._staging = staging
        self._loop = asyncio.get_running_loop()
        self._coded: asyncio.Queue[Coded | None] = asyncio.Queue()
        self._given_up = False

    async def __aenter__(self) -> Self:
        self._work = asyncio.create_task(in_thread(self._code))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._given_up = error is not None
        try:
            await asyncio.wait({self._work})
        except asyncio.CancelledError:
            await asyncio.wait({self._work})
            raise
        finally:
            if self._given_up and not self._work.cancelled():
                self._work.exception()  # nobody waits for it; the first error counts

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Coded:
        """:raise Exception: what the coding raised, after what was coded before it"""
        batch = await self._coded.get()
        if batch is None:
            await self._work
            raise StopAsyncIteration
        return batch

    def _code(self) -> None:
        began = time.monotonic_ns()
        try:
            for batch in self._encoder.encode(self._staging):
                self.pages += batch.pages
                self._loop.call_soon_threadsafe(self._coded.put_nowait, batch)
                if self._given_up:
                    return
        finally:
            self.ns = time.monotonic_ns() - began
            self._loop.call_soon_threadsafe(self._coded.put_nowait, None)
