# SPDX-License-Identifier: Apache-2.0
"""Questions between hosts, and their answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from checkpoint.errors import CheckpointError, ProtocolError
from checkpoint.lifeline import MAX_ANSWERING, Lifeline, Owner
from checkpoint.link import LinkError, PeerClosed, PeerRefused, PeerSilent
from checkpoint.wire import FrameType
from tests.unit.patience import PATIENCE
from tests.unit.session_ends import links

GUEST = "11111111-2222-3333-4444-555555555555"


class Host:
    """Answers from a table; stands down unless it runs the guest."""

    def __init__(self) -> None:
        self.known: dict[str, Owner] = {}
        self.heard: list[tuple[str, int]] = []
        self.stood_down: list[tuple[str, int]] = []
        self.spoke = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: CheckpointError | None = None

    async def owner(self, guest: str, generation: int) -> Owner:
        await self.gate.wait()
        if self.failure:
            raise self.failure
        return self.known.get(guest, Owner(guest, generation, "none"))

    async def stand_down(self, guest: str, generation: int) -> Owner | None:
        owner = self.known.get(guest)
        if owner is not None and owner.state in ("running", "reviving"):
            return owner
        self.stood_down.append((guest, generation))
        return None

    async def alive(self, guest: str, generation: int) -> None:
        self.heard.append((guest, generation))
        self.spoke.set()


@asynccontextmanager
async def lifelines() -> AsyncIterator[tuple[Lifeline, Lifeline, Host, Host]]:
    async with asyncio.timeout(PATIENCE), links(role="liveness") as (near, far):
        hosts = Host(), Host()
        ends = Lifeline(near, hosts[0]), Lifeline(far, hosts[1])
        tasks = [asyncio.create_task(end.run()) for end in ends]
        try:
            yield (*ends, *hosts)
        finally:
            await ends[0].close()
            await asyncio.gather(*tasks)


def run(scenario: Callable[[Lifeline, Lifeline, Host, Host], Awaitable[None]]) -> None:
    async def body() -> None:
        async with lifelines() as ends:
            await scenario(*ends)

    asyncio.run(body(), debug=True)


def test_both_ends_ask_and_answer() -> None:
    async def scenario(near: Lifeline, far: Lifeline, a: Host, b: Host) -> None:
        a.known[GUEST] = Owner(GUEST, 3, "primary")
        b.known[GUEST] = Owner(GUEST, 3, "standby")
        assert await near.inquire(GUEST, 3) == Owner(GUEST, 3, "standby")
        assert await far.inquire(GUEST, 3) == Owner(GUEST, 3, "primary")
        assert await near.inquire("other", 1) == Owner("other", 1, "none")

    run(scenario)


def test_a_standby_stands_down() -> None:
    async def scenario(near: Lifeline, far: Lifeline, a: Host, b: Host) -> None:
        b.known[GUEST] = Owner(GUEST, 3, "standby")
        assert await near.stand_down(GUEST, 3) is None
        assert b.stood_down == [(GUEST, 3)]

    run(scenario)


def test_a_standby_that_runs_the_guest_says_so() -> None:
    async def scenario(near: Lifeline, far: Lifeline, a: Host, b: Host) -> None:
        b.known[GUEST] = Owner(GUEST, 4, "running")
        assert await near.stand_down(GUEST, 3) == Owner(GUEST, 4, "running")
        assert b.stood_down == []

    run(scenario)


def test_the_word_of_a_living_primary_arrives() -> None:
    async def scenario(near: Lifeline, far: Lifeline, a: Host, b: Host) -> None:
        await near.alive(GUEST, 3)
        await b.spoke.wait()
        assert b.heard == [(GUEST, 3)]

    run(scenario)


def test_answers_may_come_in_any_order() -> None:
    async def scenario(near: Lifeline, far: Lifeline, a: Host, b: Host) -> None:
        b.gate.clear()
        slow = asyncio.create_task(near.inquire(GUEST, 1, timeout=PATIENCE))
        await asyncio.sleep(0)
        assert await near.stand_down("other", 2) is None
        assert not slow.done()
        b.gate.set()
        assert (await slow).state == "none"

    run(scenario)


def test_no_answer_in_time_is_an_error_and_the_late_one_is_nobodys() -> None:
    async def scenario(near: Lifeline, far: Lifeline, a: Host, b: Host) -> None:
        b.gate.clear()
        with pytest.raises(LinkError, match=r"did not answer INQUIRE within 0\.1 s"):
            await near.inquire(GUEST, 1, timeout=0.1)
        b.gate.set()
        assert (await near.inquire("other", 5)).guest == "other"

    run(scenario)


def test_the_end_of_the_connection_ends_every_question() -> None:
    async def scenario(near: Lifeline, far: Lifeline, a: Host, b: Host) -> None:
        b.gate.clear()
        asking = [asyncio.create_task(near.inquire(GUEST, 1, timeout=PATIENCE)) for _ in range(3)]
        await asyncio.sleep(0.05)
        await far.close()
        for question in asking:
            with pytest.raises(PeerClosed):
                await question
        with pytest.raises(PeerClosed):
            await near.alive(GUEST, 1)

    run(scenario)


def test_a_question_on_a_silent_connection_ends_with_it() -> None:
    async def scenario(near: Lifeline, far: Lifeline, a: Host, b: Host) -> None:
        b.gate.clear()
        asking = asyncio.create_task(near.inquire(GUEST, 1, timeout=PATIENCE))
        await asyncio.sleep(0.05)
        near.link.end(PeerSilent("gone"))
        with pytest.raises(PeerSilent, match="gone"):
            await asking

    run(scenario)


def test_a_host_that_cannot_answer_says_why() -> None:
    async def scenario(near: Lifeline, far: Lifeline, a: Host, b: Host) -> None:
        b.failure = CheckpointError("the state file cannot be read")
        with pytest.raises(PeerRefused, match="state file"):
            await near.inquire(GUEST, 1)

    run(scenario)


@pytest.mark.parametrize(
    ("frame_type", "value"),
    [
        (FrameType.INQUIRE, {"id": 1, "guest": GUEST}),
        (FrameType.INQUIRE, {"guest": GUEST, "generation": 1}),
        (FrameType.STAND_DOWN, {"id": -1, "guest": GUEST, "generation": 1}),
        (FrameType.ALIVE, {"guest": 5, "generation": 1}),
        (FrameType.OWNER, {"guest": GUEST}),
        (FrameType.STOP, {"reason": "x"}),
        (FrameType.HELLO_ACK, {}),
    ],
)
def test_a_breach_ends_the_connection(frame_type: FrameType, value: dict[str, object]) -> None:
    async def scenario(near: Lifeline, far: Lifeline, a: Host, b: Host) -> None:
        await near.link.send(frame_type, value)
        failure = await near.link.wait_closed()
        assert isinstance(failure, PeerRefused)
        assert failure.code == "protocol"
        assert isinstance(await far.link.wait_closed(), ProtocolError)

    run(scenario)


@pytest.mark.parametrize(
    "lie",
    [
        {"guest": "other"},
        {"state": "sleeping"},
        {"generation": "three"},
    ],
)
def test_a_wrong_answer_is_none(lie: dict[str, object]) -> None:
    async def body() -> None:
        async with asyncio.timeout(PATIENCE), links(role="liveness") as (near, far):
            end = Lifeline(near, Host())
            serving = asyncio.create_task(end.run())
            asking = asyncio.create_task(end.inquire(GUEST, 1, timeout=PATIENCE))
            await far.receive()
            answer = {"id": 1, "guest": GUEST, "generation": 1, "state": "none"}
            await far.send(FrameType.OWNER, answer | lie)
            with pytest.raises(ProtocolError):
                await asking
            await end.close()
            await serving

    asyncio.run(body(), debug=True)


def test_questions_beyond_the_limit_end_the_connection() -> None:
    async def scenario(near: Lifeline, far: Lifeline, a: Host, b: Host) -> None:
        b.gate.clear()
        for number in range(MAX_ANSWERING + 1):
            near.link.put(
                FrameType.INQUIRE,
                b'{"id":%d,"guest":"g","generation":1}' % number,
            )
        await near.link.flush()
        assert isinstance(await near.link.wait_closed(), PeerRefused)

    run(scenario)
