# SPDX-License-Identifier: Apache-2.0
"""The rule of the bitmap (docs/disk.md), seen in the calls that a real server makes.

Whatever the moment at which the power goes, only what was flushed before is sure to be there: so a
mark must have been flushed before the write that it stands for begins, and the disk before a mark
is taken back.
"""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from tests.unit.disk_pair import MIB, joined, run, until
from tests.unit.disk_server import DiskServer

SIZE = 4 * MIB
SOURCE = Path(__file__).with_name("disk_order.c")


def test_marks_are_durable_before_writes_and_writes_before_marks_are_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, order = tmp_path / "order.so", tmp_path / "order"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    server = DiskServer(tmp_path / "primary", SIZE)
    chance = random.Random(6)
    settled: list[int] = []

    async def body() -> None:
        with monkeypatch.context() as patch:
            patch.setenv("LD_PRELOAD", str(library))
            patch.setenv("KEMARI_ORDER", str(order))
            await asyncio.to_thread(lambda: server.launch(clean=0.02))
        client = server.connect()
        async with joined(server, tmp_path) as pair:
            await pair.begin()
            await pair.sync()
            for _ in range(4):
                for _ in range(8):
                    offset = chance.randrange(SIZE - 5000)
                    await asyncio.to_thread(client.write, offset, chance.randbytes(5000))
                await pair.seal()
                await pair.settle()
                await pair.seal()
                await pair.settle()
                await until(lambda: server.figures().dirty == 0)
                settled.append(len(order.read_text().splitlines()))
        client.close()

    try:
        run(body)
    finally:
        server.stop(signal.SIGKILL)
    calls = [tuple(line.split()[:2]) for line in order.read_text().splitlines()]
    write, flush = ("write", "disk.img"), ("sync", "disk.img")
    mark, durable = ("write", "bitmap"), ("sync", "bitmap")
    for start, end in pairwise(settled):
        # All marks are cleared at the start of a round and at its end.
        turn = calls[start:end]
        first = turn.index(write)
        # The cleaner may flush the disk at any time, in a thread of its own.
        before = [call for call in turn[:first] if call in (mark, durable)]
        assert before[-2:] == [mark, durable], "a write began without a durable mark"
        last = len(turn) - 1 - turn[::-1].index(write)
        cleared = len(turn) - 1 - turn[::-1].index(mark)
        assert flush in turn[last:cleared], "a mark was cleared of a write that was not flushed"
