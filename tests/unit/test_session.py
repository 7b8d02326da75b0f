# SPDX-License-Identifier: Apache-2.0
"""Sender and receiver: each step of the protocol, and each way in which it can break."""

from __future__ import annotations

import asyncio
import time

import pytest

from checkpoint.codec import Coded
from checkpoint.errors import CheckpointError
from checkpoint.link import LinkError, PeerClosed, PeerRefused, PeerSilent
from checkpoint.session import (
    ApplyError,
    Declined,
    Outcome,
    Runstate,
    StaleGeneration,
    StateError,
)
from checkpoint.wire import FrameType
from tests.unit.session_ends import Guest, Pair, pair, run, set_waits


@pytest.fixture(autouse=True, params=["at once", "waiting"])
def _waits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scenario where epochs are handled in the callback that receives them, and in a task."""
    set_waits(monkeypatch, request.param == "waiting")


# ---- In good order ----


def test_epochs_arrive_and_are_acknowledged() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        assert await guest.protect(ends.sender) == {"domid": 5}
        assert ends.sender.runstate is Runstate.PROTECTING
        assert ends.standby.shell.memory == guest.memory
        for epoch in range(1, 5):
            before = time.monotonic()
            sent = await guest.checkpoint(ends.sender)
            assert ends.sender.acked == epoch
            committed = ends.receiver.committed
            assert committed is not None
            assert committed == ends.standby.last
            assert (committed.epoch, committed.state) == (epoch, b"machine state %d" % epoch)
            assert committed.pages == 10
            assert sent.wire_bytes == committed.wire_bytes
            assert before - 0.01 <= committed.captured_at <= time.monotonic()
        await ends.sender.stop("done")
        assert await ends.ended() is Outcome.STOPPED
        assert ends.standby.shell.memory == guest.memory
        description, generation, options = ends.standby.calls[0][1]
        assert description == guest.description()
        assert (generation, options) == (1, {"answer": 42})
        names = [name for name, _ in ends.standby.calls]
        assert names == ["prepare", *["committed"] * 5, "stop"]

    run(scenario)


def test_the_age_of_an_epoch_travels() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        captured = time.monotonic_ns() - 5 * 10**9
        state = guest.encoder.encode_state(b"old")
        await ends.sender.send_epoch(1, [], state, captured)
        assert ends.standby.last is not None
        assert 0 <= ends.standby.last.captured_at - captured / 1e9 < 1

    run(scenario)


def test_an_epoch_without_pages_is_one() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        await ends.sender.send_epoch(
            1, [], guest.encoder.encode_state(b"idle"), time.monotonic_ns()
        )
        assert ends.standby.last is not None
        assert (ends.standby.last.pages, ends.standby.last.state) == (0, b"idle")

    run(scenario)


def test_a_handover_gives_the_guest_away() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        await guest.checkpoint(ends.sender)
        assert await ends.sender.handover(2) == {"took_ms": 12}
        assert ends.sender.runstate is Runstate.CLOSED
        assert await ends.ended() is Outcome.HANDED_OVER
        assert ends.standby.calls[-1] == ("handover", (2, 1))
        assert not ends.receiver.stood_down

    run(scenario)


def test_a_declined_handover_gives_the_guest_back() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        await guest.checkpoint(ends.sender)
        ends.standby.failures["handover"] = CheckpointError("no memory left")
        with pytest.raises(Declined, match="no memory left"):
            await ends.sender.handover(2)
        assert await ends.ended() is Outcome.DECLINED
        assert ends.receiver.stood_down

    run(scenario)


@pytest.mark.parametrize("when", ["greeted", "base", "protecting"])
def test_stop_ends_the_protection(when: str) -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        if when == "base":
            await ends.sender.prepare(guest.description(), 1)
        elif when == "protecting":
            await guest.protect(ends.sender)
        await ends.sender.stop("asked for")
        assert ends.standby.calls[-1] == ("stop", "asked for")
        assert await ends.ended() is Outcome.STOPPED
        assert ends.receiver.stood_down
        assert ends.receiver.runstate is Runstate.CLOSED

    run(scenario)


def test_stop_in_the_middle_of_an_epoch_drops_it() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        before = bytes(guest.memory)
        link = ends.sender.link
        (batch,) = guest.encoder.encode(guest.staging(guest.write()))
        link.put(FrameType.PAGES, batch.payload, flags=batch.flags, epoch=1)
        await link.send(FrameType.STOP, {"reason": "now"})
        frame = await link.receive()
        assert frame.type is FrameType.STOPPED
        await ends.sender.close()
        assert await ends.ended() is Outcome.STOPPED
        assert ends.standby.shell.memory == before

    run(scenario)


def test_heartbeats_go_on_while_the_shell_is_built() -> None:
    async def body() -> None:
        async with pair(heartbeat=0.5) as ends:
            guest = Guest()
            gate = ends.standby.gates["prepare"] = asyncio.Event()
            preparing = asyncio.create_task(ends.sender.prepare(guest.description(), 1))
            await asyncio.sleep(1.5)
            assert time.monotonic() - ends.sender.link.last_heard < 1
            assert ends.sender.runstate is Runstate.PREPARING
            gate.set()
            assert await preparing == {"domid": 5}

    asyncio.run(body())


# ---- Refusals ----


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("not enough memory"), "refused"),
        (StaleGeneration("generation 7 runs here"), "stale"),
    ],
)
def test_a_refused_shell_says_why(error: CheckpointError, code: str) -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        ends.standby.failures["prepare"] = error
        with pytest.raises(PeerRefused, match=f"^{error}$") as refused:
            await ends.sender.prepare(guest.description(), 1)
        assert refused.value.code == code
        assert await ends.ended() is error
        assert ends.receiver.stood_down

    run(scenario)


def test_a_standby_that_cannot_keep_an_epoch_does_not_acknowledge_it() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        await guest.checkpoint(ends.sender)
        before = bytes(guest.memory)
        ends.standby.failures["committed"] = CheckpointError("disk full")
        with pytest.raises(PeerRefused, match="disk full") as refused:
            await guest.checkpoint(ends.sender)
        assert refused.value.code == "internal"
        await ends.ended()
        assert ends.sender.acked == 1
        assert ends.receiver.committed is not None
        assert ends.receiver.committed.epoch == 1
        assert ends.standby.shell.memory == before
        assert ends.receiver.stood_down

    run(scenario)


def test_an_epoch_that_cannot_be_applied_ends_everything() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        ends.standby.shell.memory = ends.standby.shell.memory[:-4096]
        await guest.checkpoint(ends.sender)
        assert isinstance(await ends.ended(), ApplyError)
        assert ends.receiver.stood_down
        failure = await ends.sender.link.wait_closed()
        assert isinstance(failure, PeerRefused)

    run(scenario)


# ---- The connection ends ----


def test_a_primary_that_vanishes_between_epochs_leaves_the_last_one() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        await guest.checkpoint(ends.sender)
        await ends.sender.close()
        assert isinstance(await ends.ended(), PeerClosed)
        assert not ends.receiver.stood_down
        assert ends.receiver.committed is not None
        assert ends.receiver.committed.epoch == 1
        assert ends.standby.shell.memory == guest.memory

    run(scenario)


def test_a_primary_that_vanishes_within_an_epoch_leaves_the_one_before() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        await guest.checkpoint(ends.sender)
        before = bytes(guest.memory)
        link = ends.sender.link
        for batch in guest.encoder.encode(guest.staging(guest.write()), 3):
            link.put(FrameType.PAGES, batch.payload, flags=batch.flags, epoch=2)
        state = guest.encoder.encode_state(b"never committed")
        link.put(FrameType.STATE, state.payload, flags=state.flags, epoch=2)
        await link.flush()
        await ends.sender.close()
        assert isinstance(await ends.ended(), PeerClosed)
        assert ends.receiver.committed is not None
        assert ends.receiver.committed.epoch == 1
        assert ends.receiver.committed.state == b"machine state 1"
        assert ends.standby.shell.memory == before

    run(scenario)


def test_an_epoch_that_was_committed_is_applied_though_its_ack_is_lost() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        gate = ends.standby.gates["committed"] = asyncio.Event()
        ends.standby.entered.clear()
        entered = ends.standby.entered["committed"] = asyncio.Event()
        sending = asyncio.create_task(guest.checkpoint(ends.sender))
        await entered.wait()
        ends.receiver.link.end(PeerSilent("unplugged"))
        gate.set()
        assert isinstance(await ends.ended(), PeerSilent)
        with pytest.raises(LinkError):
            await sending
        assert ends.sender.acked == 0
        assert ends.receiver.committed is not None
        assert ends.receiver.committed.epoch == 1
        assert ends.standby.shell.memory == guest.memory

    run(scenario)


def test_halt_ends_the_session_where_it_is() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        await guest.checkpoint(ends.sender)
        await ends.receiver.halt()
        assert isinstance(await ends.ended(), PeerSilent)
        assert not ends.receiver.stood_down
        with pytest.raises(PeerClosed):
            await guest.checkpoint(ends.sender)
        assert ends.sender.runstate is Runstate.CLOSED

    run(scenario)


def test_a_lost_connection_during_handover_leaves_the_owner_unknown() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        await guest.checkpoint(ends.sender)
        gate = ends.standby.gates["handover"] = asyncio.Event()
        entered = ends.standby.entered["handover"] = asyncio.Event()
        handing = asyncio.create_task(ends.sender.handover(2))
        await entered.wait()
        ends.sender.link.end(PeerSilent("unplugged"))
        with pytest.raises(PeerSilent):
            await handing
        gate.set()
        # The standby owns the guest whether or not its answer gets through.
        assert await ends.ended() is Outcome.HANDED_OVER

    run(scenario)


def test_a_cancelled_epoch_closes_the_session() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        ends.standby.gates["committed"] = asyncio.Event()
        guest.waits = True  # type: ignore[misc]
        sending = asyncio.create_task(guest.checkpoint(ends.sender))
        await asyncio.sleep(0.05)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert ends.sender.runstate is Runstate.CLOSED
        ends.standby.gates["committed"].set()
        assert isinstance(await ends.ended(), PeerClosed)

    run(scenario)


# ---- Mistakes of the caller ----


def test_steps_out_of_order_are_refused_and_harm_nothing() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        sender = ends.sender
        state = Coded(0, bytes(8), 0)
        with pytest.raises(StateError, match="send_base while greeted, expected base"):
            await sender.send_base([])
        await guest.protect(sender)
        with pytest.raises(StateError, match="prepare while protecting"):
            await sender.prepare(guest.description(), 1)
        with pytest.raises(ValueError, match="epoch 2 after epoch 0"):
            await sender.send_epoch(2, [], state, 0)
        with pytest.raises(ValueError, match="no epoch"):
            await sender.handover(2)
        await guest.checkpoint(sender)
        await sender.stop("done")
        with pytest.raises(StateError, match="while closed"):
            await guest.checkpoint(sender)

    run(scenario)
