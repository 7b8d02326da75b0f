# SPDX-License-Identifier: Apache-2.0
"""Sender and receiver, when the other end breaks the protocol."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from checkpoint.errors import ProtocolError
from checkpoint.link import PeerRefused
from checkpoint.session import Committed, Runstate
from checkpoint.wire import FrameType, Totals, encode_json
from tests.unit.session_ends import Guest, Pair, run, set_waits


@pytest.fixture(autouse=True, params=["at once", "waiting"])
def _waits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scenario where epochs are handled in the callback that receives them, and in a task."""
    set_waits(monkeypatch, request.param == "waiting")


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
