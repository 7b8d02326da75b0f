# SPDX-License-Identifier: Apache-2.0
"""When frames for a guest are kept, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kemari.host import Host
from kemari.interim import Interim
from kemari.liveness import BEATS
from kemari.memory import MemoryBacklog, MemoryNetwork, Switch

HEARTBEAT = 2.0
LONG = 2 * HEARTBEAT / BEATS


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork("b", Switch())


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.fixture
def interim(network: MemoryNetwork, said: list[str], loop: asyncio.AbstractEventLoop) -> Interim:
    def note(guest: str, event: str, text: str) -> None:
        said.append(f"{event}: {text}")

    host: Any = SimpleNamespace(
        config=SimpleNamespace(heartbeat=HEARTBEAT),
        network=network,
        journal=SimpleNamespace(note=note),
    )

    async def make() -> Interim:
        return Interim(cast(Host, host))

    return loop.run_until_complete(make())


def test_frames_are_kept_from_a_suspicion_on(interim: Interim, network: MemoryNetwork) -> None:
    interim.watch("web", [], LONG * 0.99)
    assert network.backlogs == []
    interim.watch("web", [], LONG)
    (first,) = network.backlogs
    interim.watch("web", [], LONG * 2)
    assert network.backlogs == [first]


def test_a_sign_of_life_ends_it(interim: Interim, network: MemoryNetwork) -> None:
    interim.watch("web", [], LONG)
    network.backlogs[0].frames.append(b"the host has had this")
    interim.watch("web", [], 0)
    assert network.backlogs == []
    interim.watch("web", [], LONG)
    interim.deliver("web")
    assert network.delivered == []


def test_the_guest_gets_them_once(interim: Interim, network: MemoryNetwork) -> None:
    interim.watch("web", [], LONG)
    network.backlogs[0].frames.append(b"a request")
    interim.deliver("web")
    interim.deliver("web")
    interim.close()
    assert network.delivered == [b"a request"]
    assert network.backlogs == []


def test_what_cannot_be_delivered_is_said(
    interim: Interim,
    said: list[str],
    loop: asyncio.AbstractEventLoop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(backlog: MemoryBacklog) -> int:
        raise OSError(100, "Network is down")

    monkeypatch.setattr(MemoryBacklog, "deliver", refuse)
    interim.watch("web", [], LONG)
    interim.deliver("web")
    assert said == []  # it may be another thread
    loop.run_until_complete(asyncio.sleep(0))
    assert said == ["trouble: frames for web were lost: [Errno 100] Network is down"]
