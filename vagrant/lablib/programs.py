# SPDX-License-Identifier: Apache-2.0
"""A database's programs for the guest, out of Dom0's packages, and their libraries.

They are on the guest's second disk; a guest without disks can have them in its initramfs.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from vagrant.lablib.command import rooted, run
from vagrant.lablib.errors import LabError
from vagrant.lablib.initramfs import Entry, program

#: Name on the disk -> path in Dom0.  All of Redis is one program, which goes by its name; Debian
#: has it in the package of its tools.
PROGRAMS = {
    "redis-server": "usr/bin/redis-check-rdb",
    "redis-check-aof": "usr/bin/redis-check-rdb",
}
DATABASE = "redis-server"
#: Where it is in the hosts.
PLACE = "usr/lib/kemari-lab/programs.img"
_LOADER = "ld-linux-x86-64.so.2"
_SLACK_MIB = 4


def libraries(listed: str) -> list[str]:
    """Paths of the libraries that ``ldd`` has listed, the loader among them.

    :raises LabError: one is missing
    """
    found = []
    for line in listed.splitlines():
        name, arrow, where = line.strip().partition(" => ")
        path = (where if arrow else name).split(" (")[0]
        if path == "not found":
            raise LabError(f"The library {name} of a program for the guest is missing.")
        if path.startswith("/"):
            found.append(path)
    return found


def build(root: Path) -> None:
    """Make the disk from the packages in ``root`` and put it there.

    :raises LabError: a program or library is missing
    """
    with tempfile.TemporaryDirectory(prefix="kemari-programs-") as work:
        tree = Path(work) / "tree"
        (tree / "bin").mkdir(parents=True)
        (tree / "lib").mkdir()
        for name, path in PROGRAMS.items():
            listed = run([*rooted(["chroot"]), root, "ldd", f"/{path}"])
            for library in libraries(listed):
                _copy(root, library, tree / "lib" / Path(library).name)
            _copy(root, path, tree / "bin" / name)
        if not (tree / "lib" / _LOADER).exists():
            raise LabError(f"No program for the guest needs {_LOADER}; expected all to.")
        size = sum(file.stat().st_size for file in tree.rglob("*") if file.is_file())
        disk = root / PLACE
        disk.parent.mkdir(parents=True, exist_ok=True)
        with disk.open("wb") as new:
            new.truncate((size * 5 // 4 + (_SLACK_MIB << 20)) & -(1 << 20))
        # Nobody ever writes to it.
        run([*rooted(["mkfs.ext4"]), "-q", "-F", "-m", "0", "-O", "^has_journal", "-d", tree, disk])


def entries(dom0: Path) -> list[Entry]:
    """The programs, as the disk in a Dom0's root file system has them, for an initramfs.

    :param dom0: that root file system, raw
    :raises LabError: it holds no such disk
    """
    with tempfile.TemporaryDirectory(prefix="kemari-programs-") as work:
        disk, tree = Path(work) / "programs.img", Path(work) / "tree"
        tree.mkdir()
        run(["debugfs", "-R", f"dump /{PLACE} {disk}", dom0])
        run(["debugfs", "-R", f"rdump / {tree}", disk])
        files = [tree / "bin" / DATABASE, *sorted((tree / "lib").glob("*"))]
        if not all(file.is_file() for file in files) or len(files) == 1:
            raise LabError(f"{dom0.name} holds no disk with {DATABASE} at /{PLACE}.")
        return [program(f"programs/{file.relative_to(tree)}", file.read_bytes()) for file in files]


def _copy(root: Path, path: str, to: Path) -> None:
    # A link in there is one of that root's own.
    inside = run([*rooted(["chroot"]), root, "readlink", "-f", f"/{path.lstrip('/')}"]).strip()
    source = root / inside.lstrip("/")
    if not source.is_file():
        raise LabError(f"Dom0's packages have no /{path.lstrip('/')}.")
    shutil.copyfile(source, to)
    to.chmod(0o755)
