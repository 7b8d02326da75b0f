# SPDX-License-Identifier: Apache-2.0
"""What belongs to a takeover besides the guest that runs: frames, name, answers to other hosts."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from kemari.replicas import StandbyDisks
from tests.unit.kemari_pair import Pair, await_true


def test_what_was_sent_to_a_dead_host_is_given_to_the_guest(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        assert not pair.b.network.backlogs
        pair.a.power_cut()
        (backlog,) = await_true(lambda: list(pair.b.network.backlogs), "frames are kept")
        backlog.frames.append(b"a request")
        await_true(lambda: "takeover" in pair.b.events("web"), "b took over")
        assert pair.b.network.delivered == [b"a request"]
        assert not pair.b.network.backlogs


def test_a_daemon_that_ends_after_a_takeover_names_the_guest_first(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        pair.a.power_cut()
        await_true(lambda: "web" in pair.b.hypervisor.guests, "the guest runs on b")
        pair.b.stop()
        assert not pair.b.hypervisor.unsettled


def test_a_guest_that_has_ended_where_it_came_to_is_not_said_to_run_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = threading.Event()

    async def close(_disks: StandbyDisks) -> None:
        while not closed.is_set():  # noqa: ASYNC110 - set from another thread
            await asyncio.sleep(0.005)

    # What is left of a session after the takeover may take long: a dead link, a slow disk.
    monkeypatch.setattr(StandbyDisks, "close", close)
    with Pair(tmp_path, reprotect=False) as pair:
        pair.protect()
        uuid = pair.a.status("web")["uuid"]
        pair.talk(3)
        pair.a.power_cut()
        await_true(lambda: "takeover" in pair.b.events("web"), "b took over")
        assert pair.b.daemon
        assert pair.b.loop
        assert pair.b.loop.run(pair.b.daemon.owner(uuid, 1)).state == "running"
        session = pair.b.daemon.sessions[uuid]
        await_true(lambda: session.settled, "b has done all that belongs to the takeover")
        pair.b.hypervisor.destroy_domain("web")
        # A host that comes back and asks would destroy its own copy for one that is no more.
        assert pair.b.loop.run(pair.b.daemon.owner(uuid, 1)).state == "none"
        closed.set()


def test_a_network_that_keeps_nothing_does_not_cost_the_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(nics: object) -> None:
        raise OSError(1, "Operation not permitted")

    with Pair(tmp_path) as pair:
        pair.protect()
        monkeypatch.setattr(pair.b.network, "backlog", refuse)
        pair.talk(3)
        pair.a.power_cut()
        pair.talk(3)
        pair.check_answers()
        await_true(lambda: "takeover" in pair.b.events("web"), "b took over")
        assert pair.b.events("web").count("trouble") == 1, "said once, not at each beat"
