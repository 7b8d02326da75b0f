# SPDX-License-Identifier: Apache-2.0
"""The verdict on what a database's clients were told, with histories that must fail."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from vagrant.demolib.ledger import Contents, Done, faults
from vagrant.demolib.writer import Refused, encode, read_reply

TOTAL = ("INCR", "total")


def append(connection: int, number: int, reply: int | None = None, at: float = 0.0) -> Done:
    command = ("RPUSH", f"list:{connection}", str(number))
    return Done(connection, command, at, at + 0.5, number if reply is None else reply)


def count(reply: int, sent: float, answered: float, connection: int = 0) -> Done:
    return Done(connection, TOTAL, sent, answered, reply)


GOOD = [append(0, 1), append(0, 2), append(1, 1), count(2, 1.0, 4.0), count(1, 2.0, 3.0, 1)]
HELD = Contents([[1, 2], [1]], 2)


def test_a_history_of_one_machine() -> None:
    assert faults(GOOD, [], HELD) == []
    assert faults([], [], Contents([], 0)) == []


def test_what_was_not_answered_was_done_or_not() -> None:
    waiting = [(0, ["RPUSH", "list:0", "3"]), (1, ["INCR", "total"])]
    for held in (HELD, Contents([[1, 2, 3], [1]], 2), Contents([[1, 2, 3], [1]], 3)):
        assert faults(GOOD, waiting, held) == []
    assert faults(GOOD, waiting, Contents([[1, 2, 3, 4], [1]], 2))
    assert faults(GOOD, waiting, Contents([[1, 2], [1, 2]], 2))
    assert faults(GOOD, waiting, Contents([[1, 2], [1]], 4))


@pytest.mark.parametrize(
    ("done", "held", "reason"),
    [
        (GOOD, Contents([[1], [1]], 2), "list:0 holds 1 numbers, expected 2"),
        (GOOD, Contents([[1, 2, 3], [1]], 2), "list:0 holds 3 numbers, expected 2"),
        (GOOD, Contents([[2, 1], [1]], 2), "list:0 holds other than 1 to 2"),
        (GOOD, Contents([[1, 1], [1]], 2), "list:0 holds other than 1 to 2"),
        (GOOD, Contents([[1, 2], [1]], 1), "counter stands at 1 after 2"),
        (GOOD, Contents([[1, 2], [1]], 3), "counter stands at 3 after 2"),
        ([*GOOD[:1], append(0, 2, 1), *GOOD[2:]], HELD, "append 2 to list:0 was answered 1"),
        ([*GOOD[:1], append(0, 2, 3), *GOOD[2:]], HELD, "append 2 to list:0 was answered 3"),
        ([*GOOD[1:]], HELD, "append 2 to list:0 was answered 2, expected append 1"),
        ([*GOOD[:4], replace(GOOD[4], reply=2)], HELD, "the same number twice"),
        ([*GOOD[:3], count(2, 1.0, 2.0), count(1, 2.5, 3.0)], HELD, "gave 1 after it had given 2"),
    ],
)
def test_histories_that_no_single_machine_has(
    done: list[Done], held: Contents, reason: str
) -> None:
    found = faults(done, [], held)
    assert any(reason in sentence for sentence in found), found


def replies(raw: bytes) -> list[object]:
    async def read() -> list[object]:
        reader = asyncio.StreamReader()
        reader.feed_data(raw)
        reader.feed_eof()
        found: list[object] = []
        while not reader.at_eof():
            found.append(await read_reply(reader))
        return found

    return asyncio.run(read())


def test_commands_and_answers() -> None:
    assert encode(["SET", "\xe9"]) == b"*2\r\n$3\r\nSET\r\n$2\r\n\xc3\xa9\r\n"
    assert replies(b":7\r\n+OK\r\n$2\r\nhi\r\n$-1\r\n*2\r\n:1\r\n$0\r\n\r\n") == [
        7,
        "OK",
        "hi",
        None,
        [1, ""],
    ]
    with pytest.raises(Refused, match="OOM"):
        replies(b"-OOM\r\n")
    with pytest.raises(EOFError):
        replies(b":7")
