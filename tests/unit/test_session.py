# SPDX-License-Identifier: Apache-2.0
"""Sender and receiver: each step of the protocol, and each way in which it can break."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from checkpoint.codec import Coded
from checkpoint.errors import CheckpointError, ProtocolError
from checkpoint.link import LinkError, PeerClosed, PeerRefused, PeerSilent
from checkpoint.session import (
    ApplyError,
    Committed,
    Declined,
    Outcome,
    Runstate,
    StaleGeneration,
    StateError,
)
from checkpoint.wire import FrameType, Totals, encode_json
from tests.unit.session_ends import Guest, Pair, RecordingStandby, pair


@pytest.fixture(autouse=True, params=["at once", "waiting"])
def _waits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scenario where epochs are handled in the callback that receives them, and in a task."""
    monkeypatch.setattr(Guest, "waits", request.param == "waiting")
    monkeypatch.setattr(RecordingStandby, "waits", request.param == "waiting")


def run(scenario: Callable[[Pair, Guest], Awaitable[None]]) -> None:
    async def body() -> None:
        async with pair() as ends:
            await scenario(ends, Guest())

    asyncio.run(body(), debug=True)


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


# ---- A primary that breaks the protocol ----


async def put_epoch(
    ends: Pair, guest: Guest, *, epoch: int = 1, states: int = 1, pages_last: bool = False
) -> None:
    link, totals = ends.sender.link, Totals()
    (batch,) = guest.encoder.encode(guest.staging(guest.write()))
    for _ in range(states):
        state = guest.encoder.encode_state(b"s")
        crc = link.put(FrameType.STATE, state.payload, flags=state.flags, epoch=epoch)
        totals.add(len(state.payload), crc)
    if pages_last or not states:
        crc = link.put(FrameType.PAGES, batch.payload, flags=batch.flags, epoch=epoch)
        totals.add(len(batch.payload), crc, batch.pages)
    link.put(FrameType.COMMIT, totals.pack(0), epoch=epoch)
    await link.flush()


async def put_duplicates(ends: Pair, guest: Guest) -> None:
    """More pages in one epoch than the guest has."""
    for _ in range(guest.pages // 10 + 1):
        (batch,) = guest.encoder.encode(guest.staging(guest.write()))
        ends.sender.link.put(FrameType.PAGES, batch.payload, flags=batch.flags, epoch=1)
    await ends.sender.link.flush()


def put(frame_type: FrameType, payload: bytes, epoch: int = 0) -> Callable[..., Awaitable[None]]:
    async def breach(ends: Pair, guest: Guest) -> None:
        ends.sender.link.put(frame_type, payload, epoch=epoch)
        await ends.sender.link.flush()

    return breach


HANDOVER_2 = encode_json({"generation": 2})
BREACHES: dict[str, tuple[Callable[..., Awaitable[None]], str]] = {
    "an epoch left out": (lambda e, g: put_epoch(e, g, epoch=2), "epoch 2 came, expected epoch 1"),
    "epoch 0 again": (lambda e, g: put_epoch(e, g, epoch=0), "expected epoch 1"),
    "two states": (lambda e, g: put_epoch(e, g, states=2), "STATE of epoch 1 came twice"),
    "no state": (lambda e, g: put_epoch(e, g, states=0), "without its STATE"),
    "pages after state": (lambda e, g: put_epoch(e, g, pages_last=True), "after its STATE"),
    "too many pages": (put_duplicates, "more pages than the guest"),
    "commit of nothing": (put(FrameType.COMMIT, bytes(32), 1), "COMMIT came while protecting"),
    "prepare again": (put(FrameType.PREPARE, b"{}"), "PREPARE came while protecting"),
    "base handed over": (put(FrameType.HANDOVER, HANDOVER_2, 0), "HANDOVER of epoch 0"),
    "nothing handed over": (put(FrameType.HANDOVER, b"{}", 1), "no integer 'generation'"),
    "a batch of noise": (put(FrameType.PAGES, b"noise" * 5, 1), "batch of"),
    "a state of noise": (put(FrameType.STATE, b"noise" * 5, 1), "machine state"),
    "an answer": (put(FrameType.ACK, b"", 1), "ACK came, which is not expected now"),
    "an enquiry": (put(FrameType.INQUIRE, b"{}"), "INQUIRE came on a replicate connection"),
    "hello again": (put(FrameType.HELLO, b"{}"), "HELLO came, which is not expected now"),
}


@pytest.mark.parametrize(("breach", "message"), BREACHES.values(), ids=BREACHES.keys())
def test_a_breach_is_told_and_ends_the_session(
    breach: Callable[..., Awaitable[None]], message: str
) -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        before = bytes(ends.standby.shell.memory)
        await breach(ends, guest)
        failure = await ends.sender.link.wait_closed()
        assert isinstance(failure, PeerRefused)
        assert failure.code == "protocol"
        assert message in str(failure)
        ended = await ends.ended()
        assert isinstance(ended, ProtocolError)
        assert str(ended) == str(failure)
        assert ends.receiver.stood_down
        assert ends.standby.shell.memory == before
        assert ends.receiver.committed is not None
        assert ends.receiver.committed.epoch == 0

    run(scenario)


def test_a_wrong_total_is_no_epoch() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        state = guest.encoder.encode_state(b"s")
        ends.sender.link.put(FrameType.STATE, state.payload, epoch=1)
        ends.sender.link.put(FrameType.COMMIT, Totals(frames=1).pack(0), epoch=1)
        await ends.sender.link.flush()
        assert isinstance(await ends.ended(), ProtocolError)
        assert [name for name, _ in ends.standby.calls] == ["prepare", "committed"]

    run(scenario)


@pytest.mark.parametrize(
    "change",
    [
        {"pages": 0},
        {"pages": 2**41},
        {"vcpus": 0},
        {"name": 5},
        {"detail": []},
        {"domid": -1},
    ],
)
def test_a_description_that_makes_no_sense_is_refused(change: dict[str, object]) -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        described: dict[str, object] = {
            "name": "web",
            "uuid": "u",
            "domid": 1,
            "vcpus": 1,
            "pages": 5,
            "driver": "bytes",
            "detail": {},
        }
        request = {"guest": described | change, "generation": 1, "options": {}}
        await ends.sender.link.send(FrameType.PREPARE, request)
        failure = await ends.sender.link.wait_closed()
        assert isinstance(failure, PeerRefused)
        assert failure.code == "protocol"
        assert ends.standby.calls == []

    run(scenario)


# ---- A standby that breaks the protocol ----


@pytest.mark.parametrize(
    ("answer", "epoch"), [(FrameType.ACK, 2), (FrameType.ACK, 0), (FrameType.STOPPED, 0)]
)
def test_a_wrong_acknowledgement_is_none(answer: FrameType, epoch: int) -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)

        async def lie(committed: Committed) -> None:
            payload = b"" if answer is FrameType.ACK else b"{}"
            ends.receiver.link.put(answer, payload, epoch=epoch)
            await ends.receiver.link.flush()
            await ends.receiver.link.wait_closed()

        ends.standby.committed = lie  # type: ignore[method-assign]
        with pytest.raises(ProtocolError, match="expected ACK of epoch 1"):
            await guest.checkpoint(ends.sender)
        assert ends.sender.acked == 0
        assert ends.sender.runstate is Runstate.CLOSED

    run(scenario)
