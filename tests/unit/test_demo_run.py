# SPDX-License-Identifier: Apache-2.0
"""The demonstration from begin to end, with a service on this machine in place of two hosts."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.unit.demo_service import Service
from vagrant.demolib import demo, stage
from vagrant.demolib.hosts import Reply
from vagrant.demolib.report import KEYS
from vagrant.lablib.errors import LabError
from vagrant.lablib.guest import GuestOptions
from vagrant.lablib.ssh import Result


class Pretence:
    """Takes the lab's place: a power cut is a silence of the service.

    :ivar calls: what was done to the lab
    :ivar after_cut: what happens after the silence: "answers", "close" or "elsewhere"
    :ivar refusal: why ``kemari start`` fails, or ""
    """

    def __init__(self, state: Path, service: Service) -> None:
        self.state = state
        self.service = service
        self.calls: list[str] = []
        self.after_cut = "answers"
        self.refusal = ""
        self.guest_on = ""
        self.protected = False
        self.network = SimpleNamespace(is_up=False)
        self.hosts = {
            name: SimpleNamespace(is_running=False, console_log=state / f"host-{name}/console.log")
            for name in "ab"
        }

    # ---- as of a Lab ----

    def up(self, _options: object) -> None:
        self.calls.append("up")
        for host in self.hosts.values():
            host.is_running = True

    def down(self) -> None:
        self.calls.append("down")

    def install(self) -> None:
        self.calls.append("install")

    def reset(self) -> None:
        self.calls.append("reset")

    def guest_start(self, name: str, options: GuestOptions | None = None) -> None:
        self.calls.append(f"guest on {name}")
        self.guest_on = name

    def power_cut(self, name: str) -> None:
        self.calls.append(f"cut {name}")
        self.hosts[name].is_running = False
        self.protected = False
        self.service.answering.clear()
        threading.Timer(0.8, self._come_again).start()

    def ssh(self, name: str, command: str, **_options: object) -> Result:
        return Result(0, f"{command} on {name}\n", "")

    def net_argv(self, argv: Sequence[str]) -> list[str]:
        places = ["--address", "127.0.0.1", "--address", "::1", "--port", str(self.service.port)]
        return [*argv, *places, "--drain", "2"]

    # ---- the hosts' own part ----

    def _come_again(self) -> None:
        if self.after_cut == "close":
            self.service.misbehave = "close"
        self.guest_on = "b" if self.guest_on == "a" else "a"
        self.service.answering.set()

    def kemari(self, host: str, *words: str) -> Reply:
        self.calls.append(f"{host}: {' '.join(words)}")
        if words[0] == "start" and self.refusal:
            raise LabError(self.refusal)
        spread = {"p50": 5.0, "p99": 9.0, "max": 9.5, "last": 4.0}
        figures = {"checkpoints": 123, "pause_ms": spread, "wire_bytes": spread}
        self.protected = self.protected or words[0] == "start"
        role = "primary" if self.protected else "owner"
        return Reply(0, [{"role": role, "protected": True, "statistics": figures}], "")

    def domains(self, host: str) -> dict[str, str]:
        there = host == self.guest_on and self.after_cut != "elsewhere"
        return {"demo": "-b----"} if there else {}


@pytest.fixture
def pretence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretence]:
    service = Service()
    pretence = Pretence(tmp_path / "lab", service)

    class NoEvents:
        def __init__(self, _lab: Pretence, name: str) -> None:
            self._name = name

        def wait(self, name: str) -> None:
            pretence.calls.append(f"{self._name}: await {name}")

        def close(self) -> None:
            pretence.calls.append(f"{self._name}: heard")

    def kemari(_lab: Pretence, host: str, *words: str, **_options: Any) -> Reply:
        return pretence.kemari(host, *words)

    def back(_lab: Pretence, name: str) -> None:
        pretence.calls.append(f"boot {name}")
        pretence.hosts[name].is_running = True

    monkeypatch.setattr(demo, "Lab", lambda _state: pretence)
    monkeypatch.setattr(stage, "Events", NoEvents)
    for module in (demo, stage):
        monkeypatch.setattr(module, "kemari", kemari)

    def again(_lab: Pretence, host: str, name: str, after: float) -> None:
        pretence.calls.append(f"{host}: await {name}")
        pretence.protected = True

    monkeypatch.setattr(demo, "bring_back", back)
    monkeypatch.setattr(demo, "await_event", again)
    monkeypatch.setattr(stage, "domains", lambda _lab, name: pretence.domains(name))
    for name, value in (("UNPROTECTED", 10), ("SETTLED", 5), ("AFTERWARDS", 0.5)):
        monkeypatch.setattr(demo, name, value)
    yield pretence
    service.close()


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str, str]:
    """(exit status, the line of JSON, all standard output, all standard error)."""
    # Often enough that a machine which stands still for a moment leaves answers to judge clocks by.
    status = demo.main([*words, "--protected", "0.5", "--interval", "10"])
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]), out, err


def test_a_guest_that_goes_on_has_survived(
    pretence: Pretence, capsys: pytest.CaptureFixture[str]
) -> None:
    status, values, out, _ = run(capsys)
    assert status == 0
    assert list(values) == list(KEYS)
    assert values["result"] == "survived"
    assert values["failover_s"] >= 0.4  # on a busy machine it may be anything more
    assert values["checkpoints"] == 123
    assert values["pause_ms_p99"] == 9.0
    assert "answers again" in out
    calls = [call for call in pretence.calls if call not in ("a: heard", "b: heard")]
    assert calls == [
        "up",
        "a: await daemon",
        "b: await daemon",
        "guest on a",
        "a: start demo b --progress",
        "a: status demo",
        "cut a",
        "b: status demo",
        "down",
    ]
    root = ElementTree.parse(pretence.state / "out" / "demo.svg").getroot()
    texts = "".join(root.itertext())
    assert "power cut of host a" in texts
    assert "host b answers" in texts


def test_several_cuts_go_to_and_fro(pretence: Pretence, capsys: pytest.CaptureFixture[str]) -> None:
    status, values, out, _ = run(capsys, "--cuts", "2", "--json-only", "--keep")
    assert status == 0
    assert values["checkpoints"] == 246
    assert out.count("\n") == 1
    order = ["cut a", "boot a", "b: await protected", "cut b"]
    assert [call for call in pretence.calls if call in order] == order
    assert "down" not in pretence.calls


def test_a_lab_that_is_up_is_used_and_stays_up(
    pretence: Pretence, capsys: pytest.CaptureFixture[str]
) -> None:
    pretence.network.is_up = True
    status, _, _, _ = run(capsys)
    assert status == 0
    assert pretence.calls[:3] == ["up", "install", "reset"]
    assert "down" not in pretence.calls


def test_a_connection_that_breaks_has_failed(
    pretence: Pretence, capsys: pytest.CaptureFixture[str]
) -> None:
    pretence.after_cut = "close"
    status, values, _, err = run(capsys)
    assert status == 1
    assert values["result"] == "failed"
    assert values["same_connection"] is False
    assert values["lost"] > 0
    assert f"console {pretence.state}/host-b/console.log" in err
    assert (pretence.state / "out" / "kemarid-b.log").exists()
    assert pretence.calls[-1] == "down"


def test_a_guest_that_is_not_where_it_should_be_has_failed(
    pretence: Pretence, capsys: pytest.CaptureFixture[str]
) -> None:
    pretence.after_cut = "elsewhere"
    status, values, _, err = run(capsys)
    assert status == 1
    assert values["result"] == "failed"
    assert values["lost"] == 0
    assert "`xl list` on host b has no guest; expected demo" in err


def test_a_guest_that_cannot_be_protected_has_failed_and_the_lab_is_taken_down(
    pretence: Pretence, capsys: pytest.CaptureFixture[str]
) -> None:
    pretence.refusal = "the guest has a disk"
    status, values, _, err = run(capsys)
    assert status == 1
    assert values["result"] == "failed"
    assert values["failover_s"] is None
    assert values["checkpoints"] is None
    assert "demo: the guest has a disk" in err
    assert "cut a" not in pretence.calls
    assert pretence.calls[-1] == "down"


def test_no_cut_at_all_is_wrong_usage(pretence: Pretence) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--cuts", "0"])
    assert pretence.calls == []
