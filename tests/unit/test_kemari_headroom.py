# SPDX-License-Identifier: Apache-2.0
"""A reference stops growing before Dom0 has no memory left."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from checkpoint import codec
from checkpoint.codec import Decoder, Encoder
from checkpoint.driver import PAGE_SIZE, Staging
from kemari.headroom import Headroom

GIB, MIB = 1 << 20, 1 << 10  # in KiB


def account(path: Path, total: int, available: int) -> Path:
    """The kernel's account of so many KiB."""
    path.write_text(
        f"MemTotal:       {total} kB\nMemFree:  17 kB\nMemAvailable:   {available} kB\n"
        "HugePages_Total: 0\n"
    )
    return path


def test_a_sixteenth_is_left_and_64_mib_at_least(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    meminfo = tmp_path / "meminfo"
    room = Headroom("web", account(meminfo, 16 * GIB, 3 * GIB))
    assert room.pages() == 2 * GIB // 4
    account(meminfo, GIB // 2, 100 * MIB)
    assert room.pages() == 36 * MIB // 4
    assert not room.short
    assert caplog.messages == []
    account(meminfo, GIB // 2, 60 * MIB)
    assert room.pages() == -4 * MIB // 4
    account(meminfo, 16 * GIB, 3 * GIB)
    assert room.pages() > 0
    assert [told.endswith("60 MiB are left to Dom0") for told in caplog.messages] == [True]
    assert room.short  # it was, once


def test_nothing_more_is_taken_without_the_account(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nothing, meminfo = tmp_path / "nothing", tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       17 kB\n")
    for path, why in ((nothing, "cannot be read"), (meminfo, "lacks MemAvailable")):
        room = Headroom("web", path)
        assert room.pages() == 0
        assert room.pages() == 0
        assert room.short
        assert [why in told and told.startswith("web: ") for told in caplog.messages] == [True]
        caplog.clear()


def test_this_machine_has_some() -> None:
    room = Headroom("web")
    assert room.pages() > 0
    assert not room.short


def test_a_reference_stops_growing_and_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is sent is right all the same."""
    monkeypatch.setattr(codec, "LOOK_EVERY", 8)
    pages, spare = 64, [1000, 4, -6, 1000]
    encoder = Encoder(pages, compression="none", spare=lambda: spare[0])
    decoder, memory = Decoder(pages), memoryview(bytearray(pages * PAGE_SIZE))
    staging, drawn = Staging(8), random.Random(3)
    guest = bytearray(pages * PAGE_SIZE)

    def send(first: int) -> None:
        staging.count = 8
        for index in range(8):
            at = (first + index) * PAGE_SIZE
            guest[at : at + PAGE_SIZE] = drawn.randbytes(PAGE_SIZE)
            staging.gfns[index] = first + index
            staging.data[index * PAGE_SIZE : (index + 1) * PAGE_SIZE] = guest[at : at + PAGE_SIZE]
        for coded in encoder.encode(staging, 8):
            decoder.apply(decoder.verify(coded.flags, coded.payload), memory)
        assert memory == guest

    send(0)
    assert encoder.held == 8
    spare.pop(0)
    send(8)
    assert encoder.held == 16  # as much again would have been too much
    send(16)
    assert encoder.held <= 28
    spare.pop(0)
    before = encoder.held
    send(24)
    assert encoder.held < before + 8
    spare.pop(0)
    for first in range(32, 64, 8):
        send(first)
    send(0)
    assert encoder.held > before
    encoder.close()


def test_a_reference_is_no_larger_than_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "LOOK_EVERY", 1)
    encoder = Encoder(16, compression="none", reference_pages=4, spare=lambda: 1000)
    staging = Staging(16)
    staging.count = 16
    for index in range(16):
        staging.gfns[index] = index
        staging.data[index * PAGE_SIZE] = 1
    list(encoder.encode(staging, 4))
    assert encoder.held == 4
    encoder.close()
