# SPDX-License-Identifier: Apache-2.0
"""The lab's processes, options and errors, without hosts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vagrant.lablib import cli
from vagrant.lablib.errors import LabError
from vagrant.lablib.guest import GuestOptions
from vagrant.lablib.host import Machine
from vagrant.lablib.lab import Lab, Options
from vagrant.lablib.process import Remembered


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_a_remembered_process_is_found_and_ended(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    file = tmp_path / "process.json"
    Remembered(file).note(sleeper.pid)
    assert Remembered(file).pid == sleeper.pid
    assert Remembered(file).kill()
    assert sleeper.wait(timeout=60) == -9
    assert Remembered(file).pid is None
    assert not Remembered(file).kill()


def test_a_stranger_with_the_same_number_is_left_alone(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    file = tmp_path / "process.json"
    remembered = Remembered(file)
    remembered.note(sleeper.pid)
    noted = json.loads(file.read_text())
    noted["began"] = str(int(noted["began"]) - 1)
    file.write_text(json.dumps(noted))
    assert remembered.pid is None
    assert not remembered.kill()
    assert sleeper.poll() is None


def test_a_process_that_has_ended_is_not_remembered(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(LabError, match="ended at once"):
        Remembered(tmp_path / "process.json").note(process.pid)


def test_options_are_read_as_they_were_written() -> None:
    options = Options(
        "trixie",
        Machine(memory_mib=2048, cpus=2, dom0_cpus=1),
        GuestOptions(vcpus=2, memory_mib=256, extra='a "quoted" one', kernel=Path("/k")),
        project=False,
    )
    assert Options.from_json(options.to_json()) == options
    assert Options.from_json(Options().to_json()) == Options()


@pytest.mark.parametrize(("cpus", "dom0"), [(0, 0), (1, 1), (2, 2), (2, -1)])
def test_guests_need_a_processor_that_is_not_dom0s_alone(
    tmp_path: Path, cpus: int, dom0: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--host-cpus", str(cpus), "--dom0-cpus", str(dom0)]
    assert cli.main(["--state", str(tmp_path), "up", *words]) == 1
    assert "expected at least one" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_lab_that_is_down_says_so(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "state")
    assert lab.status()["up"] is False
    with pytest.raises(LabError, match="Host a has no power; `lab boot a` starts it"):
        lab.ssh("a", "true")
    with pytest.raises(LabError, match="is down; `lab up` starts it"):
        lab.unplug("a", "lan")
    with pytest.raises(LabError, match="is down; `lab up` starts it"):
        lab.run_in_net(["true"])
    with pytest.raises(LabError, match="has no power already"):
        lab.power_cut("b")
    with pytest.raises(LabError, match="No host 'c' in the lab; expected a or b"):
        lab.power_cut("c")
    with pytest.raises(LabError, match="No link 'usb' in the lab; expected lan or repl"):
        lab.plug("a", "usb")
    with pytest.raises(LabError, match="There is no lab in"):
        assert lab.options
    lab.down()


def test_the_command_reports_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--state", str(tmp_path), "ssh", "a", "true"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1] == "lab: Host a has no power; `lab boot a` starts it."
    assert "Traceback" not in said.err


def test_status_is_for_people_and_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--state", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "host a: no power"
    assert cli.main(["status", "--json", "--state", str(tmp_path)]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["hosts"]["b"] == {"power": False, "pid": None, "unplugged": []}


def test_a_wrong_word_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["unplug", "a", "usb"])
    assert caught.value.code == 2
    assert "lan" in capsys.readouterr().err


def test_needed_packages_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["packages"]) == 0
    assert {"mmdebstrap", "qemu-system-x86", "qemu-utils"} <= set(capsys.readouterr().out.split())
