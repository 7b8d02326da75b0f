# SPDX-License-Identifier: Apache-2.0
"""xl as a program and xenstore through pyxs, each with a stand-in of our own."""

from __future__ import annotations

import errno
import json
import queue
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pyxs
from pyxs.exceptions import PyXSError

from checkpoint.errors import CheckpointError
from checkpoint.xen import store, toolstack
from checkpoint.xen.store import Store

# ---- Section: xl ----


@pytest.fixture
def xl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with an ``xl`` that notes its arguments, and does what its file ``do`` says."""
    program = tmp_path / "xl"
    program.write_text(
        '#!/bin/sh\necho "$*" >> "$0.calls"\necho "$LIBXL_DOMID_REUSE_TIMEOUT" >> "$0.env"\n'
        'for last; do :; done\n[ "$1" = restore ] && cat "$last" > "$0.stream"\n. "$0.do"\n'
    )
    program.chmod(0o755)
    (tmp_path / "xl.do").write_text("exit 0\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def calls(xl: Path) -> list[str]:
    return (xl / "xl.calls").read_text().splitlines()


def test_what_xl_is_asked_to_do(xl: Path) -> None:
    toolstack.rename(7, "web")
    toolstack.destroy(7)
    assert calls(xl) == ["rename 7 web", "destroy 7"]
    assert set((xl / "xl.env").read_text().splitlines()) == {"0"}


def test_a_shell_is_restored_from_a_file_that_is_gone_afterwards(
    xl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tempfile.NamedTemporaryFile

    def here(**how: str) -> object:
        return named(**how | {"dir": str(xl)})  # type: ignore[call-overload]

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", here)
    toolstack.restore_paused(iter([b"one", b"two"]))
    (call,) = calls(xl)
    assert call.startswith("restore -p ")
    assert (xl / "xl.stream").read_bytes() == b"onetwo"
    assert not Path(call.split()[-1]).exists()


def test_a_number_that_was_in_use_within_this_second(xl: Path) -> None:
    (xl / "xl.do").write_text(
        '[ "$(wc -l < "$0.calls")" -gt 1 ] && exit 0\n'
        'echo "libxl: error: libxl_create.c:783:f: Domain 7:domain id recently used" >&2\nexit 1\n'
    )
    began = int(time.monotonic())
    toolstack.restore_paused(iter([b"one"]))
    assert len(calls(xl)) == 2
    assert int(time.monotonic()) > began  # what libxl counts in


def test_the_configuration_of_one_domain_among_others(xl: Path) -> None:
    listed = [{"domid": 1, "config": {"a": 1}}, {"domid": 7, "config": {"b": 2}}]
    (xl / "list").write_text(json.dumps(listed))
    (xl / "xl.do").write_text(f"cat {xl}/list\n")
    assert toolstack.configuration(7) == {"b": 2}
    assert calls(xl) == ["list -l 7"]
    with pytest.raises(CheckpointError, match="no configuration of domain 9"):
        toolstack.configuration(9)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "Parsing config\nlibxl: error: libxl_domain.c:1:f: no memory\nmore\n",
            "libxl_domain.c:1:f: no memory",
        ),
        ("something FAILED here\nlast\n", "something FAILED here"),
        ("first\nlast words\n\n", "last words"),
        ("", "no reason given"),
    ],
)
def test_the_most_telling_line_of_a_failure(xl: Path, output: str, reason: str) -> None:
    (xl / "said").write_text(output)
    (xl / "xl.do").write_text(f"cat {xl}/said >&2\nexit 3\n")
    with pytest.raises(CheckpointError) as caught:
        toolstack.destroy(7)
    assert str(caught.value) == f"xl destroy failed: {reason}"


def test_an_xl_that_does_not_end_or_is_not_there(xl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (xl / "xl.do").write_text("exec sleep 60\n")
    monkeypatch.setattr(toolstack, "_TIMEOUT", 0.2)
    with pytest.raises(CheckpointError, match=r"xl destroy did not end within 0.2 s"):
        toolstack.destroy(7)
    monkeypatch.setenv("PATH", str(xl / "nothing"))
    with pytest.raises(CheckpointError, match="xl is not installed"):
        toolstack.destroy(7)


# ---- Section: xenstore ----


class Client:
    """In the place of ``pyxs.Client``.

    :ivar failing: the error number that every operation fails with, or 0
    """

    def __init__(self) -> None:
        self.nodes: dict[bytes, bytes] = {}
        self.failing = 0
        self.closed = 0
        self.watched: list[tuple[bytes, bytes]] = []
        self.events: queue.Queue[object] = queue.Queue()

    def _check(self, path: bytes) -> None:
        if self.failing:
            raise PyXSError(self.failing, "refused")
        below = path + b"/"
        if path not in self.nodes and not any(node.startswith(below) for node in self.nodes):
            raise PyXSError(errno.ENOENT, "no such node")

    def connect(self) -> None:
        if self.failing:
            raise PyXSError(self.failing, "refused")

    def close(self) -> None:
        self.closed += 1

    def read(self, path: bytes) -> bytes:
        self._check(path)
        return self.nodes.get(path, b"")

    def write(self, path: bytes, value: bytes) -> None:
        if self.failing:
            raise PyXSError(self.failing, "refused")
        self.nodes[path] = value
        self.events.put(path)

    def list(self, path: bytes) -> list[bytes]:
        self._check(path)
        below = path + b"/"
        found = {node[len(below) :].split(b"/")[0] for node in self.nodes if node.startswith(below)}
        return sorted(found) or [b""]

    def monitor(self) -> SimpleNamespace:
        return SimpleNamespace(
            events=self.events,
            watch=lambda path, token: self.watched.append((path, token)),
        )


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Client()
    monkeypatch.setattr(pyxs, "Client", lambda: made)
    return made


def test_values_are_read_and_written(client: Any) -> None:
    connection = Store()
    connection.write("/a/b", "caf\xe9")
    assert client.nodes == {b"/a/b": b"caf\xe9"}
    assert connection.read("/a/b") == "caf\xe9"
    assert connection.read("/a/c") is None
    assert connection.children("/a") == ["b"]
    assert connection.children("/a/b") == []
    assert connection.children("/x") == []
    connection.close()
    connection.close()
    assert client.closed == 1


def test_the_tree_below_a_node(client: Any) -> None:
    client.nodes = {
        b"/local/domain/3/name": b"web",
        b"/local/domain/3/device/vif/0/state": b"4",
        b"/local/domain/33/name": b"other",
    }
    assert Store().tree("/local/domain/3") == {
        "name": "web",
        "device": "",
        "device/vif": "",
        "device/vif/0": "",
        "device/vif/0/state": "4",
    }


def test_a_node_that_vanishes_is_left_out(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client.nodes = {b"/d/a": b"1", b"/d/b": b"2"}
    listed = client.list

    def list_then_remove(path: bytes) -> list[bytes]:
        found: list[bytes] = listed(path)
        client.nodes.pop(b"/d/a", None)
        return found

    monkeypatch.setattr(client, "list", list_then_remove)
    assert Store().tree("/d") == {"b": "2"}


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda connection: connection.read("/a"), "/a cannot be read"),
        (lambda connection: connection.write("/a", "1"), "/a cannot be written"),
        (lambda connection: connection.children("/a"), "/a cannot be listed"),
        (lambda _connection: Store(), "xenstore cannot be reached"),
    ],
)
def test_refusals_are_no_absence(client: Any, action: Any, words: str) -> None:
    connection = Store()
    client.failing = errno.EACCES
    with pytest.raises(CheckpointError, match=words):
        action(connection)


def test_waiting_for_a_value(client: Any) -> None:
    client.nodes[b"/b/state"] = b"2"
    client.events.put(b"the first one, of no change")
    watched = Store().watch("/b/state")
    values = []

    def satisfied(value: str | None) -> bool:
        values.append(value)
        client.write(b"/b/state", b"4")
        return value == "4"

    client.write(b"/b/state", b"3")
    assert watched.wait(satisfied, 30.0) == "4"
    # Nobody asks for a value that has not changed since it was watched.
    assert values == ["3", "4"]


def test_waiting_in_vain(client: Any) -> None:
    client.nodes[b"/b/state"] = b"2"
    client.events.put(b"the first one, of no change")
    assert Store().watch("/b/state").wait(lambda value: value == "4", 0.05) == "2"


def test_a_watch_that_does_not_fire_at_once_is_a_watch(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_FIRST_EVENT", 0.01)
    watched = Store().watch("/b/state")
    client.write(b"/b/state", b"4")
    assert watched.wait(lambda value: value == "4", 30.0) == "4"


TOP = "/local/domain/3"


def touch(client: Any, path: str, value: str | None) -> None:
    """Somebody writes or removes a node, and its watch fires."""
    full = f"{TOP}/{path}".encode()
    if value is None:
        for node in [node for node in client.nodes if (node + b"/").startswith(full + b"/")]:
            del client.nodes[node]
    else:
        client.nodes[full] = value.encode()
    client.events.put(SimpleNamespace(path=full, token=b"kemari-changes"))


def test_following_a_part_of_the_store(client: Any) -> None:
    client.nodes = {f"{TOP}/{path}".encode(): b"" for path in ("device/vif/0/state", "name")}
    connection = Store()
    following = connection.follow(TOP)
    assert client.watched == [(TOP.encode(), b"kemari-changes")]
    client.events.put(SimpleNamespace(path=TOP.encode(), token=b"kemari-changes"))
    assert following.changed()
    assert following.changed()  # until the copy was brought up to date
    assert following.tree() == connection.tree(TOP)
    assert not following.changed()
    for path, value in (
        ("name", "web"),
        ("device/vif/0/state", "4"),
        ("device/vbd/51712/state", "1"),
        ("device/vif", None),
        ("device/vif/1/state", "1"),
        ("devices", "2"),
        ("device", None),
        ("never/was", None),
    ):
        touch(client, path, value)
        assert following.changed()
        assert following.tree() == connection.tree(TOP)
        assert not following.changed()


def test_a_change_costs_what_changed(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client.nodes = {f"{TOP}/device/vif/{n}/state".encode(): b"4" for n in range(100)}
    following = Store().follow(TOP)
    client.events.put(SimpleNamespace(path=TOP.encode(), token=b"kemari-changes"))
    following.tree()
    asked: list[bytes] = []
    check = client._check

    def count(path: bytes) -> None:
        asked.append(path)
        check(path)

    monkeypatch.setattr(client, "_check", count)
    touch(client, "device/vif/7/state", "5")
    assert following.tree()["device/vif/7/state"] == "5"
    assert asked == [f"{TOP}/device/vif/7/state".encode()] * 2


def test_a_change_while_the_copy_is_brought_up_to_date_is_seen(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.nodes = {f"{TOP}/name".encode(): b"web"}
    following = Store().follow(TOP)
    client.events.put(SimpleNamespace(path=TOP.encode(), token=b"kemari-changes"))
    listed = client.list

    def list_then_change(path: bytes) -> Any:
        found = listed(path)
        monkeypatch.setattr(client, "list", listed)
        touch(client, "late", "1")
        return found

    monkeypatch.setattr(client, "list", list_then_change)
    assert following.tree() == {"name": "web"}
    assert following.changed()
    assert following.tree() == {"name": "web", "late": "1"}
