# SPDX-License-Identifier: Apache-2.0
"""Moments at which everything wakes that wakes steadily.

A process that beats on several connections, and watches several others, would be woken for each of
them at a moment of its own; in a slow Dom0 a turn of the event loop costs more than what is done in
it.  So all of one pace wakes at the multiples of that pace on the event loop's clock, in one turn.
"""

from __future__ import annotations

import asyncio
import math

#: The share of a pace by which a clock may be behind the moment for which it has woken somebody.
_EARLY = 1 / 64


def next_turn(now: float, pace: float) -> float:
    """The first multiple of ``pace`` that lies ahead; pure.

    :param now: seconds, on the event loop's clock (``time.monotonic()``)
    :param pace: seconds, more than 0
    :return: seconds on the same clock: more than ``now``, by little more than ``pace`` at most
    """
    return (math.floor(now / pace + _EARLY) + 1) * pace


async def sleep_until(when: float) -> None:
    """Sleep until ``when`` on the event loop's clock; whoever names the same moment wakes with it.

    Yields to the event loop also for a moment that is past.
    """
    loop = asyncio.get_running_loop()
    woken: asyncio.Future[None] = loop.create_future()
    handle = loop.call_at(when, _wake, woken)
    try:
        await woken
    finally:
        handle.cancel()


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
