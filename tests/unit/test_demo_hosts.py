# SPDX-License-Identifier: Apache-2.0
"""Asking ``kemari`` on a host, and following its events, with this machine in the host's place."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vagrant.demolib import hosts
from vagrant.demolib.hosts import Events, bring_back, domains, kemari
from vagrant.lablib.errors import LabError
from vagrant.lablib.ssh import Result

LIST = """\
Name                                        ID   Mem VCPUs\tState\tTime(s)
Domain-0                                     0   900     1     r-----      33.3
demo                                         1   128     1     -b----       2.5
other--kemari                                7   128     1     --p---       0.0
"""


class Here:
    """Runs what a host should run on this machine."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.power = True
        self.booted: Callable[[], None] = lambda: None
        self.ssh_client = SimpleNamespace(argv=lambda _host: ["sh", "-c"])

    def host(self, _name: str) -> SimpleNamespace:
        return SimpleNamespace(is_running=self.power)

    def ssh(self, _name: str, _command: str) -> Result:
        return Result(0, LIST, "")

    def boot(self, _name: str) -> None:
        self.booted()


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(hosts, "EVENT_LOG", str(tmp_path / "events.jsonl"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Here(tmp_path)


def fake_kemari(lab: Here, script: str) -> None:
    program = lab.state / "kemari"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def tell(lab: Here, *names: str, **values: Any) -> None:
    with (lab.state / "events.jsonl").open("a") as log:
        for name in names:
            log.write(json.dumps({"event": name, "text": f"{name}!", **values}) + "\n")


# ---- kemari ----------------------------------------------------------------------------------


def test_a_command_gets_json_and_its_words_arrive_whole(lab: Any) -> None:
    fake_kemari(lab, 'printf \'["%s", "%s", "%s"]\' "$1" "$2" "$3"; echo said >&2')
    reply = kemari(lab, "a", "start", "a b; c")
    assert reply == hosts.Reply(0, ["start", "a b; c", "--json"], "said\n")


def test_a_command_that_fails_raises_its_own_sentence(lab: Any) -> None:
    fake_kemari(lab, 'echo \'{"error": {"code": "x", "text": "It has a disk."}}\'; exit 1')
    with pytest.raises(LabError, match=r"on host a failed with exit status 1: It has a disk\."):
        kemari(lab, "a", "start", "demo", "b")
    assert kemari(lab, "a", "start", "demo", "b", check=False).status == 1


def test_what_is_not_json_is_kept_as_what_was_said(lab: Any) -> None:
    fake_kemari(lab, "echo Traceback; exit 3")
    reply = kemari(lab, "a", "list", check=False)
    assert (reply.status, reply.value, reply.said) == (3, None, "Traceback\n")


def test_a_command_that_does_not_end_is_an_error(lab: Any) -> None:
    fake_kemari(lab, "exec sleep 60")
    with pytest.raises(LabError, match="did not end within 0 s"):
        kemari(lab, "a", "list", timeout=0.3)


def test_a_host_without_power_cannot_be_asked(lab: Any) -> None:
    lab.power = False
    with pytest.raises(LabError, match="Host a has no power"):
        kemari(lab, "a", "list")


def test_domains_are_all_but_dom0(lab: Any) -> None:
    assert domains(lab, "a") == {"demo": "-b----", "other--kemari": "--p---"}


# ---- Events ----------------------------------------------------------------------------------


def test_events_are_seen_from_the_first_on_and_as_they_come(lab: Any) -> None:
    tell(lab, "daemon", "start")
    events = Events(lab, "a")
    try:
        assert events.wait("start", timeout=30)["text"] == "start!"
        mark = events.seen
        tell(lab, "protected", number=1)
        assert events.wait("failed", "protected", since=mark, timeout=30)["number"] == 1
        assert [event["event"] for event in events.since(mark)] == ["protected"]
    finally:
        events.close()


def test_a_log_that_comes_later_and_a_line_cut_off_are_no_problem(lab: Any) -> None:
    events = Events(lab, "a")
    try:
        with (lab.state / "events.jsonl").open("a") as log:
            log.write('{"event": "prot\n')
        tell(lab, "ready")
        assert events.wait("ready", timeout=30)["text"] == "ready!"
        assert events.seen == 1
    finally:
        events.close()


def test_what_does_not_come_is_an_error_that_tells_what_came(lab: Any) -> None:
    tell(lab, "daemon")
    events = Events(lab, "b")
    try:
        events.wait("daemon", timeout=30)
        with pytest.raises(LabError, match="Host b told of no event takeover") as caught:
            events.wait("takeover", timeout=0.1)
        assert "daemon: daemon!" in caught.value.details
    finally:
        events.close()


def test_the_end_of_the_connection_ends_the_wait(lab: Any) -> None:
    tell(lab, "daemon")
    lab.ssh_client.argv = lambda _host: ["true"]
    events = Events(lab, "a")
    try:
        with pytest.raises(LabError, match="the connection ended"):
            events.wait("daemon", timeout=30)
    finally:
        events.close()


def test_bringing_back_waits_for_what_comes_after_the_boot(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    tell(lab, "moved", time=500.0)
    with pytest.raises(LabError, match="no event moved"):
        bring_back(lab, "a", timeout=0.5)
    lab.booted = lambda: tell(lab, "daemon", "moved", time=1001.0)
    bring_back(lab, "a", timeout=30)
