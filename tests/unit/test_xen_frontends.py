# SPDX-License-Identifier: Apache-2.0
"""What backends read of a shell's devices, and that little is left to write when it counts."""

from __future__ import annotations

import pytest

from checkpoint.errors import ReviveError
from checkpoint.xen import frontends
from checkpoint.xen.frontends import Frontends, revived_node
from tests.unit.xen_fake_store import FakeStore

VIF = "device/vif/0"
VBD = "device/vbd/51712"
TREE = {
    "name": "web",
    "memory/target": "8192",
    "control/shutdown": "",
    "data/note": "1",
    f"{VIF}/backend": "/elsewhere/vif",
    f"{VIF}/state": "4",
    f"{VIF}/tx-ring-ref": "8",
    f"{VIF}/queue-0/state": "4",
    f"{VBD}/state": "4",
    f"{VBD}/ring-ref": "9",
    "device/console/0/ring-ref": "1",
}
MADE = {f"{VIF}/backend": "/here/vif", f"{VBD}/backend": "/here/vbd", f"{VIF}/state": "1"}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    made = FakeStore(dict(MADE))
    monkeypatch.setattr(frontends, "Store", made.connect)
    return made


def test_devices_are_described_before_anything_attaches(store: FakeStore) -> None:
    Frontends(3).describe(TREE)
    described = {
        "control/shutdown": "",
        "data/note": "1",
        f"{VIF}/tx-ring-ref": "8",
        f"{VIF}/queue-0/state": "4",
        f"{VBD}/ring-ref": "9",
    }
    assert store.nodes == MADE | described
    assert store.open == 0


def test_only_what_changed_is_written_at_the_revival(store: FakeStore) -> None:
    made = Frontends(3)
    made.describe(TREE)
    store.written.clear()
    with made.attached(TREE | {f"{VIF}/tx-ring-ref": "10"}):
        assert store.written == [f"{VIF}/tx-ring-ref", f"{VBD}/state", f"{VIF}/state", "kemari"]
        assert store.others == {"/here/vif/state": "4", "/here/vbd/state": "4"}
        assert store.nodes[f"{VIF}/tx-ring-ref"] == "10"
        assert store.nodes[f"{VIF}/state"] == store.nodes[f"{VBD}/state"] == "4"
    assert store.open == 0
    assert store.read(revived_node(3)) == "revived"


def test_what_the_guest_took_back_is_removed(store: FakeStore) -> None:
    made = Frontends(3)
    made.describe(TREE | {f"{VIF}/queue-0": "", f"{VIF}/queue-0/tx-ring-ref": "5"})
    left = {path: value for path, value in TREE.items() if "queue-0" not in path}
    with made.attached(left):
        assert not [path for path in store.nodes if "queue-0" in path]
        assert store.nodes[f"{VIF}/backend"] == "/here/vif"


def test_a_primary_that_has_not_said_what_there_is(store: FakeStore) -> None:
    made = Frontends(3)
    made.describe({})
    assert store.written == []
    with made.attached(TREE):
        assert store.nodes[f"{VBD}/ring-ref"] == "9"
        assert store.nodes[f"{VBD}/state"] == "4"


def test_a_device_that_was_not_connected_is_left_alone(store: FakeStore) -> None:
    with Frontends(3).attached(TREE | {f"{VBD}/state": "6"}):
        assert f"{VBD}/state" not in store.nodes
        assert store.nodes[f"{VIF}/state"] == "4"


def test_a_frontend_that_the_toolstack_has_left_alone(store: FakeStore) -> None:
    del store.nodes[f"{VBD}/backend"]
    with (
        pytest.raises(ReviveError, match="device/vbd/51712 has no backend"),
        Frontends(3).attached(TREE),
    ):
        raise AssertionError("the guest must not run")
    assert f"{VIF}/state" not in store.written
    assert store.open == 0


def test_a_backend_that_does_not_attach(store: FakeStore) -> None:
    store.connects = False
    with (
        pytest.raises(ReviveError, match=r"backend /here/vbd is in state None .expected 4"),
        Frontends(3).attached(TREE),
    ):
        raise AssertionError("the guest must not run")
    assert store.open == 0
    assert store.read(revived_node(3)) is None
