# SPDX-License-Identifier: Apache-2.0
"""What a host keeps of a guest that it has nothing to do with any more, and how it forgets."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from diskbuffer import metadata
from kemari.cli import cli
from kemari.errors import KemariError, NoSuchProtection, Refused
from kemari.leftovers import Leftovers
from tests.unit.kemari_disk_pair import SIZE, DiskPair
from tests.unit.kemari_pair import Machine, Pair, await_true


def known(machine: Machine) -> list[str]:
    """Guests that a host lists."""
    return [entry["guest"] for entry in machine.request("list")]


# ---- Without disks ----


def test_what_is_not_known_cannot_be_forgotten(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair, pytest.raises(NoSuchProtection, match="a keeps nothing of web"):
        pair.a.request("forget", domain="web")


@pytest.mark.parametrize("force", [False, True])
def test_a_guest_that_is_protected_is_not_forgotten(tmp_path: Path, force: bool) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        with pytest.raises(Refused, match="web is protected, to b; expected it stopped"):
            pair.a.request("forget", domain="web", force=force)
        with pytest.raises(Refused, match="web has this host as its standby; expected it stopped"):
            pair.b.request("forget", domain="web", force=force)
        pair.talk(3)
        pair.check_answers()


def test_a_guest_that_waits_to_be_protected_again_is_not_forgotten(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.b.power_cut()
        daemon = pair.a.daemon
        assert daemon is not None
        await_true(lambda: "web" in daemon.again, "b is given up")
        with pytest.raises(Refused, match="is to be protected again"):
            pair.a.request("forget", domain="web", force=True)


def test_a_guest_that_has_moved_away_is_forgotten_while_it_runs_there(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.a.request("failover", domain="web")
        assert known(pair.a) == ["web"]
        socket = str(pair.a.config.paths.socket)
        result = CliRunner().invoke(cli, ["--socket", socket, "forget", "web"])
        assert result.output == "a has forgotten web\n"
        assert known(pair.a) == []
        assert "forgotten" in pair.a.events("web")
        with pytest.raises(Refused, match="web runs on b; expected it shut down"):
            pair.b.request("forget", domain="web", force=True)
        pair.b.request("start", domain="web", standby="a")
        pair.talk(3)
        pair.b.power_cut()
        pair.talk(3)
        pair.check_answers()


def test_it_takes_force_where_the_other_host_does_not_say_that_the_guest_runs(
    tmp_path: Path,
) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.a.request("failover", domain="web")
        pair.b.hypervisor.destroy_domain("web")
        with pytest.raises(Refused, match="the only good copy: it does not run on b; expected"):
            pair.a.request("forget", domain="web")
        pair.b.power_cut()
        with pytest.raises(Refused, match="the only good copy: b gives no answer; expected"):
            pair.a.request("forget", domain="web")
        assert known(pair.a) == ["web"]
        assert pair.a.request("forget", domain="web", force=True)["guest"] == "web"
        assert known(pair.a) == []


def test_a_promise_that_was_kept_is_forgotten_at_once(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.a.request("stop", domain="web")
        await_true(lambda: not pair.b.hypervisor.shells, "b removed the shell")
        pair.a.power_cut()
        assert known(pair.b) == []
        assert pair.b.request("forget", domain="web")["disks"] == []
        with pytest.raises(NoSuchProtection):
            pair.b.request("forget", domain="web")


@pytest.mark.parametrize("side", ["a", "b"])
def test_no_protection_begins_while_a_guest_is_being_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    said = []

    with Pair(tmp_path) as pair:
        pair.protect()
        pair.a.request("stop", domain="web")
        await_true(lambda: not pair.b.hypervisor.shells, "b removed the shell")

        def start() -> None:
            with pytest.raises(KemariError) as caught:
                pair.protect()
            with pytest.raises(Refused, match="web is being forgotten; expected it stopped"):
                pair.machines[side].request("forget", domain="web")
            said.append(str(caught.value))

        async def meanwhile(self: Leftovers, disks: bool) -> None:
            await asyncio.to_thread(start)

        monkeypatch.setattr(Leftovers, "_require_another_copy", meanwhile)
        if side == "a":
            # Its guest runs there, which would be reason enough.
            monkeypatch.setattr(pair.a.hypervisor, "domain_exists", lambda name: False)
        pair.machines[side].request("forget", domain="web")
    assert "web" in said[0]
    assert "is being forgotten just now" in said[0] or "b is forgetting web just now" in said[0]


# ---- With disks ----


@pytest.fixture
def pair() -> Iterator[DiskPair]:
    """A guest whose protection was stopped; b keeps a copy of its disk."""
    # Not tmp_path: the name of a socket has 108 bytes at most.
    with tempfile.TemporaryDirectory(prefix="kf") as name:
        pair = DiskPair(Path(name))
        pair.sides["a"].serve()
        with pair:
            pair.protect()
            pair.talk(3)
            pair.a.request("stop", domain="web")
            await_true(lambda: known(pair.b) == ["web"], "b has stood down")
            yield pair


def status(machine: Machine) -> dict[str, Any]:
    """What is said of the guest."""
    found: dict[str, Any] = machine.request("status", domain="web")[0]
    return found


def test_a_copy_of_a_disk_is_kept_until_it_is_forgotten(pair: DiskPair) -> None:
    side = pair.sides["b"]
    kept = metadata.load(side.server.state / "state.json")
    assert kept is not None
    assert (kept.role, kept.guest) == (metadata.Role.REPLICA, status(pair.b)["uuid"])
    assert (status(pair.b)["role"], status(pair.b)["state"]) == ("none", "released")
    socket = str(pair.b.config.paths.socket)
    shown = CliRunner().invoke(cli, ["--socket", socket, "status"]).output
    assert "web: b stands by no more for a, and keeps copies of its disks" in shown

    with pytest.raises(Refused, match="is in use on b; expected no domain"):
        pair.b.request("forget", domain="web", force=True)
    side.stop()  # as the hotplug script does when the shell is removed
    result = CliRunner().invoke(cli, ["--socket", socket, "forget", "web", "--json"])
    assert json.loads(result.output)["disks"] == [str(side.server.target)]
    assert known(pair.b) == []
    assert metadata.load(side.server.state / "state.json") is None
    side.serve()
    assert side.client is not None
    side.client.write(0, b"somebody else's")

    pair.protect()
    (copied,) = pair.a.status("web")["progress"]["disks"]
    assert copied["total"] == SIZE, "it is copied whole"


def test_a_copy_that_may_be_the_only_good_one_takes_force(pair: DiskPair) -> None:
    pair.sides["b"].stop()
    pair.a.power_cut()
    with pytest.raises(Refused, match="the only good copy: a gives no answer; expected"):
        pair.b.request("forget", domain="web")
    assert metadata.load(pair.sides["b"].server.state / "state.json") is not None
    pair.b.request("forget", domain="web", force=True)
    assert metadata.load(pair.sides["b"].server.state / "state.json") is None
