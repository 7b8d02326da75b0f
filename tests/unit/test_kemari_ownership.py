# SPDX-License-Identifier: Apache-2.0
"""Whose guest it is when records, hosts and administrators do not agree."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoint.errors import CheckpointError
from checkpoint.memory import MemoryGuest
from kemari import daemon, recovery, stragglers
from kemari.ledger import LedgerError, Record, Role
from kemari.peers import Answer
from tests.unit.kemari_pair import Machine, Pair, await_true


def roles(machine: Machine) -> list[str]:
    """What a host's ledger says, of whatever guests."""
    assert machine.daemon
    return sorted(record.role.value for record in machine.daemon.host.ledger)


def last_text(machine: Machine) -> str:
    """The last sentence in a host's event log."""
    assert machine.daemon
    return str(machine.daemon.host.journal.read()[-1]["text"])


def start_again(machine: Machine, uuid: str = "") -> MemoryGuest:
    """``xl create``, of a configuration with a UUID or without."""
    guest = machine.hypervisor.boot("web")
    if uuid:
        guest.description = replace(guest.description, uuid=uuid)
    return guest


def await_recovered(machine: Machine) -> None:
    """Until the machine's daemon asks for no guest's owner any more."""
    await_true(lambda: machine.daemon and not machine.daemon.recoveries, "the owner is known")


# ---- A domain that was started since the guest moved away ----


@contextmanager
def moved_to_b(folder: Path) -> Iterator[Pair]:
    """Two hosts; the guest was moved to b as planned."""
    with Pair(folder) as pair:
        pair.protect()
        pair.talk(3)
        pair.a.request("failover", domain="web")
        yield pair


@pytest.mark.parametrize("same_uuid", [True, False])
def test_a_guest_that_was_brought_back_by_hand_outlives_a_restart(
    tmp_path: Path, same_uuid: bool
) -> None:
    with moved_to_b(tmp_path) as pair:
        uuid = pair.b.hypervisor.guests["web"].description.uuid
        pair.b.hypervisor.destroy_domain("web")
        guest = start_again(pair.a, uuid if same_uuid else "")
        pair.a.stop()
        pair.a.start()
        await_recovered(pair.a)
        assert pair.a.hypervisor.guests["web"] is guest
        assert guest.alive
        assert "web does not run on b any more" in last_text(pair.a)
        pair.protect()
        assert pair.a.state("web") == "protected"


def test_after_a_power_cut_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        uuid = pair.guest.description.uuid
        pair.a.power_cut()
        await_true(lambda: "web" in pair.b.hypervisor.guests, "b took over")
        await_true(lambda: "takeover" in pair.b.events("web"), "b took over")
        pair.b.hypervisor.destroy_domain("web")
        started: list[MemoryGuest] = []
        start = pair.a.start

        def start_both() -> None:
            started.append(start_again(pair.a, uuid))
            start()

        monkeypatch.setattr(pair.a, "start", start_both)
        pair.a.power_on()
        await_recovered(pair.a)
        assert started[0].alive
        assert roles(pair.a) == ["moved"]


def test_a_second_copy_is_destroyed(tmp_path: Path) -> None:
    """Started by the host itself, say, without a UUID in its configuration."""
    with moved_to_b(tmp_path) as pair:
        pair.a.stop()
        start_again(pair.a)
        pair.a.start()
        await_true(lambda: "web" not in pair.a.hypervisor.guests, "the second copy is gone")
        assert pair.b.hypervisor.guests["web"].alive
        pair.talk(3)
        pair.check_answers()


def test_without_an_answer_nothing_is_destroyed(tmp_path: Path) -> None:
    with moved_to_b(tmp_path) as pair:
        pair.a.stop()
        pair.b.stop()
        guest = start_again(pair.a)
        pair.a.start()
        await_true(lambda: "restarted" in pair.a.events("web"), "b is asked")
        assert pair.a.state("web") == "asking"
        assert guest.alive
        pair.b.start()
        await_true(lambda: not guest.alive, "b has said that the guest runs there")


@pytest.mark.parametrize("nics", [1, 0])
@pytest.mark.parametrize("known", [False, True])
def test_an_old_copy_is_destroyed_although_the_guest_has_ended_since(
    tmp_path: Path, nics: int, *, known: bool
) -> None:
    """Whether a's last daemon had learned of the takeover, and died right after, or not."""
    with Pair(tmp_path, on_standby_loss="hold") as pair:
        del pair.guest.nics[nics:]
        pair.protect()
        if nics:
            pair.talk(3)
        pair.fabric.unplugged |= {"link", "lan"}
        await_true(lambda: "takeover" in pair.b.events("web"), "b took over")
        pair.b.hypervisor.destroy_domain("web")
        assert pair.a.daemon
        if known:
            ledger = pair.a.daemon.host.ledger
            ledger.update(pair.guest.description.uuid, role=Role.MOVED, generation=2)
        pair.a.kill()
        pair.fabric.unplugged.clear()
        assert "web" in pair.a.hypervisor.guests
        pair.a.start()
        await_recovered(pair.a)
        assert not pair.guest.alive
        assert not pair.a.network.buffers
        assert roles(pair.a) == ["moved"]


def test_another_guest_of_the_name_keeps_its_protection(tmp_path: Path) -> None:
    with moved_to_b(tmp_path) as pair:
        pair.b.hypervisor.destroy_domain("web")
        guest = start_again(pair.a, "00000000-0000-4000-8000-000000000000")
        pair.protect()
        pair.a.kill()
        pair.a.start()
        await_true(lambda: pair.a.state("web") == "protected", "it is protected again")
        assert guest.alive
        assert roles(pair.a) == ["moved", "primary"]


def test_another_guest_of_the_name_is_no_copy_of_the_one_that_moved(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        uuid = pair.guest.description.uuid
        pair.a.request("failover", domain="web")
        pair.b.hypervisor.destroy_domain("web")
        guest = start_again(pair.a)
        pair.protect()
        pair.a.request("stop", domain="web")
        await_true(lambda: not pair.b.hypervisor.shells, "b has removed its shell")
        start_again(pair.b, uuid)
        pair.a.stop()
        pair.a.start()
        await_recovered(pair.a)
        assert guest.alive
        assert roles(pair.a) == ["moved", "owner"]


def test_another_guest_of_the_name_is_no_takeover(tmp_path: Path) -> None:
    """The standby's host has started a domain of the name; the guest is still the primary's."""
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        pair.b.kill()
        pair.b.hypervisor.shells.clear()
        start_again(pair.b)
        pair.b.start()
        assert roles(pair.b) == ["released"]
        await_true(lambda: pair.a.state("web") == "unprotected", "a goes on alone")
        assert pair.guest.alive


# ---- A takeover that could not be recorded ----


def test_a_takeover_with_a_full_disk_is_no_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "PATIENT_PACE", 0.05)
    with Pair(tmp_path, on_standby_loss="hold") as pair:
        pair.protect()
        pair.talk(3)
        assert pair.a.loop
        assert pair.b.daemon
        ledger = pair.b.daemon.host.ledger
        put = ledger.put

        def full(*_: Any) -> None:
            raise LedgerError("No space left on device")

        monkeypatch.setattr(ledger, "put", full)
        # a's daemon stands still, as if dead, until b has taken over.
        stands = threading.Event()
        pair.a.loop.loop.call_soon_threadsafe(stands.wait, 60)
        await_true(lambda: "takeover" in pair.b.events("web"), "b took over")
        await_true(lambda: pair.b.daemon and not pair.b.daemon.sessions, "and is done with that")
        assert roles(pair.b) == ["standby"]
        stands.set()
        await_true(lambda: "moved" in pair.a.events("web"), "a learns of it")
        assert "web" not in pair.a.hypervisor.guests
        assert "unprotected" not in pair.a.events("web")
        monkeypatch.setattr(ledger, "put", put)
        await_true(lambda: roles(pair.b) == ["owner"], "the takeover is recorded after all")
        pair.talk(3)
        pair.check_answers()
        said = pair.a.request("status", domain="web")[0]
        assert (said["state"], said["generation"]) == ("moved", 2)


# ---- A daemon that was killed at the end of a revival ----


@pytest.mark.parametrize(("role", "generation"), [(Role.STANDBY, 1), (Role.CLAIMED, 2)])
def test_a_guest_that_was_revived_but_not_let_run_runs_after_the_restart(
    tmp_path: Path, role: Role, generation: int
) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        pair.a.power_cut()
        await_true(lambda: "takeover" in pair.b.events("web"), "b took over")
        assert pair.b.daemon
        ledger = pair.b.daemon.host.ledger
        guest = pair.b.hypervisor.guests["web"]
        guest.paused = True
        ledger.forget(guest.description.uuid)
        ledger.put(Record(guest.description.uuid, "web", role, generation, peer="a", came_from="a"))
        pair.b.kill()
        pair.b.start()
        assert roles(pair.b) == ["owner"]
        pair.talk(3)
        pair.check_answers()


@pytest.mark.parametrize(("point", "role"), [("revived", "claimed"), ("settle", "owner")])
def test_a_guest_whose_daemon_was_killed_before_it_was_named_is_named_by_the_next(
    tmp_path: Path, point: str, role: str
) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        pair.b.cut_at(point, act=pair.b.kill)
        pair.a.power_cut()
        await_true(lambda: pair.b.loop and not pair.b.loop.thread.is_alive(), "b's daemon is dead")
        assert roles(pair.b) == [role]
        assert pair.b.hypervisor.unsettled == {"web"}
        pair.b.hypervisor.reached = lambda point: None
        pair.b.start()
        assert pair.b.hypervisor.unsettled == set()
        (said,) = [each for each in pair.b.request("log") if each["event"] == "cleaned"]
        assert said["text"] == "web still had the name of its shell: it has its own now"
        pair.talk(3)
        pair.check_answers()


def test_a_guest_that_cannot_be_named_runs_all_the_same(tmp_path: Path) -> None:
    """By its shell's name, until the daemon is started again."""

    def refuse(point: str) -> None:
        if point == "settle":
            raise CheckpointError("xl rename failed")

    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        pair.b.hypervisor.reached = refuse
        pair.a.power_cut()
        pair.talk(3)
        await_true(lambda: "takeover" in pair.b.events("web"), "b took over")
        for turn in (refuse, lambda point: None):
            pair.b.stop()
            pair.b.hypervisor.reached = turn
            pair.b.start()
            said = [each["text"] for each in pair.b.request("log") if each["event"] == "trouble"]
            assert said[-1] == "could not name web: xl rename failed"
        assert pair.b.hypervisor.unsettled == set()
        pair.talk(3)
        pair.check_answers()


# ---- A protection that comes about again by itself ----


def test_a_stop_ends_a_protection_that_is_coming_about_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "AGAIN", 0.05)
    monkeypatch.setattr(daemon, "AGAIN_LIMIT", 0.05)
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        pair.b.power_cut()
        await_true(lambda: pair.a.state("web") == "unprotected", "a goes on alone")
        copying, go_on = threading.Event(), threading.Event()

        def reached(point: str) -> None:
            if point == "copy_live" and pair.a.state("web") == "copying":
                copying.set()
                go_on.wait(60)

        pair.a.hypervisor.reached = reached
        pair.b.power_on()
        await_true(copying.is_set, "the copy is under way")
        pair.a.hypervisor.reached = lambda point: None
        stopping = threading.Thread(target=pair.a.request, args=("stop",), kwargs={"domain": "web"})
        assert pair.a.daemon
        protection = pair.a.daemon.protections["web"]
        stopping.start()
        await_true(lambda: protection.stopped, "it is being stopped")
        go_on.set()
        stopping.join()
        tasks = pair.a.daemon.host.tasks
        await_true(
            lambda: all(task.done() for task in list(tasks) if task.get_name() == "web: again"),
            "nobody tries it again",
        )
        assert pair.a.daemon.again == {}
        assert pair.a.daemon.protections == {}
        assert pair.a.state("web") == ""
        pair.talk(3)
        pair.check_answers()


# ---- A promise that is owed ----


def owes(machine: Machine) -> bool:
    """Whether a standby of the machine has yet to promise that it stands down."""
    assert machine.daemon
    return any(stragglers.OWED in record.options for record in machine.daemon.host.ledger)


def test_a_host_that_stands_by_again_is_no_second_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "AGAIN", 0.05)
    monkeypatch.setattr(daemon, "AGAIN_LIMIT", 0.05)
    monkeypatch.setattr(stragglers, "PACE", 0.05)
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        pair.b.power_cut()
        await_true(lambda: owes(pair.a), "a let output go without a promise")
        assert pair.a.daemon
        peers = pair.a.daemon.peers
        ask = peers.ask_to_stand_down
        copying, go_on = threading.Event(), threading.Event()

        async def unlucky(*question: Any) -> Answer:
            return await ask(*question) if copying.is_set() else Answer()

        def reached(point: str) -> None:
            if point == "copy_live":
                copying.set()
                go_on.wait(60)

        monkeypatch.setattr(peers, "ask_to_stand_down", unlucky)
        pair.a.hypervisor.reached = reached
        pair.b.power_on()
        await_true(lambda: not owes(pair.a), "b has given up the old generation")
        assert pair.a.state("web") == "copying"
        go_on.set()
        await_true(lambda: pair.a.state("web") == "protected", "it is protected again")
        assert "two-owners" not in pair.a.events("web")
        assert "stood-down" in pair.a.events("web")


def test_two_owners_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stragglers, "PACE", 0.05)
    with Pair(tmp_path, on_standby_loss="release") as pair:
        pair.protect()
        pair.talk(3)
        pair.fabric.unplugged |= {"link", "lan"}
        await_true(lambda: owes(pair.a), "a lets output go")
        await_true(lambda: "takeover" in pair.b.events("web"), "b took over")
        pair.fabric.unplugged.clear()
        await_true(lambda: "two-owners" in pair.a.events("web"), "a says so")
        assert "b runs web as well, since generation 2" in str(pair.a.request("log"))
