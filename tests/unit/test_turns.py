# SPDX-License-Identifier: Apache-2.0
"""Moments at which everything wakes that wakes steadily."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.turns import next_turn, sleep_until

NOW = st.floats(min_value=0, max_value=1e8)
PACE = st.floats(min_value=0.01, max_value=60)


@given(now=NOW, pace=PACE)
def test_the_next_turn_lies_ahead_but_not_far(now: float, pace: float) -> None:
    ahead = next_turn(now, pace) - now
    assert 0 < ahead <= pace * 1.02


@given(now=NOW, pace=PACE, early=st.floats(min_value=0, max_value=0.015))
def test_who_wakes_a_little_early_does_not_wake_twice(
    now: float, pace: float, early: float
) -> None:
    turn = next_turn(now, pace)
    assert next_turn(turn - early * pace, pace) - turn == pytest.approx(pace, rel=1e-3, abs=1e-6)


@given(now=NOW, pace=PACE, later=st.floats(min_value=0, max_value=0.9))
def test_whoever_asks_within_one_turn_wakes_together(now: float, pace: float, later: float) -> None:
    turn = next_turn(now, pace)
    other = now + later * (turn - now)
    if turn - other > pace / 32:
        assert next_turn(other, pace) == turn


def test_all_of_one_moment_wake_in_one_turn_of_the_loop() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        turns = 0

        def count() -> None:
            nonlocal turns
            turns += 1
            loop.call_soon(count)

        when = loop.time() + 0.05
        woken: list[int] = []

        async def sleeper() -> None:
            await sleep_until(when)
            woken.append(turns)

        sleepers = [asyncio.create_task(sleeper()) for _ in range(5)]
        count()
        await asyncio.gather(*sleepers)
        assert len(set(woken)) == 1
        assert loop.time() >= when

    asyncio.run(scenario())


def test_a_sleep_that_is_cancelled_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        sleeping = asyncio.create_task(sleep_until(loop.time() + 3600))
        await asyncio.sleep(0)
        sleeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleeping

    asyncio.run(scenario(), debug=True)


def test_a_moment_that_is_past_is_no_hindrance_to_others() -> None:
    async def scenario() -> None:
        done: list[str] = []

        async def other() -> None:
            done.append("other")

        task = asyncio.create_task(other())
        await sleep_until(0.0)
        assert done == ["other"]
        await task

    asyncio.run(scenario())
