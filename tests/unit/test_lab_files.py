# SPDX-License-Identifier: Apache-2.0
"""What the lab's images are made of: archives, modules, wheels, recipes."""

from __future__ import annotations

import dataclasses
import io
import lzma
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from vagrant.lablib import guest, programs
from vagrant.lablib.command import extend_path, run
from vagrant.lablib.errors import LabError
from vagrant.lablib.guest import EXTRA, GuestOptions, Installed, config
from vagrant.lablib.image import (
    HERE,
    Base,
    LayerFile,
    executable,
    host_layer,
    layer_digest,
    tar_of,
    write_disk,
)
from vagrant.lablib.initramfs import Entry, Modules, archive, folder, insmod_lines, program
from vagrant.lablib.network import GUEST_IPV4, GUEST_IPV6, guest_addresses
from vagrant.lablib.project import SOURCES, build_wheel, source_digest
from vagrant.lablib.recipe import RECIPES, recipe_for
from vagrant.lablib.wheel import lay_out

# ---- initial RAM file systems ----


def read_newc(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Path to mode and content, read independently of what writes it."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name_at = at + 110
        name = data[name_at : name_at + name_size - 1].decode()
        assert data[name_at + name_size - 1] == 0
        content_at = (name_at + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return found
        assert name not in found
        found[name] = (mode, data[content_at : content_at + size])
        at = (content_at + size + 3) & ~3


def test_an_archive_holds_what_was_put_in_with_folders_before_their_files() -> None:
    entries = [program("bin/x", b"abc"), folder("sbin"), Entry("mod/deep/y.ko", 0o100644, b"1234")]
    found = read_newc(archive(entries))
    assert list(found) == ["bin", "bin/x", "sbin", "mod", "mod/deep", "mod/deep/y.ko"]
    assert found["bin/x"] == (0o100755, b"abc")
    assert found["mod/deep/y.ko"] == (0o100644, b"1234")
    assert all(stat.S_ISDIR(found[name][0]) for name in ("bin", "sbin", "mod", "mod/deep"))
    assert archive(entries) == archive(entries)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "6.1.0-test"
    (tree / "kernel").mkdir(parents=True)
    (tree / "modules.dep").write_text(
        "kernel/top-most.ko: kernel/middle.ko.xz kernel/low.ko\n"
        "kernel/middle.ko.xz: kernel/low.ko\n"
        "kernel/low.ko:\n"
        "kernel/packed.ko.zst:\n"
    )
    (tree / "modules.builtin").write_text("kernel/inside.ko\n")
    (tree / "kernel/top-most.ko").write_bytes(b"top")
    (tree / "kernel/middle.ko.xz").write_bytes(lzma.compress(b"middle"))
    (tree / "kernel/low.ko").write_bytes(b"low")
    (tree / "kernel/packed.ko.zst").write_bytes(b"?")
    return tree


def test_modules_come_after_what_they_need_and_uncompressed(tree: Path) -> None:
    entries = Modules(tree).entries(["top-most", "inside", "low"])
    assert [(e.path, e.data) for e in entries] == [
        ("mod/low.ko", b"low"),
        ("mod/middle.ko", b"middle"),
        ("mod/top_most.ko", b"top"),
    ]
    assert insmod_lines(entries).splitlines()[0] == "insmod /mod/low.ko"


def test_a_module_that_the_kernel_does_not_have_is_named(tree: Path) -> None:
    modules = Modules(tree)
    with pytest.raises(LabError, match=r"kernel 6\.1\.0-test has no module absent"):
        modules.order(["absent"])
    with pytest.raises(LabError, match=r"packed\.ko\.zst is compressed with \.zst"):
        modules.entries(["packed"])
    with pytest.raises(LabError, match=r"no modules\.dep"):
        Modules(tree / "kernel")


# ---- recipes ----


def test_a_recipe_is_named_by_everything_that_decides_its_image() -> None:
    recipe = recipe_for("bookworm")
    digests = {r.digest for r in RECIPES.values()}
    for changed in (
        dataclasses.replace(recipe, packages=(*recipe.packages, "hello")),
        dataclasses.replace(recipe, xen="4.18"),
        dataclasses.replace(recipe, image_mib=recipe.image_mib + 1),
    ):
        digests.add(changed.digest)
    assert len(digests) == len(RECIPES) + 3
    assert recipe.digest == recipe_for("bookworm").digest


def test_the_xen_of_each_suite_is_asked_for() -> None:
    assert {"xen-hypervisor-4.17-amd64", "xen-utils-4.17"} <= set(recipe_for("bookworm").packages)
    assert {"xen-hypervisor-4.20-amd64", "xen-utils-4.20"} <= set(recipe_for("trixie").packages)
    with pytest.raises(LabError, match="'sarge'; expected bookworm or trixie"):
        recipe_for("sarge")


# ---- layers ----


def test_a_layer_is_named_by_paths_modes_and_content() -> None:
    layers = [
        {"a": LayerFile(b"x")},
        {"b": LayerFile(b"x")},
        {"a": LayerFile(b"y")},
        {"a": executable(b"x")},
        {"a": LayerFile(b"x"), "b": LayerFile(b"")},
    ]
    assert len({layer_digest(layer) for layer in layers}) == len(layers)
    with tarfile.open(fileobj=io.BytesIO(tar_of(layers[3]))) as tar:
        member = tar.getmember("a")
        assert (member.mode, member.uid, member.size) == (0o755, 0, 1)


def test_shell_scripts_of_the_lab_can_be_parsed() -> None:
    scripts = [path for path, file in host_layer().items() if stat.S_IMODE(file.mode) & 0o100]
    assert "usr/lib/kemari-lab/init" in scripts
    for place in ("host", "guest"):
        for path in sorted((HERE / place).iterdir()):
            if path.read_bytes().startswith((b"#!/bin/sh", b"#!/bin/busybox sh")):
                subprocess.run(["sh", "-n", path], check=True)


def test_files_are_written_into_a_disk_over_what_is_there(tmp_path: Path) -> None:
    extend_path()
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "old").write_text("old")
    base = Base(tmp_path / "base", recipe_for("bookworm"))
    base.folder.mkdir()
    with base.disk.open("wb") as file:
        file.truncate(8 << 20)
    run(["mkfs.ext4", "-q", "-F", "-d", root, base.disk])
    before = base.disk.read_bytes()
    layer = {"etc/old": LayerFile(b"new one"), "usr/lib/deep/tool": executable(b"#!/bin/sh\n")}
    disk = tmp_path / "dom0.img"
    write_disk(base, layer, disk)
    assert run(["debugfs", "-R", "cat /etc/old", disk]) == "new one"
    assert "Mode:  0755" in run(["debugfs", "-R", "stat /usr/lib/deep/tool", disk])
    assert run(["e2fsck", "-f", "-n", disk])
    assert base.disk.read_bytes() == before


def test_a_file_that_does_not_fit_into_the_disk_is_named(tmp_path: Path) -> None:
    extend_path()
    base = Base(tmp_path / "base", recipe_for("bookworm"))
    base.folder.mkdir()
    with base.disk.open("wb") as file:
        file.truncate(4 << 20)
    run(["mkfs.ext4", "-q", "-F", base.disk])
    with pytest.raises(LabError, match="/big could not be written"):
        write_disk(base, {"big": LayerFile(os.urandom(6 << 20))}, tmp_path / "dom0.img")
    assert not (tmp_path / "dom0.img").exists()


# ---- wheels ----


def make_wheel(place: Path, tag: str) -> Path:
    wheel = place / f"thing-1.0-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing/__init__.py", "VALUE = 7\n")
        archive.writestr("thing/native.abi3.so", b"\x7fELF")
        archive.writestr("thing-1.0.data/data/share/man/man1/thing.1", ".TH")
        archive.writestr("thing-1.0.data/scripts/helper", "#!python\nprint(1)\n")
        archive.writestr("thing-1.0.data/purelib/extra.py", "")
        archive.writestr("thing-1.0.dist-info/METADATA", "Name: thing\n")
        archive.writestr(
            "thing-1.0.dist-info/entry_points.txt",
            "[console_scripts]\nthing = thing.cli:group.main\n[other]\nx = y:z\n",
        )
        archive.writestr("thing-1.0.dist-info/RECORD", "from the wheel,,\n")
    return wheel


def test_a_wheel_is_laid_out_as_an_administrator_installs_it(tmp_path: Path) -> None:
    recipe = recipe_for("trixie")
    files = lay_out(make_wheel(tmp_path, "cp311-abi3-linux_x86_64"), recipe)
    packages = "usr/local/lib/python3.13/dist-packages"
    assert files[f"{packages}/thing/__init__.py"].data == b"VALUE = 7\n"
    assert f"{packages}/thing/native.abi3.so" in files
    assert f"{packages}/extra.py" in files
    assert files["usr/local/share/man/man1/thing.1"].data == b".TH"
    assert files["usr/local/bin/helper"] == executable(b"#!/usr/bin/python3\nprint(1)\n")
    script = files["usr/local/bin/thing"]
    assert script.mode == 0o100755
    assert b"from thing.cli import group\n" in script.data
    assert b"sys.exit(group.main())" in script.data
    listed = files[f"{packages}/thing-1.0.dist-info/RECORD"].data.decode().splitlines()
    installed = {os.path.normpath(f"{packages}/{line.rsplit(',', 2)[0]}") for line in listed}
    assert installed == set(files)


def test_byte_code_comes_along_for_the_same_python_only(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "py3-none-any")
    own = "{}.{}".format(*sys.version_info[:2])
    for python in (own, "3.1"):
        recipe = dataclasses.replace(recipe_for("bookworm"), python=python)
        compiled = [path for path in lay_out(wheel, recipe) if path.endswith(".pyc")]
        assert len(compiled) == (2 if python == own else 0)


def test_a_wheel_for_another_python_is_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "cp311-cp311-linux_x86_64")
    assert lay_out(wheel, recipe_for("bookworm"))
    with pytest.raises(LabError, match=r"does not fit Python 3\.13 of trixie.*abi3"):
        lay_out(wheel, recipe_for("trixie"))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    place = tmp_path / "repository"
    (place / "kemari").mkdir(parents=True)
    (place / "kemari" / "__init__.py").write_text("")
    (place / "kemari" / "left.so").write_text("from another build")
    (place / "setup.cfg").write_text(
        "[metadata]\nname = kemari\nversion = 9\n[options]\npackages = kemari\n"
        "[options.package_data]\n* = *.so\n"
    )
    (place / "setup.py").write_text("from setuptools import setup\nsetup()\n")
    (place / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools", "wheel"]\n'
        'build-backend = "setuptools.build_meta"\n'
    )
    return place


def test_the_state_of_the_project_is_named_by_its_files_only(repository: Path) -> None:
    first = source_digest(repository)
    (repository / "kemari" / "left.so").write_text("changed")
    (repository / "notes.txt").write_text("not part of it")
    assert source_digest(repository) == first
    (repository / "kemari" / "__init__.py").write_text("X = 1\n")
    second = source_digest(repository)
    assert second != first
    (repository / "dom0-tools").mkdir()
    (repository / "dom0-tools" / "unit.service").write_text("")
    assert source_digest(repository) != second
    assert "dom0-tools" in SOURCES


def test_a_project_that_cannot_be_built_is_reported(repository: Path, tmp_path: Path) -> None:
    (repository / "setup.py").write_text("raise SystemExit('no luck')\n")
    with pytest.raises(LabError, match="failed with exit status") as caught:
        build_wheel(repository, tmp_path / "wheels")
    assert caught.value.details


# ---- the guest's configuration ----


def test_options_of_the_guest_are_in_its_configuration() -> None:
    options = GuestOptions(vcpus=3, memory_mib=192, extra=EXTRA + " debug")
    lines = config(options, "/boot/vmlinuz-test").splitlines()
    assert "vcpus = 3" in lines
    assert "memory = 192" in lines
    assert f'extra = "{EXTRA} debug"' in lines
    assert 'kernel = "/boot/vmlinuz-test"' in lines
    assert not any("@" in line for line in lines)


# ---- Section: the guest's programs ----

LISTED = """\
\tlinux-vdso.so.1 (0x00007ffd0a5f2000)
\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f2a4c3b1000)
\tliblua5.1.so.0 => /lib/x86_64-linux-gnu/liblua5.1.so.0 (0x00007f2a4c37f000)
\t/lib64/ld-linux-x86-64.so.2 (0x00007f2a4c6a8000)
"""


def test_libraries_of_a_program() -> None:
    assert programs.libraries(LISTED) == [
        "/lib/x86_64-linux-gnu/libm.so.6",
        "/lib/x86_64-linux-gnu/liblua5.1.so.0",
        "/lib64/ld-linux-x86-64.so.2",
    ]
    with pytest.raises(LabError, match=r"library liblua5.1.so.0 .* is missing"):
        programs.libraries("\tliblua5.1.so.0 => not found\n")


def test_several_guests_differ_in_name_and_addresses() -> None:
    first, fourth = GuestOptions(), GuestOptions(number=3)
    assert (first.name, first.config_path) == ("demo", "root/guest.cfg")
    assert (fourth.name, fourth.config_path) == ("demo3", "root/guest3.cfg")
    assert guest_addresses(0) == (GUEST_IPV4, GUEST_IPV6)
    assert guest_addresses(3) == ("10.77.0.13", "fd77::13")
    text = config(fourth, "/boot/vmlinuz")
    assert 'name = "demo3"' in text
    assert "mac=00:16:3e:77:00:13" in text
    assert f'extra = "{EXTRA} number=3"' in text
    assert "number=" not in config(first, "/boot/vmlinuz")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (GuestOptions(number=10), "No guest 10 in a lab; expected 0 to 9"),
        (GuestOptions(number=-1), "No guest -1"),
        (GuestOptions(number=1, disk_mib=64), "demo1 cannot have disks"),
    ],
)
def test_a_guest_that_cannot_be(options: GuestOptions, reason: str) -> None:
    with pytest.raises(LabError, match=reason):
        options.check()


def test_a_guest_of_this_machines_newest_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LabError, match="holds no kernel's modules"):
        Installed(tmp_path)
    monkeypatch.setattr(guest, "GUEST_MODULES", ("low",))
    for age, version in ((10, "6.2"), (0, "6.10")):
        folder = tmp_path / version
        folder.mkdir()
        (folder / "low.ko").write_text(version)
        (folder / "modules.dep").write_text("low.ko:\n")
        (folder / "modules.builtin").write_text("")
        os.utime(folder / "modules.dep", (1000 - age, 1000 - age))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match="no busybox"):
        Installed(tmp_path)
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"ELF")
    busybox.chmod(0o755)
    found = Installed(tmp_path)
    assert (found.guest_kernel, found.busybox) == ("/boot/vmlinuz-6.10", b"ELF")
    assert [entry.data for entry in found.guest_modules] == [b"6.10"]


def test_a_guest_has_disks_only_if_it_was_asked_for_one() -> None:
    assert "vdev" not in config(GuestOptions(), "/boot/vmlinuz")
    assert config(GuestOptions(disk_mib=64), "/boot/vmlinuz").count("block-kemari") == 2
