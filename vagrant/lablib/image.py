# SPDX-License-Identifier: Apache-2.0
"""Building Dom0's disk: a base of Debian packages, cached, and a thin layer of files above it."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vagrant.lablib import programs
from vagrant.lablib.command import check_programs, rooted, run, step
from vagrant.lablib.errors import LabError
from vagrant.lablib.initramfs import Entry, Modules, archive, folder, insmod_lines, program
from vagrant.lablib.kernel import bootable
from vagrant.lablib.recipe import DOM0_BOOT_MODULES, GUEST_MODULES, Recipe

HERE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class LayerFile:
    """A file to be put above the base.

    :ivar data: its content
    :ivar mode: type and permissions as in ``st_mode``
    """

    data: bytes
    mode: int = stat.S_IFREG | 0o644


def executable(data: bytes) -> LayerFile:
    """A file that can be executed."""
    return LayerFile(data, stat.S_IFREG | 0o755)


Layer = Mapping[str, LayerFile]
"""Path in the host, without a leading /, to what is there."""


def layer_digest(layer: Layer) -> str:
    """Names the content of a layer; 16 hexadecimal digits."""
    whole = hashlib.sha256()
    for path in sorted(layer):
        entry = layer[path]
        whole.update(f"{path}\0{entry.mode:o}\0{len(entry.data)}\0".encode())
        whole.update(entry.data)
    return whole.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Base:
    """A built base in the cache.

    :ivar folder: holds everything named below
    :ivar recipe: what it was built from
    """

    folder: Path
    recipe: Recipe

    @property
    def disk(self) -> Path:
        """Dom0's root file system, raw ext4; must not be written to."""
        return self.folder / "dom0.img"

    @property
    def key(self) -> Path:
        """The private key that opens the hosts built from this base."""
        return self.folder / "key"

    @property
    def guest_kernel(self) -> str:
        """Where in Dom0 its kernel is for guests."""
        return (self.folder / "guest-kernel").read_text()

    @property
    def host_key(self) -> str:
        """The hosts' public key, as a line of known_hosts without the address."""
        return " ".join((self.folder / "host_key.pub").read_text().split()[:2])

    @property
    def guest_modules(self) -> list[Entry]:
        """The guest's drivers out of this base's kernel, in loading order."""
        order = (self.folder / "guest-modules" / "order").read_text().split()
        return [
            Entry(
                f"mod/{name}.ko",
                stat.S_IFREG | 0o644,
                (self.folder / "guest-modules" / f"{name}.ko").read_bytes(),
            )
            for name in order
        ]

    @property
    def busybox(self) -> bytes:
        """A statically linked busybox."""
        return (self.folder / "busybox").read_bytes()


def cache_folder() -> Path:
    """Where bases are kept: ``$KEMARI_LAB_CACHE``, or ``~/.cache/kemari-lab``."""
    chosen = os.environ.get("KEMARI_LAB_CACHE")
    return Path(chosen).absolute() if chosen else Path.home() / ".cache" / "kemari-lab"


def find_base(recipe: Recipe) -> Base | None:
    """The cached base of a recipe, or None if it was never built."""
    place = cache_folder() / f"{recipe.suite}-{recipe.digest}"
    return Base(place, recipe) if place.is_dir() else None


def build_base(recipe: Recipe) -> Base:
    """Build the base of a recipe, or take it from the cache.

    A base appears in the cache complete or not at all, so an interrupted build leaves nothing
    that could be taken for one.

    :raises LabError: something needed is missing, or the packages could not be installed
    """
    base = find_base(recipe)
    if base is not None:
        return base
    check_programs(["mmdebstrap", "e2fsprogs", "openssh-client", "util-linux"])
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{recipe.suite}-building-", dir=cache) as work:
        made = Path(work) / "base"
        made.mkdir()
        root = Path(work) / "root"
        with step(f"installing Debian {recipe.suite} with Xen {recipe.xen}"):
            _install_packages(recipe, root)
        with step("making Dom0's disk"):
            _boot_files(root, made)
            programs.build(root)
            _keys(root, made)
            _disk(recipe, root, made / "dom0.img")
        final = cache / f"{recipe.suite}-{recipe.digest}"
        try:
            made.rename(final)
        except OSError:
            # Another build of the same recipe was faster; what it made is as good.
            if not final.is_dir():
                raise
    return Base(final, recipe)


def _install_packages(recipe: Recipe, root: Path) -> None:
    tar = root.with_suffix(".tar")
    run(
        [
            "mmdebstrap",
            "--variant=minbase",
            f"--include={','.join(recipe.packages)}",
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            recipe.suite,
            tar,
        ],
        # No initial RAM file system: the lab makes its own, which boots faster.
        env={"INITRD": "No"},
        timeout=3600,
    )
    root.mkdir()
    # Everything belongs to root in here, so that an ordinary user can build the same disk.
    run([*rooted(["tar"]), "-x", "-f", tar, "-C", root, "--no-same-owner", "--exclude=./dev/*"])
    tar.unlink()


def _boot_files(root: Path, made: Path) -> None:
    trees = sorted((root / "lib" / "modules").iterdir())
    if len(trees) != 1:
        raise LabError(f"{len(trees)} kernels were installed into Dom0; expected one.")
    version = trees[0].name
    shutil.copyfile(root / "boot" / f"vmlinuz-{version}", made / "vmlinuz")
    for_guests = f"boot/guest-{version}"
    (root / for_guests).write_bytes(bootable((made / "vmlinuz").read_bytes()))
    (made / "guest-kernel").write_text(f"/{for_guests}")
    hypervisors = sorted((root / "boot").glob("xen-*-amd64.gz"))
    if len(hypervisors) != 1:
        raise LabError(f"{len(hypervisors)} hypervisors were installed; expected one.")
    # QEMU's multiboot loader wants it uncompressed.
    (made / "xen.elf").write_bytes(gzip.decompress(hypervisors[0].read_bytes()))

    modules = Modules(trees[0])
    busybox = (root / "bin" / "busybox").read_bytes()
    (made / "busybox").write_bytes(busybox)
    needed = modules.entries(DOM0_BOOT_MODULES)
    script = (HERE / "host" / "initramfs-init").read_text()
    script = script.replace("@INSMOD@\n", insmod_lines(needed))
    (made / "initramfs").write_bytes(
        archive(
            [program("bin/busybox", busybox), *needed, program("init", script.encode())],
        )
    )
    kept = made / "guest-modules"
    kept.mkdir()
    frontends = modules.entries(GUEST_MODULES)
    for entry in frontends:
        (kept / Path(entry.path).name).write_bytes(entry.data)
    (kept / "order").write_text(" ".join(Path(entry.path).stem for entry in frontends))


def _keys(root: Path, made: Path) -> None:
    for name in ("key", "host_key"):
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"lab {name}", "-f", made / name])
    ssh = root / "etc" / "ssh"
    for old in ssh.glob("ssh_host_*"):
        old.unlink()
    shutil.copy(made / "host_key", ssh / "ssh_host_ed25519_key")
    shutil.copy(made / "host_key.pub", ssh / "ssh_host_ed25519_key.pub")
    home = root / "root" / ".ssh"
    home.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(made / "key.pub", home / "authorized_keys")
    # The hosts may log in to each other, as xl migrate does.
    shutil.copy(made / "key", home / "id_ed25519")


def _disk(recipe: Recipe, root: Path, disk: Path) -> None:
    with disk.open("wb") as new:
        new.truncate(recipe.image_mib << 20)
    # A small journal: a power cut must leave a file system that the next boot can mount.
    options = ["-q", "-F", "-m", "0", "-J", "size=8", "-E", "root_owner=0:0,lazy_itable_init=1"]
    run([*rooted(["mkfs.ext4"]), *options, "-d", root, disk])
    run([*rooted(["rm"]), "-rf", root])


# Path in the host to file of the lab, and whether it is a program.
HOST_FILES = {
    "usr/lib/kemari-lab/init": ("init", True),
    "usr/lib/kemari-lab/kemarid-up": ("kemarid-up", True),
    "usr/lib/kemari-lab/reset": ("reset", True),
    "usr/lib/kemari-lab/kemari.toml": ("kemari.toml", False),
    # /etc/service is a link to .../default.
    "etc/runit/runsvdir/default/kemarid/run": ("kemarid-run", True),
    "etc/runit/runsvdir/default/kemarid/finish": ("kemarid-finish", True),
    "etc/xen/scripts/block-kemari": ("block-kemari", True),
    "etc/hosts": ("hosts", False),
    "etc/ssh/sshd_config.d/lab.conf": ("sshd.conf", False),
    "etc/ssh/ssh_config.d/lab.conf": ("ssh_config", False),
}


def host_layer() -> dict[str, LayerFile]:
    """The lab's own files of a host: its first program and how its services are set up."""
    return {
        path: executable(data) if is_program else LayerFile(data)
        for path, (name, is_program) in HOST_FILES.items()
        for data in [(HERE / "host" / name).read_bytes()]
    }


def write_disk(base: Base, layer: Layer, disk: Path) -> None:
    """Make a disk of the base with the layer's files above it.

    :param disk: where it is to be; replaced if it is there
    :raises LabError: a file could not be written into it
    """
    new = disk.with_name(disk.name + ".new")
    run(["cp", "--sparse=always", "--reflink=auto", base.disk, new])
    with tempfile.TemporaryDirectory(prefix="kemari-layer-") as work:
        script: list[str] = []
        folders: set[str] = set()
        for number, path in enumerate(sorted(layer)):
            entry = layer[path]
            parts = path.split("/")
            for depth in range(1, len(parts)):
                parent = "/".join(parts[:depth])
                if parent not in folders:
                    folders.add(parent)
                    script.append(f'mkdir "/{parent}"')
            source = Path(work) / str(number)
            source.write_bytes(entry.data)
            script.append(f'rm "/{path}"')
            script.append(f'write "{source}" "/{path}"')
            script.append(f'set_inode_field "/{path}" mode 0{entry.mode:o}')
        _debugfs(new, script)
        _verify(new, layer, Path(work))
    new.replace(disk)


def _debugfs(disk: Path, script: list[str]) -> str:
    # debugfs complains about folders that are there and files that are not: both are expected,
    # and its exit status says nothing.  What counts is checked afterwards.
    return run(["debugfs", "-w", "-f", "-", disk], stdin="\n".join(script) + "\n")


def _verify(disk: Path, layer: Layer, work: Path) -> None:
    """Read everything back: a size alone is right even where the disk was full."""
    paths = sorted(layer)
    script = [f'dump "/{path}" "{work}/{number}.read"' for number, path in enumerate(paths)]
    _debugfs(disk, script)
    for number, path in enumerate(paths):
        read = work / f"{number}.read"
        if not read.exists() or read.read_bytes() != layer[path].data:
            raise LabError(f"/{path} could not be written into {disk.name}.")


def tar_of(layer: Layer) -> bytes:
    """The layer's files as a tar archive; everything belongs to root."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path, entry in sorted(layer.items()):
            info = tarfile.TarInfo(path)
            info.mode = stat.S_IMODE(entry.mode)
            info.size = len(entry.data)
            tar.addfile(info, io.BytesIO(entry.data))
    return out.getvalue()


def guest_initramfs(busybox: bytes, modules: list[Entry], programs: list[Entry]) -> bytes:
    """The guest's whole user space; ``programs`` are those that its first program starts."""
    script = (HERE / "guest" / "init").read_text().replace("@INSMOD@\n", insmod_lines(modules))
    return archive(
        [
            folder("sbin"),
            program("bin/busybox", busybox),
            program("sbin/poweroff", (HERE / "guest" / "poweroff").read_bytes()),
            *modules,
            *programs,
            program("init", script.encode()),
        ]
    )
