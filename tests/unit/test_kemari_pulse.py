# SPDX-License-Identifier: Apache-2.0
"""Pulses: datagrams, the board, and the process beside the daemon, with real ones on loopback."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from kemari import pulse
from kemari.config import Address
from kemari.pacemaker import Orders, unpack
from kemari.pulses import Pulses

KEY = bytes(range(32))
HOST = uuid.UUID(int=7).bytes
PATIENCE = 60.0
#: Seconds; the pace is a fifth of it.
HEARTBEAT = 0.25


# ---- Section: datagrams ----


def ear(limit_ms: int = 1000) -> pulse.Ear:
    made = pulse.Ear(limit_ms)
    made.know({HOST: KEY})
    return made


def test_a_pulse_is_heard_once() -> None:
    hearing = ear()
    assert hearing.hear(pulse.pack(KEY, HOST, 1, 0)) == HOST
    assert hearing.hear(pulse.pack(KEY, HOST, 1, 0)) is None
    assert hearing.hear(pulse.pack(KEY, HOST, 3, 0)) == HOST
    assert hearing.hear(pulse.pack(KEY, HOST, 2, 0)) is None


def test_any_changed_byte_makes_it_worthless() -> None:
    hearing = ear()
    good = pulse.pack(KEY, HOST, 5, 10)
    for place in range(pulse.SIZE):
        bad = bytearray(good)
        bad[place] ^= 0x40
        assert hearing.hear(bytes(bad)) is None
    for wrong in (b"", good[:-1], good + b"\0", good * 2):
        assert hearing.hear(wrong) is None
    assert hearing.hear(good) == HOST


def test_strangers_are_not_believed() -> None:
    hearing = ear()
    assert hearing.hear(pulse.pack(bytes(32), HOST, 1, 0)) is None
    assert hearing.hear(pulse.pack(KEY, bytes(16), 1, 0)) is None
    hearing.know({})
    assert hearing.hear(pulse.pack(KEY, HOST, 1, 0)) is None


def test_a_daemon_that_stands_still_gives_no_evidence() -> None:
    hearing = ear(limit_ms=1000)
    assert hearing.hear(pulse.pack(KEY, HOST, 1, 1000)) == HOST
    assert hearing.hear(pulse.pack(KEY, HOST, 2, 1001)) is None
    assert hearing.hear(pulse.pack(KEY, HOST, 3, 1 << 40)) is None
    assert hearing.hear(pulse.pack(KEY, HOST, 4, 0)) == HOST


def test_numbers_begin_anew_only_with_a_new_key() -> None:
    hearing = ear()
    assert hearing.hear(pulse.pack(KEY, HOST, 9, 0)) == HOST
    hearing.know({HOST: KEY, bytes(16): KEY})
    assert hearing.hear(pulse.pack(KEY, HOST, 9, 0)) is None
    hearing.know({HOST: bytes(32)})
    assert hearing.hear(pulse.pack(bytes(32), HOST, 1, 0)) == HOST


def test_the_board_tells_times() -> None:
    board = pulse.Board(memoryview(bytearray(pulse.Board.BYTES)))
    assert board.heard(0) == board.heard(pulse.SLOTS - 1) == 0.0
    before = time.monotonic()
    board.note(pulse.SLOTS - 1)
    assert before - 1e-6 <= board.heard(pulse.SLOTS - 1) <= time.monotonic()
    assert board.heard(pulse.SLOTS - 2) == 0.0
    board.clear(pulse.SLOTS - 1)
    assert board.heard(pulse.SLOTS - 1) == 0.0
    board.turn()
    assert 0 <= board.stood_ms < PATIENCE * 1000


def test_orders_survive_the_way() -> None:
    orders = Orders(
        host=HOST,
        key=KEY,
        pace=0.2,
        limit_ms=10_000,
        listen=(("127.0.0.1", 7799), ("::1", 7799)),
        targets=(("127.0.0.2", 7799),),
        keys={bytes(16): bytes(32)},
        slots={(bytes(16), "127.0.0.2"): 3},
    )
    assert orders.pack().count(b"\n") == 1
    assert unpack(orders.pack()) == orders


# ---- Section: two hosts ----


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        await asyncio.sleep(HEARTBEAT / 10)


class End:
    """One host of the two.

    :ivar said: sentences about its process
    """

    def __init__(self, port: int) -> None:
        self.host_id = str(uuid.uuid4())
        self.address = Address("127.0.0.1", port)
        self.said: list[str] = []
        self.pulses = Pulses(self.host_id, HEARTBEAT, [self.address], self.said.append)

    def meet(self, other: End) -> None:
        """As after a HELLO, with a protection between them."""
        self.pulses.learn(other.host_id, other.pulses.key)
        self.pulses.want(other.host_id, [other.address])

    def heard(self, other: End) -> float:
        """When this end last heard the other."""
        return self.pulses.evidence(other.host_id).get(other.address.host, 0.0)

    async def go_on_hearing(self, other: End, *, times: int = 2) -> None:
        """Wait for so many more pulses."""
        for _ in range(times):
            await self._hear_another(other, self.heard(other))

    async def _hear_another(self, other: End, before: float) -> None:
        await until(lambda: self.heard(other) > before, "another pulse")


async def both(stack: AsyncExitStack, port: int) -> tuple[End, End]:
    ends = End(port), End(port + 1)
    for end in ends:
        task = asyncio.create_task(end.pulses.run())

        async def finish(task: asyncio.Task[None] = task) -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        stack.push_async_callback(finish)
    ends[0].meet(ends[1])
    ends[1].meet(ends[0])
    return ends


def free_ports() -> int:
    """The first of two UDP ports that are free."""
    while True:
        with (
            socket.socket(type=socket.SOCK_DGRAM) as one,
            socket.socket(type=socket.SOCK_DGRAM) as two,
        ):
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def children() -> set[int]:
    """Processes of this one that keep pulses."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return {int(line.split()[0]) for line in listed if "kemari.pacemaker" in line}


def test_two_hosts_hear_each_other_also_after_a_process_was_killed() -> None:
    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            one, two = await both(stack, free_ports())
            await one.go_on_hearing(two)
            await two.go_on_hearing(one)
            pids = children()
            assert len(pids) == 2
            for pid in pids:
                os.kill(pid, signal.SIGTERM)  # it lives as long as its daemon
            await one.go_on_hearing(two)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            await until(lambda: one.said and two.said, "it is said that a process has ended")
            await one.go_on_hearing(two)
            await two.go_on_hearing(one)
            assert not children() & pids
        assert not children()

    asyncio.run(scenario())


async def silence(one: End, two: End) -> None:
    """Wait until nothing has been heard for as long as twenty pulses take."""
    await until(lambda: time.monotonic() - one.heard(two) > 4 * HEARTBEAT, "silence")


def test_pulses_end_and_begin_again_as_asked() -> None:
    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            one, two = await both(stack, free_ports())
            await one.go_on_hearing(two)
            two.pulses.unwant(one.host_id, [one.address])
            await silence(one, two)
            two.meet(one)
            await one.go_on_hearing(two)
            one.pulses.unwant(two.host_id, [two.address])
            assert one.pulses.evidence(two.host_id) == {}
            one.meet(two)
            await one.go_on_hearing(two)

    asyncio.run(scenario())


def test_a_daemon_that_stands_still_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kemari.pulses.STANDING_LEAST", 1.0)

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            one, two = await both(stack, free_ports())
            await one.go_on_hearing(two)
            with monkeypatch.context() as frozen:
                frozen.setattr(two.pulses._board, "turn", lambda: None)
                await silence(one, two)
            await one.go_on_hearing(two)

    asyncio.run(scenario())


def test_the_process_ends_with_its_orders() -> None:
    board = os.memfd_create("board")
    os.ftruncate(board, pulse.Board.BYTES)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kemari.pacemaker", str(board)],
            input=b"",
            pass_fds=[board],
            timeout=PATIENCE,
            check=False,
        )
    finally:
        os.close(board)
    assert done.returncode == 0


@pytest.mark.parametrize("host_id", ["", "not a UUID"])
def test_a_peer_without_a_proper_identity_sends_no_pulses(host_id: str) -> None:
    async def scenario() -> None:
        end = End(7799)
        end.pulses.learn(host_id, "00" * 32)
        end.pulses.want(host_id, [end.address])
        end.pulses.unwant(host_id, [end.address])
        assert end.pulses.evidence(host_id) == {}

    asyncio.run(scenario())
