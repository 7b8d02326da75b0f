# SPDX-License-Identifier: Apache-2.0
"""Disk writes in a session: WRITES with the epochs, APPLIED and ISSUED beside them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from checkpoint.errors import CheckpointError, ProtocolError
from checkpoint.link import PeerRefused
from checkpoint.sender import Writes
from checkpoint.session import Committed, Outcome, StateError
from checkpoint.wire import FrameType, pack_applied, pack_issued, pack_writes
from tests.unit.patience import PATIENCE
from tests.unit.session_ends import Guest, Pair, pair

RECORDS = bytes(range(32))
LARGE = bytes(3 << 20)


def run(scenario: Callable[[Pair, Guest], Awaitable[None]]) -> None:
    async def body() -> None:
        async with pair() as ends, asyncio.timeout(PATIENCE):
            await scenario(ends, Guest())

    asyncio.run(body(), debug=True)


async def read(*writes: tuple[int, bytes]) -> Writes:
    """Records as they are read from disks."""
    for disk, records in writes:
        await asyncio.sleep(0)
        yield disk, records


async def checkpoint(ends: Pair, guest: Guest, *writes: tuple[int, bytes]) -> None:
    """An epoch with records."""
    guest.epoch += 1
    state = guest.encoder.encode_state(b"state")
    pages = guest.encoder.encode(guest.staging(guest.write()))
    await ends.sender.send_epoch(guest.epoch, pages, state, time.monotonic_ns(), read(*writes))


def kept(ends: Pair) -> list[tuple[int, int, bytes]]:
    return [argument for name, argument in ends.standby.calls if name == "writes"]


def test_records_come_with_their_epoch_and_in_order() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await ends.sender.prepare(guest.description(), 1, {"answer": 42})
        await ends.sender.send_base_writes(1, RECORDS)
        await ends.sender.send_base_writes(0, LARGE)
        pages = guest.encoder.encode(guest.staging(range(guest.pages)), 32)
        await ends.sender.send_base(pages)
        await ends.sender.send_base_writes(0, RECORDS)
        await ends.sender.finish_base()
        await checkpoint(ends, guest, (0, LARGE), (0, RECORDS), (1, RECORDS))
        await checkpoint(ends, guest)
        await checkpoint(ends, guest, (1, RECORDS))
        assert kept(ends) == [
            (0, 1, RECORDS),
            (0, 0, LARGE),
            (0, 0, RECORDS),
            (1, 0, LARGE),
            (1, 0, RECORDS),
            (1, 1, RECORDS),
            (3, 1, RECORDS),
        ]
        order = [name for name, _ in ends.standby.calls]
        assert order.index("committed") == 4, "records of the base copy came after its end"

    run(scenario)


def test_what_is_on_the_standbys_disk_is_heard_at_any_time() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        heard: list[tuple[int, int]] = []
        arrived = asyncio.Event()

        def note(disk: int, batches: int) -> None:
            heard.append((disk, batches))
            arrived.set()

        ends.sender.on_applied = note
        await guest.protect(ends.sender)
        ends.receiver.applied(0, 1, 7)
        await arrived.wait()
        # In front of an ACK, and of the last answer.
        ends.receiver.applied(0, 0, 8)
        await checkpoint(ends, guest, (0, RECORDS))
        ends.receiver.applied(1, 0, 1 << 40)
        await ends.sender.stop("done")
        assert await ends.ended() is Outcome.STOPPED
        assert heard == [(1, 7), (0, 8), (0, 1 << 40)]
        ends.receiver.applied(1, 0, 9)  # over: nothing is sent, nothing breaks

    run(scenario)


def test_what_is_heard_right_behind_an_ack_holds_up_no_later_one() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        acknowledge = ends.receiver._acknowledge

        def and_applied(committed: Committed) -> None:
            acknowledge(committed)
            payload = pack_applied(0, 1)
            ends.receiver.link.put(FrameType.APPLIED, payload, epoch=committed.epoch)

        ends.receiver._acknowledge = and_applied  # type: ignore[method-assign]
        heard: list[tuple[int, int]] = []
        ends.sender.on_applied = lambda disk, batches: heard.append((disk, batches))
        await guest.protect(ends.sender)
        for _ in range(3):
            await guest.checkpoint(ends.sender)
        assert heard == [(0, 1)] * 4

    run(scenario)


def test_a_standby_that_cannot_keep_records_says_so() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        ends.standby.failures["writes"] = CheckpointError("the disk of this host is full")
        with pytest.raises(PeerRefused, match="the disk of this host is full"):
            await checkpoint(ends, guest, (0, RECORDS))
        assert isinstance(await ends.ended(), CheckpointError)
        assert ends.receiver.committed is not None
        assert ends.receiver.committed.epoch == 0
        assert ends.receiver.stood_down

    run(scenario)


def test_while_records_wait_for_room_the_epoch_is_not_acknowledged() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        ends.standby.gates["writes"] = asyncio.Event()
        sending = asyncio.create_task(checkpoint(ends, guest, (0, RECORDS)))
        await ends.standby.entered.setdefault("writes", asyncio.Event()).wait()
        assert not sending.done()
        assert ends.sender.acked == 0
        ends.standby.gates["writes"].set()
        await sending
        assert ends.sender.acked == 1

    run(scenario)


@pytest.mark.parametrize(
    ("epoch", "payload", "said"),
    [
        (2, pack_writes(0, RECORDS), "expected epoch 1"),
        (0, pack_writes(0, RECORDS), "expected epoch 1"),
        (1, b"\0\0\0\0\1\0\0\0" + RECORDS, "no meaning"),
    ],
)
def test_records_that_break_the_protocol_are_refused(epoch: int, payload: bytes, said: str) -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        ends.sender.link.put(FrameType.WRITES, payload, epoch=epoch)
        await ends.sender.link.flush()
        error = await ends.ended()
        assert isinstance(error, ProtocolError)
        assert said in str(error)
        assert not kept(ends)

    run(scenario)


def test_records_after_the_state_are_refused() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        state = guest.encoder.encode_state(b"state")
        link = ends.sender.link
        link.put(FrameType.STATE, state.payload, flags=state.flags, epoch=1)
        link.put(FrameType.WRITES, pack_writes(0, RECORDS), epoch=1)
        await link.flush()
        assert "came after its STATE" in str(await ends.ended())

    run(scenario)


def test_records_that_commit_does_not_count_are_refused() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        ends.sender.link.put(FrameType.WRITES, pack_writes(0, RECORDS), epoch=1)
        with pytest.raises(CheckpointError):
            await checkpoint(ends, guest)
        assert "does not describe the frames that came" in str(await ends.ended())

    run(scenario)


def test_base_records_end_with_the_base_copy() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        with pytest.raises(StateError):
            await ends.sender.send_base_writes(0, RECORDS)

    run(scenario)


def test_an_applied_frame_that_breaks_the_protocol_ends_the_session() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        wrong = bytearray(pack_applied(0, 1))
        wrong[4] = 1
        ends.receiver.link.put(FrameType.APPLIED, bytes(wrong), epoch=0)
        await ends.receiver.link.flush()
        with pytest.raises(ProtocolError, match="no meaning"):
            await checkpoint(ends, guest, (0, RECORDS))

    run(scenario)


def test_what_was_issued_is_told_between_two_epochs() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        await checkpoint(ends, guest, (0, RECORDS))
        ends.sender.put_issued(0, len(RECORDS))
        ends.sender.put_issued(3, 1 << 40)
        await checkpoint(ends, guest, (0, RECORDS))
        calls = [call for call in ends.standby.calls if call[0] in ("issued", "writes")]
        assert calls == [
            ("writes", (1, 0, RECORDS)),
            ("issued", (0, len(RECORDS))),
            ("issued", (3, 1 << 40)),
            ("writes", (2, 0, RECORDS)),
        ]

    run(scenario)


def test_what_was_issued_is_not_told_within_an_epoch() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        with pytest.raises(StateError):
            ends.sender.put_issued(0, 1)
        await guest.protect(ends.sender)
        ends.sender.link.put(FrameType.WRITES, pack_writes(0, RECORDS), epoch=1)
        ends.sender.link.put(FrameType.ISSUED, pack_issued(0, 1))
        ends.sender.link.push()
        assert "ISSUED came while" in str(await ends.ended())

    run(scenario)


def test_issued_says_nothing_beyond_its_fields() -> None:
    async def scenario(ends: Pair, guest: Guest) -> None:
        await guest.protect(ends.sender)
        wrong = bytearray(pack_issued(0, 1))
        wrong[5] = 1
        ends.sender.link.put(FrameType.ISSUED, bytes(wrong))
        ends.sender.link.push()
        assert "a bit set that has no meaning" in str(await ends.ended())

    run(scenario)
