# SPDX-License-Identifier: Apache-2.0
"""Fault points: the list and the code agree, and a fault is armed only where that is allowed."""

from __future__ import annotations

import ast
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from checkpoint import audit, faultpoints
from checkpoint.faultpoints import GOT, POINTS, PUT
from kemari.errors import ConfigError
from kemari.faultpoints import Fault, Trigger, allowed, arm_from_environment, cut_connections, parse

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("checkpoint", "kemari", "netbuffer", "diskbuffer")


def _reached_in_code() -> set[str]:
    """Points named in calls of ``reach`` anywhere in the product."""
    found: set[str] = set()
    for package in _PACKAGES:
        for path in (_ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id == "reach"
                ):
                    found |= _named(node.args[0], path)
    return found


def _named(argument: ast.expr, path: Path) -> set[str]:
    match argument:
        case ast.Constant(value=str(name)):
            return {name}
        case ast.JoinedStr(values=[ast.Constant(value=str(begin)), ast.FormattedValue()]):
            # The simulation refuses a name that is not listed.
            return {name for name in POINTS if name.startswith(begin)}
        case ast.Subscript(value=ast.Name(id="PUT")):
            return set(PUT.values())
        case ast.Subscript(value=ast.Name(id="GOT")):
            return set(GOT.values())
    raise AssertionError(f"{path}: reach() takes the name of a point")


def test_every_point_in_the_code_is_listed_and_every_listed_one_is_in_the_code() -> None:
    assert _reached_in_code() == set(POINTS)


def test_every_point_is_explained() -> None:
    assert all(POINTS.values())
    done = subprocess.run(
        [sys.executable, "-m", "kemari.faultpoints"],
        capture_output=True,
        text=True,
        check=True,
        cwd=_ROOT,
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(POINTS)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("commit-sent:kill", Fault("commit-sent", "kill")),
        ("commit-sent:kill:3", Fault("commit-sent", "kill", nth=3)),
        ("ack-sent:stall:2.5", Fault("ack-sent", "stall", 2.5)),
        ("ack-sent:stall:2:4", Fault("ack-sent", "stall", 2.0, 4)),
        ("put-ack:cut", Fault("put-ack", "cut")),
    ],
)
def test_faults_are_read(text: str, fault: Fault) -> None:
    assert parse(text) == fault


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nowhere:kill", "'nowhere' is not a fault point"),
        ("commit-sent", "'' is not one of"),
        ("commit-sent:explode", "'explode' is not one of"),
        ("commit-sent:stall", "lacks a number"),
        ("commit-sent:stall:long", "lacks a number"),
        ("commit-sent:stall:nan", "has a wrong number"),
        ("commit-sent:stall:99999", "has a wrong number"),
        ("commit-sent:kill:0", "has a wrong number"),
        ("commit-sent:kill:1:2", "too many"),
    ],
)
def test_wrong_faults_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(text)


def test_a_fault_needs_the_administrators_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "allow"
    monkeypatch.setenv("KEMARI_FAULT", "commit-sent:cut")
    assert not allowed(marker)
    assert arm_from_environment(tmp_path / "run", marker) is None
    marker.touch(0o666)
    marker.chmod(0o666)
    assert not allowed(marker), "anybody could have made it"
    assert arm_from_environment(tmp_path / "run", marker) is None
    marker.chmod(0o644)
    link = tmp_path / "link"
    link.symlink_to(marker)
    assert not allowed(link)
    monkeypatch.setenv("KEMARI_FAULT", "")
    assert arm_from_environment(tmp_path / "run", marker) is None


def test_a_fault_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "allow"
    marker.touch(0o644)
    monkeypatch.setenv("KEMARI_FAULT", "commit-sent:stall:0:2")
    try:
        assert arm_from_environment(tmp_path / "run", marker) == Fault("commit-sent", "stall", 0, 2)
        faultpoints.reach("commit-sent")
        faultpoints.reach("ack-sent")
        assert not (tmp_path / "run" / "fault-spent").exists()
        faultpoints.reach("commit-sent")
        assert (tmp_path / "run" / "fault-spent").exists()
        assert arm_from_environment(tmp_path / "run", marker) is None
        monkeypatch.setenv("KEMARI_FAULT", "commit-sent:stall:0")
        assert arm_from_environment(tmp_path / "run", marker) is not None
    finally:
        faultpoints.arm(None)


@pytest.mark.parametrize("text", ["0.x", "3 s", "-1", "nan", "1e9"])
def test_a_wrong_interval_between_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    marker = tmp_path / "allow-fault-points"
    marker.touch(mode=0o644)
    monkeypatch.setenv("KEMARI_AUDIT", text)
    with pytest.raises(ConfigError, match=r"KEMARI_AUDIT: .* is not a number of seconds"):
        arm_from_environment(tmp_path, marker)


def test_looks_need_the_administrators_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    marker = tmp_path / "allow-fault-points"
    monkeypatch.setenv("KEMARI_AUDIT", "2.5")
    try:
        arm_from_environment(tmp_path, marker)
        assert audit._interval is None
        assert "KEMARI_AUDIT is set but ignored" in caplog.text
        marker.touch(mode=0o644)
        arm_from_environment(tmp_path, marker)
        assert audit._interval == 2.5
    finally:
        audit.arm(None)


def test_nothing_happens_unless_armed() -> None:
    faultpoints.reach("commit-sent")
    seen: list[str] = []
    faultpoints.arm(seen.append)
    try:
        faultpoints.reach("commit-sent")
    finally:
        faultpoints.arm(None)
    faultpoints.reach("ack-sent")
    assert seen == ["commit-sent"]


def test_kill_is_a_kill() -> None:
    script = (
        "from kemari.faultpoints import Trigger, parse\n"
        "trigger = Trigger(parse('applied:kill'), lambda: None)\n"
        "trigger('ack-sent'); print('alive', flush=True); trigger('applied'); print('still')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=_ROOT, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "alive\n"


def test_a_stall_holds_the_thread_that_reached_the_point() -> None:
    trigger = Trigger(parse("applied:stall:3600"), lambda: None)
    thread = threading.Thread(target=trigger, args=("applied",), daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()


def test_cut_ends_tcp_connections_and_nothing_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        server, _ = listening.accept()
        one, other = socket.socketpair()
        with client, server, one, other:
            assert cut_connections() >= 2
            assert client.recv(1) == b""
            assert server.recv(1) == b""
            one.sendall(b"x")
            assert other.recv(1) == b"x"
            socket.create_connection(listening.getsockname()).close()
