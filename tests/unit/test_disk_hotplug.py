# SPDX-License-Identifier: Apache-2.0
"""xl's hotplug script: a real nbdkit, stand-ins for xenstore and for the kernel's nbd devices."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diskbuffer import held
from diskbuffer.metadata import Fitness, Metadata, Role
from diskbuffer.status import Flag, StatusPage
from tests.unit.disk_client import NbdClient

ROOT = Path(__file__).resolve().parents[2]
PARTS = Path(__file__).resolve().parent / "hotplug"
MIB = 1 << 20


class Dom0:
    """One host's disks.

    :ivar store: xenstore, as a folder
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.devices = folder / "dev"
        self.sys = folder / "sys"
        scripts, programs = folder / "scripts", folder / "bin"
        for each in (self.store, self.devices, self.sys, scripts, programs):
            each.mkdir()
        shutil.copy(PARTS / "block-common.sh", scripts)
        shutil.copy(PARTS / "nbd-client", programs)
        (programs / "python3").symlink_to(sys.executable)
        self.script = scripts / "block-kemari"
        self.script.symlink_to(ROOT / "dom0-tools" / "hotplug" / "block-kemari")
        for number in range(3):
            (self.devices / f"nbd{number}").touch()

    def call(self, command: str, disk: str) -> str:
        """Call the script for ``DOMID/DEVID``; what it put into ``hotplug-error``."""
        path = f"backend/vbd/{disk}"
        environment = os.environ | {
            "XENBUS_PATH": path,
            "STORE": os.fspath(self.store),
            "KEMARI_RUN": os.fspath(self.folder / "run"),
            "KEMARI_STATE": os.fspath(self.folder / "state"),
            "KEMARI_DEV": os.fspath(self.devices),
            "KEMARI_SYS": os.fspath(self.sys),
            "KEMARI_HELD_SECONDS": "0",
            "PYTHONPATH": os.fspath(ROOT),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        error = self.store / path / "hotplug-error"
        error.unlink(missing_ok=True)
        done = subprocess.run(
            [self.script, command], env=environment, capture_output=True, check=False
        )
        said = error.read_text().strip() if error.exists() else ""
        assert (done.returncode == 0) == (not said), done.stderr.decode()
        assert not list(self.store.glob("lock-*")), "the lock was not given back"
        return said

    def add(self, disk: str, target: Path | str, mode: str = "w") -> str:
        """What libxl does before it calls the script with ``add``, and that."""
        path = self.store / "backend/vbd" / disk
        path.mkdir(parents=True)
        (path / "params").write_text(f"{target}\n")
        (path / "mode").write_text(f"{mode}\n")
        return self.call("add", disk)

    def remove(self, disk: str) -> None:
        """The disk of a guest goes."""
        assert self.call("remove", disk) == ""
        shutil.rmtree(self.store / "backend/vbd" / disk)

    def read(self, disk: str, key: str) -> str:
        """What is in xenstore."""
        return (self.store / "backend/vbd" / disk / key).read_text().strip()

    def client(self, disk: str) -> NbdClient:
        """Connect as the kernel would."""
        return NbdClient(self.run(disk) / "nbd")

    def run(self, disk: str) -> Path:
        """The disk's folder."""
        return self.folder / "run" / "disks" / disk.replace("/", "-")

    def pid(self, disk: str) -> int:
        """The process that serves a disk."""
        return int((self.run(disk) / "pid").read_text())

    def clean(self) -> None:
        """End what a test left."""
        for pid in self.folder.glob("run/disks/*/pid"):
            kill(int(pid.read_text()))


def kill(pid: int) -> None:
    """Kill a server and wait for its end."""
    process = os.pidfd_open(pid)
    signal.pidfd_send_signal(process, signal.SIGKILL)
    assert select.select([process], [], [], 30)[0]
    os.close(process)


@pytest.fixture
def dom0(tmp_path: Path) -> Iterator[Dom0]:
    host = Dom0(tmp_path)
    yield host
    host.clean()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"first".ljust(MIB, b"\0"))
    return path


def test_a_disk_is_served_and_nothing_of_it_is_left_behind(dom0: Dom0, image: Path) -> None:
    assert dom0.add("3/51712", image) == ""
    device = f"{dom0.devices}/nbd0"
    assert dom0.read("3/51712", "physical-device-path") == device
    assert dom0.read("3/51712", "kemari") == str(dom0.run("3/51712"))
    client = dom0.client("3/51712")
    assert client.read(0, 5) == b"first"
    client.write(512, b"second")
    client.close()
    dom0.remove("3/51712")
    assert image.read_bytes()[:518] == b"first".ljust(512, b"\0") + b"second"
    assert list(dom0.sys.iterdir()) == []
    assert list((dom0.folder / "run" / "disks").iterdir()) == []


def test_several_disks_each_have_a_device_of_their_own(dom0: Dom0, image: Path) -> None:
    other = image.with_name("other.img")
    other.write_bytes(bytes(MIB))
    assert dom0.add("3/51712", image) == ""
    assert dom0.add("3/51728", other) == ""
    assert dom0.read("3/51728", "physical-device-path").endswith("nbd1")
    dom0.remove("3/51712")
    dom0.remove("3/51728")


def test_a_target_is_refused_to_a_second_guest_with_one_sentence(dom0: Dom0, image: Path) -> None:
    link = image.with_name("link.img")
    link.symlink_to(image)
    assert dom0.add("3/51712", image) == ""
    assert dom0.add("4/51712", link) == f"{image} is in use as another guest's disk"
    assert not dom0.run("4/51712").exists()
    dom0.remove("3/51712")
    dom0.remove("4/51712")
    assert dom0.add("5/51712", link) == ""


def test_a_read_only_disk_may_be_shared_and_takes_no_write(dom0: Dom0, image: Path) -> None:
    assert dom0.add("3/51712", image, "r") == ""
    assert dom0.add("4/51712", image, "r") == ""
    assert "-R" in (dom0.sys / "nbd0" / "called").read_text()
    client = dom0.client("4/51712")
    with pytest.raises(OSError, match="permitted"):
        client.write(0, bytes(512))
    assert client.read(0, 5) == b"first"
    client.close()
    assert dom0.add("5/51712", image) == f"{image} is in use as another guest's disk"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("missing", "{} does not exist, expected a file or block device"),
        ("folder", "{} is neither a file nor a block device"),
        ("empty", "{} has 0 bytes, expected at least a sector of 512"),
    ],
)
def test_a_target_that_is_no_disk_is_refused(
    dom0: Dom0, tmp_path: Path, target: str, said: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    assert dom0.add("3/51712", tmp_path / target) == said.format(tmp_path / target)
    assert not dom0.run("3/51712").exists()


def test_no_free_device_takes_everything_back(dom0: Dom0, image: Path) -> None:
    (dom0.sys / "refuses").touch()
    said = dom0.add("3/51712", image)
    assert said == f"No nbd device could be attached to {image} (refused)"
    assert not dom0.run("3/51712").exists()
    (dom0.sys / "refuses").unlink()
    assert dom0.add("4/51712", image) == ""


def test_adding_twice_and_removing_twice_changes_nothing(dom0: Dom0, image: Path) -> None:
    assert dom0.add("3/51712", image) == ""
    pid = dom0.pid("3/51712")
    assert dom0.call("add", "3/51712") == ""
    assert dom0.pid("3/51712") == pid
    assert dom0.call("remove", "3/51712") == ""
    assert dom0.call("remove", "3/51712") == ""


def test_what_a_dead_guest_left_does_not_keep_its_target(dom0: Dom0, image: Path) -> None:
    assert dom0.add("3/51712", image) == ""
    # The guest and its backend are gone; nobody asked for the removal.
    shutil.rmtree(dom0.store / "backend/vbd/3")
    assert dom0.add("4/51712", image) == ""
    assert not dom0.run("3/51712").exists()


def test_a_killed_server_is_cleared_away(dom0: Dom0, image: Path) -> None:
    assert dom0.add("3/51712", image) == ""
    kill(dom0.pid("3/51712"))
    dom0.remove("3/51712")
    assert list(dom0.sys.iterdir()) == []
    assert dom0.add("3/51712", image) == ""


def test_a_dead_servers_disk_takes_no_other_guests_device_with_it(dom0: Dom0, image: Path) -> None:
    other = image.with_name("other.img")
    other.write_bytes(bytes(MIB))
    assert dom0.add("3/51712", image) == ""
    kill(dom0.pid("3/51712"))
    shutil.rmtree(dom0.sys / "nbd0")  # as the kernel frees it
    assert dom0.add("4/51712", other) == ""
    assert dom0.read("4/51712", "physical-device-path") == f"{dom0.devices}/nbd0"
    dom0.remove("3/51712")
    assert (dom0.sys / "nbd0").exists()
    dom0.remove("4/51712")
    assert not (dom0.sys / "nbd0").exists()


def test_a_dead_servers_device_may_be_another_programs(dom0: Dom0, image: Path) -> None:
    assert dom0.add("3/51712", image) == ""
    kill(dom0.pid("3/51712"))
    connection = dom0.sys / "nbd0" / "pid"
    connection.write_text("4711\n")  # as the kernel frees it, and somebody's qemu-nbd takes it
    dom0.remove("3/51712")
    assert connection.read_text() == "4711\n"
    assert dom0.add("4/51712", image) == ""
    assert dom0.read("4/51712", "physical-device-path") == f"{dom0.devices}/nbd1"


def test_a_dead_servers_number_may_be_another_servers(dom0: Dom0, image: Path) -> None:
    other = image.with_name("other.img")
    other.write_bytes(b"other".ljust(MIB, b"\0"))
    assert dom0.add("3/51712", image) == ""
    assert dom0.add("4/51712", other) == ""
    kill(dom0.pid("3/51712"))
    (dom0.run("3/51712") / "pid").write_text(f"{dom0.pid('4/51712')}\n")
    dom0.remove("3/51712")
    client = dom0.client("4/51712")
    assert client.read(0, 5) == b"other"
    client.close()


def test_an_add_that_was_cut_short_is_begun_anew(dom0: Dom0, image: Path) -> None:
    half = dom0.run("3/51712")
    half.mkdir(parents=True)
    (half / "xenbus").write_text("backend/vbd/3/51712\n")
    assert dom0.add("3/51712", image) == ""


def test_a_replica_is_served_but_takes_no_write(dom0: Dom0, image: Path) -> None:
    assert dom0.add("3/51712", image) == ""
    state = (dom0.run("3/51712") / "state").resolve()
    assert (state / "target").read_text().strip() == str(image)
    dom0.remove("3/51712")
    (state / "state.json").write_text('{"role": "replica"}')
    assert dom0.add("4/51712", image) == ""
    client = dom0.client("4/51712")
    assert client.read(0, 5) == b"first"
    with pytest.raises(OSError, match="not permitted"):
        client.write(0, bytes(512))
    client.close()


def test_a_shared_target_is_served_as_one(dom0: Dom0, image: Path) -> None:
    assert dom0.add("3/51712", f"shared:{image}") == ""
    page = StatusPage(dom0.run("3/51712") / "status")
    assert page.figures().flags == Flag.SHARED
    page.close()
    assert (dom0.run("3/51712") / "state" / "target").read_text().strip() == str(image)
    assert dom0.add("4/51712", image) == f"{image} is in use as another guest's disk"
    client = dom0.client("3/51712")
    client.write(512, b"second")
    client.close()
    dom0.remove("3/51712")
    assert image.read_bytes()[512:518] == b"second"


def test_a_shared_target_has_an_absolute_path(dom0: Dom0) -> None:
    said = dom0.add("3/51712", "shared:disk.img")
    assert said == (
        "shared:disk.img is no disk, expected shared: and the path of a file or block device"
    )


def test_a_shared_target_whose_guest_is_protected_or_moved_is_not_served(
    dom0: Dom0, image: Path
) -> None:
    assert dom0.add("3/51712", f"shared:{image}") == ""
    state = (dom0.run("3/51712") / "state").resolve()
    dom0.remove("3/51712")
    Metadata(Role.HELD, Fitness.CONSISTENT, MIB).save(state / "state.json")
    assert dom0.add("4/51712", f"shared:{image}") == (
        f"{image} is the disk of a guest that is protected, or runs on the other host"
    )
    assert dom0.add("5/51712", f"shared:{image}", "r") == ""
    dom0.remove("5/51712")
    held.settle(state)
    assert dom0.add("6/51712", f"shared:{image}") == ""
