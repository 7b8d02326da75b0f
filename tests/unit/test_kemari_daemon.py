# SPDX-License-Identifier: Apache-2.0
"""Daemon to daemon on the in-memory hypervisor: what fails, and what happens then."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from pathlib import Path

import pytest

from checkpoint.errors import ReviveError
from checkpoint.memory import MemoryShell
from kemari.control import ControlServer
from kemari.errors import KemariError, NoSuchProtection, Refused
from kemari.peers import Peers
from tests.unit.kemari_pair import Machine, Pair, await_true
from tests.unit.patience import PATIENCE


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that lost its standby is protected again soon."""
    monkeypatch.setattr("kemari.daemon.AGAIN", 0.3)


def test_start_protects_and_output_waits_for_its_epoch(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        status = pair.protect()
        assert status["state"] == "protected"
        assert status["protected"] is True
        pair.talk(20)
        pair.check_answers()
        status = pair.a.status("web")
        assert status["statistics"]["checkpoints"] >= 20
        assert pair.b.status("web")["state"] == "ready"


def test_power_cut_while_talking(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(20)
        pair.a.power_cut()
        pair.talk(20)
        pair.check_answers()
        status = pair.b.status("web")
        assert status["role"] == "owner"
        assert status["came_from"] == "a"
        assert status["generation"] == 2
        assert status["protected"] is False
        assert pair.switch.announced[-1][0] == "b"
        await_true(lambda: "takeover" in pair.b.events("web"), "the takeover is in the log")


def test_power_cut_while_idle(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        pair.a.power_cut()
        await_true(lambda: "web" in pair.b.hypervisor.guests, "the guest runs on b")
        pair.talk(3)
        pair.check_answers()


def test_stop_leaves_nothing(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        pair.a.request("stop", domain="web")
        pair.talk(3)
        pair.check_answers()
        await_true(lambda: not pair.a.network.buffers, "the buffer is gone")
        await_true(lambda: not pair.b.hypervisor.shells, "the shell is gone")
        with pytest.raises(NoSuchProtection):
            pair.a.status("web")
        pair.protect()
        pair.talk(3)
        pair.check_answers()


def test_nobody_waits_for_the_removal_of_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the next protection of the same guest does."""
    removing, may_go = threading.Event(), threading.Event()
    destroy = MemoryShell.destroy

    def slow(shell: MemoryShell) -> None:
        removing.set()
        assert may_go.wait(60)
        destroy(shell)

    monkeypatch.setattr(MemoryShell, "destroy", slow)
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.a.request("stop", domain="web")
        assert removing.wait(60)
        pair.talk(3)
        pair.check_answers()
        assert pair.b.hypervisor.shells
        again = threading.Thread(target=pair.protect)
        again.start()
        await_true(lambda: pair.a.state("web") == "connecting", "b was asked again")
        pair.talk(3)
        may_go.set()
        again.join(60)
        assert pair.a.status("web")["protected"]
        pair.talk(3)
        pair.check_answers()


def test_what_is_kept_of_another_host_does_not_grow_and_ends_with_the_protection(
    tmp_path: Path,
) -> None:
    with Pair(tmp_path) as pair:
        for _ in range(3):
            pair.a.request("ping-peer", standby="b")
        assert pair.a.daemon
        assert pair.b.daemon
        a, peers = pair.a.daemon.host.host_id, pair.b.daemon.peers
        assert not peers._evidence
        pair.protect()
        await_true(lambda: peers.evidence(a), "b has heard of a on another path")
        for _ in range(10):
            pair.a.request("ping-peer", standby="b")
        assert list(peers.evidence(a)) == ["from 127.0.0.1"]
        pair.a.request("stop", domain="web")
        for kept in (peers, pair.a.daemon.peers):
            _await_nothing(kept)


def _await_nothing(peers: Peers) -> None:
    await_true(lambda: not peers._evidence and not peers._lifelines, "nothing is kept")


def test_planned_failover_there_and_back(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(5)
        moved = pair.a.request("failover", domain="web")
        assert moved["host"] == "b"
        assert "web" not in pair.a.hypervisor.guests
        pair.talk(5)
        assert pair.a.status("web")["state"] == "moved"
        assert pair.b.request("start", domain="web", standby="a")["protected"] is True
        pair.talk(5)
        assert pair.b.request("failover", domain="web")["host"] == "a"
        pair.talk(5)
        pair.check_answers()
        assert pair.a.status("web")["generation"] == 4


def test_standby_power_cut(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(5)
        pair.b.power_cut()
        pair.talk(5)
        pair.check_answers()
        await_true(lambda: pair.a.status("web")["state"] == "unprotected", "unprotected")
        await_true(lambda: not pair.a.network.buffers, "the buffer is gone")


def test_replication_link_unplugged(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(5)
        pair.fabric.unplugged.add("link")
        pair.talk(5)
        pair.check_answers()
        await_true(lambda: not pair.b.hypervisor.shells, "b has stood down")
        assert pair.a.status("web")["state"] == "unprotected"
        assert "web" not in pair.b.hypervisor.guests


def test_primary_daemon_killed_and_restarted(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(5)
        pair.a.kill()
        pair.ask(pair.guest, 5)
        assert len(pair.answers()) == 5, "output of an epoch that nobody acknowledged was seen"
        pair.a.start()
        pair.talk(5)
        pair.check_answers()
        await_true(lambda: pair.a.status("web")["protected"], "protected again")
        pair.talk(5)
        pair.check_answers()
        assert "web" not in pair.b.hypervisor.guests


def test_standby_daemon_killed_and_restarted(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(5)
        pair.b.kill()
        pair.b.start()
        pair.talk(5)
        pair.check_answers()
        await_true(lambda: pair.a.status("web")["protected"], "protected again")


def test_returning_primary_never_runs_its_stale_copy(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(5)
        pair.a.power_cut()
        pair.talk(5)
        pair.a.power_on()
        await_true(lambda: pair.a.status("web")["state"] == "moved", "a knows that it moved")
        assert "web" not in pair.a.hypervisor.guests
        pair.talk(5)
        pair.check_answers()


def test_primary_daemon_frozen_is_taken_over_and_gives_up(tmp_path: Path) -> None:
    """The daemon of a living host stands still: its guest's output stays held, so b may run it."""
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(5)
        stale = pair.guest
        wake = threading.Event()
        assert pair.a.loop
        pair.a.loop.loop.call_soon_threadsafe(wake.wait)
        await_true(lambda: "web" in pair.b.hypervisor.guests, "the guest runs on b")
        stale.request(999)  # the stale copy goes on, unseen
        wake.set()
        await_true(lambda: "web" not in pair.a.hypervisor.guests, "a destroyed its copy")
        pair.talk(5)
        pair.check_answers()


@pytest.mark.parametrize(
    ("point", "count"),
    [("track", 1), ("copy_live", 1), ("copy_live", 3), ("capture", 1)],
)
def test_power_cut_before_the_first_checkpoint(tmp_path: Path, point: str, count: int) -> None:
    """The guest is lost with its host: b says so and cleans up."""
    with Pair(tmp_path) as pair:
        pair.a.cut_at(point, count)
        starting = threading.Thread(target=_start_and_fail, args=(pair,), daemon=True)
        starting.start()
        await_true(lambda: "a" in pair.fabric.dead, "power cut")
        await_true(lambda: "lost" in pair.b.events("web"), "b says that the guest is lost")
        await_true(lambda: not pair.b.hypervisor.shells, "b has removed the shell")
        assert "web" not in pair.b.hypervisor.guests


def _start_and_fail(pair: Pair) -> None:
    with pytest.raises(KemariError):
        pair.protect()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
def test_power_cut_in_every_part_of_a_checkpoint(tmp_path: Path, count: int) -> None:
    """Inside a capture, before and after the guest's output was closed."""
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(2)
        pair.a.cut_at("capture", count)
        pair.talk(20)
        pair.check_answers()
        await_true(lambda: "a" in pair.fabric.dead, "power cut")
        pair.talk(5)
        pair.check_answers()


@pytest.mark.parametrize("sent", range(0, 40, 4))
def test_power_cut_at_any_byte_of_the_link(tmp_path: Path, sent: int) -> None:
    """The link carries so many more chunks, then the power fails."""
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(2)
        pair.fabric.cut_after(sent, pair.a.power_cut)
        pair.talk(30)
        pair.check_answers()
        await_true(lambda: "a" in pair.fabric.dead, "power cut")
        pair.talk(5)
        pair.check_answers()


def test_ten_power_cuts_in_a_row(tmp_path: Path) -> None:
    """There and back: each survivor is protected again to the host that died."""
    with Pair(tmp_path) as pair:
        for turn in range(10):
            here, there = (pair.a, pair.b) if turn % 2 == 0 else (pair.b, pair.a)
            here.request("start", domain="web", standby=there.name)
            pair.talk(5)
            here.power_cut()
            pair.talk(5)
            pair.check_answers()
            here.power_on()
            await_true(partial(_has_moved, here), "moved")
        await_true(lambda: not pair.b.hypervisor.shells, "the shell is gone")


def _has_moved(machine: Machine) -> bool:
    return bool(machine.status("web")["state"] == "moved")


def test_replication_link_unplugged_and_plugged_in_again(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        pair.fabric.unplugged.add("link")
        await_true(lambda: pair.a.status("web")["state"] == "unprotected", "unprotected")
        pair.fabric.unplugged.discard("link")
        await_true(lambda: pair.a.status("web")["protected"], "protected again")
        pair.talk(3)
        pair.check_answers()


def test_partition_with_policy_hold_never_shows_two_owners(tmp_path: Path) -> None:
    with Pair(tmp_path, on_standby_loss="hold") as pair:
        pair.protect()
        pair.talk(3)
        stale = pair.guest
        pair.fabric.unplugged |= {"link", "lan"}
        await_true(lambda: "web" in pair.b.hypervisor.guests, "b took over")
        stale.request(77)
        await_true(lambda: pair.a.status("web")["state"] == "holding", "a holds")
        assert all(number != 77 for _, number, _, _ in pair.answers())
        pair.fabric.unplugged.clear()
        await_true(lambda: "web" not in pair.a.hypervisor.guests, "a gave up")
        pair.talk(3)
        pair.check_answers()


def test_standby_lost_with_policy_hold_and_forced_stop(tmp_path: Path) -> None:
    with Pair(tmp_path, on_standby_loss="hold") as pair:
        pair.lose_standby()
        await_true(lambda: pair.a.status("web")["state"] == "holding", "held")
        with pytest.raises(Refused, match="does not answer"):
            pair.a.request("stop", domain="web")
        pair.ask(pair.guest, 3)
        assert len(pair.answers()) == 3
        pair.a.request("stop", domain="web", force=True)
        pair.talk(3)
        pair.check_answers()


def test_both_daemons_stopped_in_good_order(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        pair.b.stop()
        pair.talk(3)
        pair.a.stop()
        pair.talk(3)
        pair.check_answers()
        await_true(lambda: not pair.a.network.buffers, "the buffer is gone")
        await_true(lambda: not pair.b.hypervisor.shells, "the shell is gone")


@pytest.mark.parametrize("ending", ["a", "b"])
def test_a_daemon_that_ends_begins_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    left, may_end = threading.Event(), threading.Event()
    close = ControlServer.close

    async def slow(control: ControlServer) -> None:
        left.set()
        await asyncio.to_thread(may_end.wait)
        await close(control)

    with Pair(tmp_path) as pair:
        monkeypatch.setattr(ControlServer, "close", slow)
        stopping = threading.Thread(target=pair.machines[ending].stop)
        stopping.start()
        assert left.wait(PATIENCE)
        try:
            with pytest.raises(KemariError, match=f"kemarid on {ending} is stopping"):
                pair.protect()
        finally:
            may_end.set()
            stopping.join()
        assert not pair.b.hypervisor.shells
        pair.talk(3)


def test_primary_daemon_restarted_in_good_order_resumes(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect(interval_ms=77)
        pair.talk(3)
        pair.a.stop()
        pair.talk(3)
        pair.a.start()
        await_true(lambda: pair.a.status("web")["protected"], "protected again")
        assert pair.a.status("web")["options"]["interval_ms"] == 77
        pair.talk(3)
        pair.check_answers()


def test_primary_daemon_killed_then_its_host_dies(tmp_path: Path) -> None:
    """The standby kept its copy when only the daemon was gone, and takes over when the host is."""
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(5)
        pair.a.kill()
        pair.ask(pair.guest, 5)
        await_true(lambda: "link-closed" in pair.b.events("web"), "b has noticed")
        assert "web" not in pair.b.hypervisor.guests
        pair.fabric.dead.add("a")
        pair.a.network.powered = False
        pair.a.hypervisor.power_cut()
        pair.talk(5)
        pair.check_answers()


def test_primary_daemon_killed_and_standby_took_over_meanwhile(tmp_path: Path) -> None:
    """a was cut off with its daemon dead; back on the network, it learns that b runs the guest."""
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(5)
        pair.a.kill()
        pair.ask(pair.guest, 5)
        pair.fabric.dead.add("a")
        await_true(lambda: "web" in pair.b.hypervisor.guests, "b took over")
        pair.fabric.dead.discard("a")
        pair.a.start()
        await_true(lambda: "web" not in pair.a.hypervisor.guests, "a destroyed its copy")
        await_true(lambda: not pair.a.network.buffers, "the buffer is gone")
        pair.talk(5)
        pair.check_answers()


def test_standby_that_cannot_revive_gives_a_planned_failover_back(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)

        def refuse(point: str) -> None:
            if point == "revive":
                raise ReviveError("no memory")

        pair.b.hypervisor.reached = refuse
        with pytest.raises(KemariError, match="no memory"):
            pair.a.request("failover", domain="web")
        pair.talk(3)
        pair.check_answers()
        await_true(lambda: not pair.b.hypervisor.shells, "the shell is gone")


def test_standby_daemon_killed_in_the_middle_of_a_revival(tmp_path: Path) -> None:
    """The claim was on disk, the guest not yet alive: undone at restart; the primary goes on."""
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        pair.b.cut_at("revive", act=pair.b.kill)
        moving = threading.Thread(target=_failover_and_fail, args=(pair,), daemon=True)
        moving.start()
        await_true(lambda: pair.b.loop and not pair.b.loop.thread.is_alive(), "b is dead")
        pair.b.hypervisor.reached = lambda point: None
        pair.b.start()
        pair.talk(3)
        pair.check_answers()
        await_true(lambda: not pair.b.hypervisor.shells, "the shell is gone")


def _failover_and_fail(pair: Pair) -> None:
    with pytest.raises(KemariError):
        pair.a.request("failover", domain="web")


def test_lost_standby_then_orderly_restart_resumes(tmp_path: Path) -> None:
    """Both ends go, one after the other without a pause; the buffer goes, the wish stays."""
    for turn in range(5):
        with Pair(tmp_path / str(turn)) as pair:
            pair.protect()
            pair.talk(2)
            pair.b.stop()
            pair.a.stop()
            assert not pair.a.network.buffers
            pair.talk(2)
            pair.b.start()
            pair.a.start()
            await_true(lambda: pair.a.status("web")["protected"], "protected again")
            pair.talk(2)
            pair.check_answers()
