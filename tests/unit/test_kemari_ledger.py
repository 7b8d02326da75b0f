# SPDX-License-Identifier: Apache-2.0
"""The ledger: durable, never backwards, and what it makes a restarted daemon do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kemari.ledger import (
    Duty,
    Ledger,
    LedgerError,
    Record,
    Role,
    answer_to_stand_down,
    duty_at_start,
)

UUID = "0f3c1a5e-8d0b-4e53-9a52-7f6f0c6e1d11"
RECORD = Record(
    uuid=UUID,
    guest="web",
    role=Role.PRIMARY,
    generation=3,
    peer="b",
    addresses=("10.78.0.2:7799",),
    options={"interval_ms": 1000},
)


def test_what_was_put_is_there_after_a_restart(tmp_path: Path) -> None:
    put = Ledger(tmp_path / "guests").put(RECORD)
    again = Ledger(tmp_path / "guests")
    assert again.get(UUID) == put
    assert again.by_name("web") == put
    assert again.generation(UUID) == 3
    assert again.generation("another") == 0
    assert list(again) == [put]
    assert (tmp_path / "guests").stat().st_mode & 0o077 == 0


def test_generations_never_go_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.put(RECORD)
    with pytest.raises(LedgerError, match="generation 2 of web is over; 3 is known here"):
        ledger.put(replace(RECORD, generation=2))
    assert ledger.generation(UUID) == 3
    assert ledger.update(UUID, role=Role.MOVED, generation=4).generation == 4


def test_changes_by_many_threads_are_all_there(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.put(RECORD)

    def change(number: int) -> None:
        ledger.update(UUID, reason=str(number))
        ledger.amend(UUID, lambda record: {"options": record.options | {str(number): number}})
        ledger.amend(UUID, lambda record: {})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(change, range(64)))
    for each in (ledger, Ledger(tmp_path)):
        record = each.get(UUID)
        assert record is not None
        assert set(record.options) == {"interval_ms", *map(str, range(64))}


def test_nothing_is_amended_that_is_not_there(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.amend(UUID, lambda record: {"reason": "none"})
    assert list(ledger) == []


def test_a_uuid_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="is not a UUID"):
        Ledger(tmp_path).put(replace(RECORD, uuid="../../etc/passwd"))


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_write_that_fails_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    ledger = Ledger(tmp_path)
    ledger.put(RECORD)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    target = f"os.{call}"
    with monkeypatch.context() as broken:
        broken.setattr(target, full)
        with pytest.raises(LedgerError, match="No space left on device"):
            ledger.update(UUID, role=Role.OWNER)
    assert Ledger(tmp_path).get(UUID) == ledger.get(UUID)
    assert ledger.get(UUID) is not None
    assert Ledger(tmp_path).generation(UUID) == 3


def test_a_record_is_durable_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is synced before the rename, the folder after it."""
    order: list[str] = []

    def spy(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            order.append(name)
            return real(*arguments, **named)

        return called

    monkeypatch.setattr(os, "fsync", spy("fsync", os.fsync))
    monkeypatch.setattr(Path, "replace", spy("rename", Path.replace))
    Ledger(tmp_path).put(RECORD)
    assert order == ["fsync", "rename", "fsync"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        json.dumps({"uuid": UUID, "guest": "web", "role": "king", "generation": 1}).encode(),
        json.dumps({"uuid": UUID, "guest": "web", "role": "owner", "generation": "x"}).encode(),
        b" " * 100_000,
    ],
)
def test_a_broken_record_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / f"{UUID}.json"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=UUID):
        Ledger(tmp_path)


def test_a_record_under_another_name_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path).put(RECORD)
    (tmp_path / f"{UUID}.json").rename(tmp_path / "other.json")
    with pytest.raises(LedgerError, match="is the record of another guest"):
        Ledger(tmp_path)


def test_unknown_keys_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.put(RECORD)
    path = tmp_path / f"{UUID}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"witness": "w"}))
    assert Ledger(tmp_path).get(UUID) == ledger.get(UUID)


@pytest.mark.parametrize(
    ("role", "duty"),
    [
        (Role.PRIMARY, Duty.ASK),
        (Role.STANDBY, Duty.STAND_DOWN),
        (Role.CLAIMED, Duty.LOOK),
        (Role.MOVED, Duty.GIVE_UP),
        (Role.OWNER, Duty.NONE),
        (Role.RELEASED, Duty.NONE),
    ],
)
def test_duties(role: Role, duty: Duty) -> None:
    assert duty_at_start(replace(RECORD, role=role)) is duty


@pytest.mark.parametrize(
    ("role", "asked", "answer"),
    [
        (Role.OWNER, 2, (True, 3)),
        (Role.PRIMARY, 2, (True, 3)),
        (Role.CLAIMED, 2, (True, 3)),
        (Role.OWNER, 3, (False, 3)),
        (Role.STANDBY, 3, (False, 3)),
        (Role.RELEASED, 2, (False, 2)),
        (Role.MOVED, 2, (False, 2)),
    ],
)
def test_answers_to_stand_down(role: Role, asked: int, answer: tuple[bool, int]) -> None:
    assert answer_to_stand_down(replace(RECORD, role=role), asked) == answer


def test_a_host_that_knows_nothing_stands_down() -> None:
    assert answer_to_stand_down(None, 7) == (False, 7)
