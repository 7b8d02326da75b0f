# SPDX-License-Identifier: Apache-2.0
"""Pages are sent while others are being coded, and no thread is left behind."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator

import pytest

from checkpoint.codec import Coded, Decoder, Encoder
from checkpoint.driver import PAGE_SIZE, Staging
from kemari.coding import Coding
from tests.unit.patience import PATIENCE

PAGES = 1024


class Slow(Encoder):
    """Codes each batch but the first one only when it may."""

    def __init__(self) -> None:
        super().__init__(PAGES)
        self.waits, self.may_go_on = threading.Event(), threading.Event()
        self.coded = 0
        self.error: Exception | None = None

    def encode(self, staging: Staging, batch_pages: int = 256) -> Iterator[Coded]:
        for batch in super().encode(staging, batch_pages):
            self.coded += 1
            yield batch
            self.waits.set()
            assert self.may_go_on.wait(PATIENCE)
            if self.error is not None:
                raise self.error


@pytest.fixture
def staging() -> Staging:
    """Full of pages that do not compress."""
    made = Staging(PAGES)
    made.gfns[:] = type(made.gfns)("Q", range(PAGES))
    made.data[:] = os.urandom(PAGES * PAGE_SIZE)
    made.count = PAGES
    return made


async def taken(encoder: Encoder, staging: Staging, batches: list[Coded]) -> Coding:
    """All batches, as a sender takes them."""
    async with asyncio.timeout(PATIENCE), Coding(encoder, staging) as coding:
        async for batch in coding:
            batches.append(batch)
    return coding


def test_batches_come_while_others_are_being_coded_and_in_order(staging: Staging) -> None:
    encoder, decoder = Slow(), Decoder(PAGES)
    memory = memoryview(bytearray(PAGES * PAGE_SIZE))

    class First(list[Coded]):
        def append(self, batch: Coded) -> None:
            if not self:
                assert encoder.coded == 1, "the first one comes although the others are not coded"
                encoder.may_go_on.set()
            super().append(batch)

    batches = First()
    coding = asyncio.run(taken(encoder, staging, batches))
    for batch in batches:
        decoder.apply(decoder.verify(batch.flags, batch.payload), memory)
    assert memory == staging.data
    assert coding.pages == PAGES
    assert coding.ns > 0


def test_an_error_comes_after_what_was_coded(staging: Staging) -> None:
    encoder = Slow()
    encoder.error = MemoryError("no page for it")
    encoder.may_go_on.set()
    batches: list[Coded] = []
    with pytest.raises(MemoryError, match="no page"):
        asyncio.run(taken(encoder, staging, batches))
    assert len(batches) == 1


@pytest.mark.parametrize("error", [ConnectionError, asyncio.CancelledError])
def test_a_way_out_leads_past_the_threads_end(staging: Staging, error: type[BaseException]) -> None:
    encoder = Slow()

    async def send() -> None:
        async with asyncio.timeout(PATIENCE), Coding(encoder, staging) as coding:
            await anext(coding)
            # When it has noticed: not before this task waits for the thread.
            asyncio.get_running_loop().call_soon(encoder.may_go_on.set)
            raise error

    with pytest.raises(error):
        asyncio.run(send())
    assert encoder.coded <= 2, "what nobody sends need not be coded"


def test_a_task_that_is_cancelled_ends_after_the_thread(staging: Staging) -> None:
    encoder = Slow()

    async def cancel() -> None:
        task = asyncio.create_task(taken(encoder, staging, []))
        async with asyncio.timeout(PATIENCE):
            await asyncio.to_thread(encoder.waits.wait, PATIENCE)
            task.cancel()
            done, _ = await asyncio.wait({task}, timeout=0.05)
            assert not done, "the thread is still at it"
            encoder.may_go_on.set()
            await asyncio.wait({task})
        assert task.cancelled()

    asyncio.run(cancel())
    assert encoder.coded <= 2
