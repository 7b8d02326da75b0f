# SPDX-License-Identifier: Apache-2.0
"""Connections: heartbeats, what silence says, and frames that are handled where they arrive."""

from __future__ import annotations

import asyncio
import errno
import time

import pytest

from checkpoint.errors import CheckpointError
from checkpoint.link import link_error
from checkpoint.wire import Frame, FrameType
from tests.unit.link_ends import HELLO, frame, raw_client, run
from tests.unit.session_ends import links


def stand_still(seconds: float) -> None:
    """Hold up the whole process, as a host does that was not scheduled."""
    time.sleep(seconds)


def test_heartbeats_keep_silence_away_and_silence_is_noticed() -> None:
    async def scenario() -> None:
        async with raw_client() as (streams, greeted):
            streams[1].write(frame(FrameType.HELLO, HELLO))
            link = await greeted
            waiting = asyncio.create_task(link.wait_silent(1.0))
            for _ in range(8):
                await asyncio.sleep(0.25)
                streams[1].write(frame(FrameType.HEARTBEAT))
            last = time.monotonic()
            assert not waiting.done()
            silence = await waiting
            assert silence >= 1.0
            assert time.monotonic() - last >= 0.95
            assert not link.closed

    run(scenario)


def test_any_byte_is_a_sign_of_life() -> None:
    async def scenario() -> None:
        async with raw_client() as (streams, greeted):
            streams[1].write(frame(FrameType.HELLO, HELLO))
            link = await greeted
            waiting = asyncio.create_task(link.wait_silent(1.0))
            for byte in frame(FrameType.STOP, {"reason": "slow"})[:8]:
                await asyncio.sleep(0.25)
                streams[1].write(bytes([byte]))
            assert not waiting.done()
            waiting.cancel()

    run(scenario)


def test_both_ends_beat_while_they_have_nothing_to_say() -> None:
    async def scenario() -> None:
        async with links(heartbeat=0.5) as (near, far):
            heard = near.last_heard, far.last_heard
            await asyncio.sleep(1)
            assert near.last_heard > heard[0] + 0.5
            assert far.last_heard > heard[1] + 0.5

    run(scenario)


def test_diverted_frames_are_handled_where_they_arrive_and_others_are_received() -> None:
    async def scenario() -> None:
        async with links() as (near, far):
            taken: list[int] = []

            def take(each: Frame) -> bool:
                taken.append(each.epoch)
                return each.epoch != 2

            far.divert(take)
            for epoch in (1, 2, 3):
                near.put(FrameType.COMMIT, bytes(32), epoch=epoch)
            near.push()
            assert (await far.receive()).epoch == 2
            # One that came while that waited is not handled before it.
            assert (await far.receive()).epoch == 3
            near.put(FrameType.COMMIT, bytes(32), epoch=4)
            far.divert(None)
            near.push()
            assert (await far.receive()).epoch == 4
            assert taken == [1, 2]

    run(scenario)


def test_what_a_handler_raises_is_received_and_nothing_after_it() -> None:
    async def scenario() -> None:
        async with links() as (near, far):
            taken: list[int] = []

            def fail(each: Frame) -> bool:
                taken.append(each.epoch)
                raise CheckpointError("disk full")

            far.divert(fail)
            for epoch in (1, 2):
                near.put(FrameType.COMMIT, bytes(32), epoch=epoch)
            near.push()
            for _ in range(2):
                with pytest.raises(CheckpointError, match="disk full"):
                    await far.receive()
            assert taken == [1]

    run(scenario)


def test_an_ended_connection_is_not_silent() -> None:
    async def scenario() -> None:
        async with links() as (near, far):
            await far.close()
            await near.wait_closed()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(near.wait_silent(0.05), 0.4)

    run(scenario)


def test_a_connection_that_the_kernel_gave_up_is_silent() -> None:
    async def scenario() -> None:
        async with links() as (near, _):
            near.end(link_error(OSError(errno.ETIMEDOUT, "timed out"), near.peer_address))
            assert await near.wait_silent(0.05) >= 0.05

    run(scenario)


def test_a_stalled_process_does_not_take_its_peer_for_dead() -> None:
    async def body() -> None:
        async with links(heartbeat=0.4) as (near, _):
            waiting = asyncio.create_task(near.wait_silent(0.4))
            await asyncio.sleep(0.05)
            # Nobody runs: neither this end nor, in the same loop, the beating peer.
            stand_still(1)
            await asyncio.sleep(0.3)
            assert not waiting.done()
            waiting.cancel()

    asyncio.run(body())
