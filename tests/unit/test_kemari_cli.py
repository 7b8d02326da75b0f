# SPDX-License-Identifier: Apache-2.0
"""The command line, as a person and as a script see it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kemari.cli import cli
from tests.unit.kemari_pair import Pair

ROOT = Path(__file__).parents[2]


def kemari(pair: Pair, host: str, *arguments: str) -> Result:
    """Run the command on a host."""
    socket = str(pair.machines[host].config.paths.socket)
    return CliRunner().invoke(cli, ["--socket", socket, *arguments])


def test_a_life_on_the_command_line(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        started = kemari(pair, "a", "start", "web", "b", "-i", "500", "--progress")
        assert started.exit_code == 0, started.output
        assert "web is protected to b (first copy" in started.output
        assert "round 1: 100 % of 64 pages" in started.output
        pair.talk(3)

        status = kemari(pair, "a", "status", "web")
        assert "web: protected, runs on a, standby b" in status.output
        assert "checkpoints" in status.output
        value = json.loads(kemari(pair, "a", "status", "web", "--json").output)
        assert value[0]["options"]["interval_ms"] == 500

        listed = kemari(pair, "a", "list").output.splitlines()
        assert listed[0].split() == ["GUEST", "ROLE", "STATE", "PEER", "GENERATION"]
        assert listed[1].split() == ["web", "primary", "protected", "b", "1"]
        assert "web: runs on a, b stands by (ready)" in kemari(pair, "b", "status").output

        moved = kemari(pair, "a", "failover", "web")
        assert moved.exit_code == 0, moved.output
        assert "web runs on b, unprotected" in moved.output
        assert "web: runs on b; a must not run it" in kemari(pair, "a", "status").output
        assert "web: runs on b UNPROTECTED, came from a" in kemari(pair, "b", "status").output

        assert kemari(pair, "b", "start", "web", "a", "--no-progress").exit_code == 0
        stopped = kemari(pair, "b", "stop", "web", "--json")
        assert json.loads(stopped.output)["guest"] == "web"
        log = kemari(pair, "b", "log", "web").output
        assert "a handed it over" in log
        entries = json.loads(kemari(pair, "b", "log", "-n", "2", "--json").output)
        assert len(entries) == 2


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("stop", "web"), 4, "kemari: web is not protected on a"),
        (("status", "web"), 4, "kemari: web is not protected on a"),
        (("failover", "web"), 4, "kemari: web is not protected on a"),
        (("start", "none", "b"), 1, "kemari: Domain none does not exist"),
        (("start", "web", "127.0.0.1:1"), 5, "kemari: No kemarid answers"),
        (("start", "web", "b", "-i", "5"), 2, "5 is not in the range 10<=x<=60000"),
        (("start", "web"), 2, "Missing argument 'STANDBY'"),
        (("dance",), 2, "No such command 'dance'"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_a_status(
    tmp_path: Path, arguments: tuple[str, ...], status: int, text: str
) -> None:
    with Pair(tmp_path) as pair:
        pair.fabric.where["127.0.0.1", 1] = ("b", "link")
        result = kemari(pair, "a", *arguments)
        assert result.exit_code == status, result.output
        assert text in result.output
        if status != 2:
            assert len(result.output.strip().splitlines()) == 1


def test_errors_as_json(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        result = kemari(pair, "a", "stop", "web", "--json")
        error = json.loads(result.output.splitlines()[0])["error"]
        assert error["code"] == "no-such-protection"


def test_no_daemon(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["--socket", str(tmp_path / "none"), "list"])
    assert result.exit_code == 3
    assert "kemarid does not answer on" in result.output


def test_nothing_known(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        assert kemari(pair, "a", "list").output == ""
        assert kemari(pair, "a", "list", "--json").output == "[]\n"
        assert kemari(pair, "a", "status").output == "No guest is protected here.\n"


def test_doctor_names_what_is_missing(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        findings = json.loads(kemari(pair, "a", "doctor", "none", "--json").output)
        by_name = {finding["check"]: finding for finding in findings}
        assert by_name["kemarid"]["ok"] is True
        assert by_name["b"]["text"].startswith("b answers as host b")
        assert by_name["none"] == {
            "check": "none",
            "ok": False,
            "text": "Domain none does not exist",
        }
        assert json.loads(kemari(pair, "a", "doctor", "web", "--json").output)[-1]["ok"] is True
        pair.protect()
        pair.a.hypervisor.reached = _refuse_to_be_opened
        assert json.loads(kemari(pair, "a", "doctor", "web", "--json").output)[-1]["ok"] is True
        pair.talk(3)


def _refuse_to_be_opened(point: str) -> None:
    assert point != "open_source", "a protected guest was opened a second time"


def test_completion_of_guests(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        socket = str(pair.a.config.paths.socket)
        result = CliRunner().invoke(
            cli,
            env={
                "_KEMARI_COMPLETE": "bash_complete",
                "COMP_WORDS": f"kemari --socket {socket} status w",
                "COMP_CWORD": "4",
            },
            prog_name="kemari",
        )
        assert "plain,web" in result.output


def test_every_command_is_documented_and_completed() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    manual = (ROOT / "dom0-tools" / "man" / "kemari.1").read_text()
    completion = (ROOT / "dom0-tools" / "completion" / "kemari").read_text()
    for name, command in cli.commands.items():
        assert f"`kemari {name}" in page
        assert name in manual
        assert name in completion
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and option != "--json":
                    assert option in completion, f"{name} {option} is not completed"
                    assert option in manual.replace("\\-", "-"), f"{name} {option} has no manual"


def test_the_command_line_starts_quickly() -> None:
    """What a slow machine would feel: none of the heavy modules is imported for a command."""
    code = (
        "import sys, kemari.cli\n"
        "heavy = {'asyncio', 'cffi', 'pyroute2', 'zstandard', 'lz4', 'checkpoint.xen', 'ssl'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"
