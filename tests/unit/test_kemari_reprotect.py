# SPDX-License-Identifier: Apache-2.0
"""After a failover the guest is protected again, by itself, to the host that it came from."""

from __future__ import annotations

import errno
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoint.errors import CheckpointError, ProtocolError
from checkpoint.memory import MemoryHypervisor, MemorySource
from diskbuffer import durable
from kemari import daemon, recovery
from kemari.config import Options
from kemari.errors import KemariError, NoSuchProtection, Refused
from kemari.ledger import Record, Role
from kemari.ownership import offered_options, recorded_options
from tests.unit.kemari_pair import Machine, Pair, await_true
from tests.unit.patience import PATIENCE


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "AGAIN", 0.05)
    monkeypatch.setattr(daemon, "AGAIN_LIMIT", 0.05)


def await_protected(machine: Machine, peer: str) -> dict[str, Any]:
    """Until the guest that runs there is protected to that host."""

    def protected() -> dict[str, Any] | None:
        status = machine.status("web") if machine.state("web") else {}
        return status if status.get("role") == "primary" and status["protected"] else None

    status: dict[str, Any] = await_true(protected, f"{machine.name} protects it to {peer}")
    assert status["peer"] == peer
    return status


def await_owner(machine: Machine) -> None:
    """Until the guest runs there."""
    await_true(lambda: machine.hypervisor.guests.get("web"), f"{machine.name} runs it")


def recorded(machine: Machine) -> dict[str, Any]:
    """The options in the guest's record."""
    assert machine.daemon
    record = machine.daemon.host.ledger.by_name("web")
    assert record is not None
    return record.options


def full(*_: object) -> None:
    """What writes a file fails."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_power_cuts_to_and_fro_need_no_administrator(tmp_path: Path) -> None:
    with Pair(tmp_path, reprotect=True) as pair:
        pair.protect(interval_ms=70, pace="throughput", compression="zstd")
        primary, standby = pair.a, pair.b
        for _ in range(3):
            pair.talk(5)
            primary.power_cut()
            pair.talk(5)
            primary.power_on()
            status = await_protected(standby, primary.name)
            assert status["options"] == {
                "interval_ms": 70,
                "interval_only": False,
                "pace": "throughput",
                "compression": "zstd",
            }
            primary, standby = standby, primary
        pair.check_answers()


def test_attempts_in_vain_are_no_protection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise CheckpointError("no room on a")

    with Pair(tmp_path, reprotect=True) as pair:
        pair.protect()
        pair.talk(3)
        pair.a.power_cut()
        await_owner(pair.b)
        monkeypatch.setattr(MemoryHypervisor, "create_shell", no_room)
        pair.a.power_on()

        def tried() -> bool:
            known = pair.b.daemon.protections.get("web") if pair.b.daemon else None
            return known is not None and known.only_tried

        await_true(tried, "b tries to protect it")
        await_true(
            lambda: any("no room on a" in each["text"] for each in pair.b.request("log")),
            "a has said why not",
        )
        status = pair.b.status("web")
        assert (status["role"], status["state"], status["came_from"]) == (
            "owner",
            "unprotected",
            "a",
        )
        assert status["why"].endswith("; to be protected again when a is back")
        assert [each["state"] for each in pair.b.request("list")] == ["unprotected"]


def test_a_planned_move_keeps_the_protection(tmp_path: Path) -> None:
    with Pair(tmp_path, reprotect=True) as pair:
        pair.protect()
        pair.talk(3)
        pair.a.request("failover", domain="web")
        await_protected(pair.b, "a")
        assert pair.a.status("web")["role"] == "standby"
        pair.talk(3)
        pair.b.power_cut()
        pair.talk(3)
        pair.check_answers()


def test_a_restarted_daemon_remembers(tmp_path: Path) -> None:
    with Pair(tmp_path, reprotect=True) as pair:
        pair.protect()
        pair.talk(3)
        pair.a.power_cut()
        await_true(lambda: pair.b.state("web") == "unprotected", "b has recorded that it runs it")
        pair.b.kill()
        pair.b.start()
        pair.a.power_on()
        await_protected(pair.b, "a")
        pair.talk(3)
        pair.check_answers()


@pytest.mark.parametrize("role", [Role.STANDBY, Role.CLAIMED])
def test_a_daemon_restarted_in_front_of_a_full_disk_protects_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    """It finds the guest running after a takeover that its ledger has not, or not to the end."""
    monkeypatch.setattr(recovery, "PATIENT_PACE", 0.05)
    with Pair(tmp_path, reprotect=True) as pair:
        pair.protect()
        pair.talk(3)
        pair.a.power_cut()
        await_true(lambda: pair.b.state("web") == "unprotected", "b has recorded that it runs it")
        assert pair.b.daemon
        ledger = pair.b.daemon.host.ledger
        record = ledger.by_name("web")
        assert record is not None
        pair.b.kill()
        ledger.forget(record.uuid)
        ledger.put(replace(record, role=role, generation=1 + (role is Role.CLAIMED)))
        with monkeypatch.context() as patch:
            patch.setattr(durable, "replace", full)
            pair.b.start()
            assert pair.b.daemon
            found = pair.b.daemon.host.ledger.by_name("web")
            assert found is not None
            assert found.role is role
        pair.a.power_on()
        await_protected(pair.b, "a")
        pair.talk(3)
        pair.check_answers()


def test_who_does_not_want_it_has_none(tmp_path: Path) -> None:
    with Pair(tmp_path, reprotect=False) as pair:
        pair.protect()
        pair.a.request("failover", domain="web")
        assert pair.b.daemon
        assert pair.b.daemon.again == {}
        assert recorded(pair.b)["resume"] is False


@pytest.mark.parametrize("killed", ["a", "b"])
def test_a_daemon_killed_before_it_tries_again_leaves_the_wish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    """It has recorded that the guest runs on unprotected, and done nothing more."""
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        with monkeypatch.context() as patch:
            patch.setattr(daemon.Daemon, "_protect_again", lambda *_, **__: None)
            pair.machines[killed].kill()
            pair.machines[killed].start()
            await_true(lambda: pair.a.events("web").count("unprotected"), "a has recorded it")
            pair.talk(3)
            pair.a.kill()
        pair.a.start()
        await_protected(pair.a, "b")
        pair.talk(3)
        pair.check_answers()


def test_a_start_in_vain_leaves_the_wish_as_it_was(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.lose_standby()
        await_true(lambda: pair.a.daemon and pair.a.daemon.again, "it is to be protected again")
        with pytest.raises(KemariError, match="No kemarid answers"):
            pair.protect()
        await_true(lambda: pair.a.daemon and pair.a.daemon.again, "it still is")
        pair.b.power_on()
        await_protected(pair.a, "b")


def test_what_was_stopped_while_the_standby_was_asked_stays_so(tmp_path: Path) -> None:
    with Pair(tmp_path, on_standby_loss="hold") as pair:
        pair.lose_standby()
        await_true(lambda: pair.a.status("web")["state"] == "holding", "held")
        pair.a.request("stop", domain="web", force=True)
        pair.talk(3)
        assert recorded(pair.a)["resume"] is False
        assert pair.a.daemon
        assert pair.a.daemon.again == {}
        assert pair.a.daemon.protections == {}


def test_a_full_disk_does_not_keep_a_stop_from_letting_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pair(tmp_path, on_standby_loss="hold") as pair:
        pair.lose_standby()
        await_true(lambda: pair.a.status("web")["state"] == "holding", "held")
        with monkeypatch.context() as patch:
            patch.setattr(durable, "replace", full)
            with pytest.raises(KemariError, match="No space left"):
                pair.a.request("stop", domain="web", force=True)
        await_true(lambda: not pair.a.network.buffers, "nothing is held")
        pair.talk(3)
        pair.check_answers()


def test_a_guest_that_ended_unprotected_is_another_when_it_is_started(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.lose_standby()
        await_true(lambda: pair.a.daemon and pair.a.daemon.again, "it is to be protected again")
        assert recorded(pair.a)["resume"] is True
        pair.a.hypervisor.guests.pop("web")
        await_true(lambda: pair.a.daemon and not pair.a.daemon.again, "a has noticed", 30)
        await_true(lambda: recorded(pair.a)["resume"] is False, "and recorded it")
        assert pair.a.events("web")[-1] == "guest-gone"


@pytest.mark.parametrize("good", [True, False], ids=["restarted", "killed"])
def test_what_was_stopped_stays_so(tmp_path: Path, good: bool) -> None:
    with Pair(tmp_path, reprotect=True) as pair:
        pair.protect()
        pair.talk(3)
        pair.a.power_cut()
        await_owner(pair.b)
        await_true(lambda: pair.b.daemon and pair.b.daemon.again, "it is to be protected again")
        said = pair.b.request("stop", domain="web")
        assert said["text"] == "web is not protected again"
        assert recorded(pair.b)["resume"] is False
        (pair.b.stop if good else pair.b.kill)()
        pair.b.start()
        assert pair.b.daemon
        assert pair.b.daemon.again == {}
        with pytest.raises(NoSuchProtection):
            pair.b.request("stop", domain="web")


def test_a_start_that_finds_it_under_way_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, go_on = threading.Event(), threading.Event()
    track = MemorySource.track

    def slow(source: MemorySource) -> None:
        copies.set()
        assert go_on.wait(PATIENCE)
        track(source)

    with Pair(tmp_path, reprotect=True) as pair:
        pair.protect()
        monkeypatch.setattr(MemorySource, "track", slow)
        pair.a.request("failover", domain="web")
        assert copies.wait(PATIENCE)
        with pytest.raises(Refused, match="web is connecting already, to a"):
            pair.b.request("start", domain="web", standby="a", interval_ms=90)
        found: list[dict[str, Any]] = []
        asked = threading.Thread(
            target=lambda: found.append(pair.b.request("start", domain="web", standby="a"))
        )
        asked.start()
        go_on.set()
        asked.join(PATIENCE)
        assert [(each["protected"], each["generation"]) for each in found] == [(True, 3)]
        assert pair.b.events("web").count("start") == 1


def test_a_start_that_finds_it_under_way_hears_that_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, go_on = threading.Event(), threading.Event()

    def slow(source: MemorySource) -> None:
        copies.set()
        assert go_on.wait(PATIENCE)

    with Pair(tmp_path, reprotect=True) as pair:
        pair.protect()
        monkeypatch.setattr(MemorySource, "track", slow)
        pair.a.request("failover", domain="web")
        assert copies.wait(PATIENCE)
        failed: list[Refused] = []

        def ask() -> None:
            with pytest.raises(Refused) as caught:
                pair.b.request("start", domain="web", standby="a")
            failed.append(caught.value)

        asked = threading.Thread(target=ask)
        asked.start()
        protection = pair.b.daemon.protections["web"] if pair.b.daemon else None
        assert protection is not None
        await_true(lambda: protection.coming.awaited, "somebody waits for it")
        stopped = threading.Thread(target=lambda: pair.b.request("stop", domain="web"))
        stopped.start()
        await_true(lambda: protection.stopped, "it is being stopped")
        go_on.set()
        for thread in (asked, stopped):
            thread.join(PATIENCE)
        assert [str(error) for error in failed] == ["web is not protected: stopped, as asked"]
        assert pair.b.daemon
        assert pair.b.daemon.again == {}
        assert recorded(pair.b)["resume"] is False


GOOD = {
    "interval_ms": 50,
    "interval_only": False,
    "pace": "latency",
    "compression": "lz4",
    "disks": [],
}


def test_a_guest_is_left_alone_while_its_standby_is_not_there(tmp_path: Path) -> None:
    reached: list[str] = []
    with Pair(tmp_path, reprotect=True) as pair:
        pair.protect()
        pair.b.hypervisor.reached = reached.append
        pair.a.power_cut()
        await_true(
            lambda: any("still UNPROTECTED" in each["text"] for each in pair.b.request("log")),
            "b has tried",
        )
        pair.talk(3)
        assert "open_source" not in reached
        pair.a.power_on()
        await_protected(pair.b, "a")
        assert "open_source" in reached


def test_a_standby_that_was_away_for_long_is_found_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "AGAIN_LIMIT", 1000.0)
    looked = 0
    reach = daemon.Daemon._reach

    async def counted(self: daemon.Daemon, standby: Any) -> None:
        nonlocal looked
        looked += 1
        await reach(self, standby)

    monkeypatch.setattr(daemon.Daemon, "_reach", counted)
    with Pair(tmp_path, reprotect=True) as pair:
        pair.protect()
        pair.b.kill()
        # If it doubled its pause each time it would now wait for minutes.
        await_true(lambda: looked > 14, "a has looked for b many times")
        pair.b.start()
        await_protected(pair.a, "b")


def test_the_primarys_options_are_taken_over() -> None:
    assert offered_options(GOOD) == Options(interval_ms=50, pace="latency")


def test_options_that_a_version_before_did_not_know_are_the_usual_ones(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect(interval_ms=70, pace="throughput")
        record = recorded(pair.a)
        del record["pace"]
        known = Record("u", "web", Role.PRIMARY, 1, options=record)
    assert recorded_options(known) == Options(interval_ms=70)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("interval_ms", 9),
        ("interval_ms", True),
        ("interval_ms", None),
        ("interval_only", 1),
        ("interval_only", "no"),
        ("pace", "fast"),
        ("pace", None),
        ("compression", "brotli"),
        ("compression", None),
    ],
)
def test_options_that_are_none_are_refused(key: str, value: object) -> None:
    with pytest.raises(ProtocolError, match=f"PREPARE.options has .*{key}"):
        offered_options(GOOD | {key: value})


def test_a_guest_that_came_back_to_its_first_host_is_the_owners(tmp_path: Path) -> None:
    with Pair(tmp_path, reprotect=True) as pair:
        pair.protect()
        for here, there in ((pair.a, pair.b), (pair.b, pair.a)):
            here.request("failover", domain="web")
            await_protected(there, here.name)
        assert pair.a.daemon
        record = pair.a.daemon.host.ledger.by_name("web")
        assert record is not None
        assert (record.role, record.generation) == (Role.PRIMARY, 5)
