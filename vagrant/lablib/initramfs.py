# SPDX-License-Identifier: Apache-2.0
"""Initial RAM file systems: the archive format, and kernel modules with what they need."""

from __future__ import annotations

import lzma
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vagrant.lablib.errors import LabError

INSMOD_DIR = "mod"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, folder or link of the archive.

    :ivar path: where it is, without a leading /
    :ivar mode: type and permissions as in ``st_mode``
    :ivar data: content of a file, target of a link, empty for a folder
    """

    path: str
    mode: int
    data: bytes = b""


def folder(path: str) -> Entry:
    """A folder that everybody may read."""
    return Entry(path, stat.S_IFDIR | 0o755)


def program(path: str, data: bytes) -> Entry:
    """A file that can be executed."""
    return Entry(path, stat.S_IFREG | 0o755, data)


def _record(number: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    nlink = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (number, entry.mode, 0, 0, nlink, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    head += bytes(-len(head) % 4)
    return head + entry.data + bytes(-len(entry.data) % 4)


def archive(entries: Iterable[Entry]) -> bytes:
    """Write an archive in the kernel's ``newc`` format.

    Source: Documentation/driver-api/early-userspace/buffer-format.rst of Linux.  Folders that
    lead to an entry are added by themselves; everything belongs to root and has no time, so
    that the same entries always give the same bytes.  It is not compressed: in an emulated machine
    unpacking takes seconds, reading more does not.
    """
    complete: dict[str, Entry] = {}
    for entry in entries:
        parts = entry.path.split("/")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            complete.setdefault(parent, folder(parent))
        complete[entry.path] = entry
    blocks = [_record(number, entry) for number, entry in enumerate(complete.values(), start=1)]
    blocks.append(_record(0, Entry("TRAILER!!!", 0)))
    return b"".join(blocks)


def _plain(name: str) -> str:
    return name.replace("-", "_")


class Modules:
    """The module tree of one kernel, below ``lib/modules/VERSION``."""

    def __init__(self, tree: Path) -> None:
        """:raises LabError: the folder has no index of dependencies"""
        self.tree = tree
        try:
            index = (tree / "modules.dep").read_text()
            builtin = (tree / "modules.builtin").read_text()
        except OSError:
            raise LabError(f"{tree} has no modules.dep; expected an installed kernel.") from None
        self._needs: dict[str, list[str]] = {}
        self._path: dict[str, str] = {}
        for line in index.splitlines():
            path, _, needs = line.partition(":")
            name = self._name(path)
            self._path[name] = path
            self._needs[name] = [self._name(need) for need in needs.split()]
        self._builtin = {self._name(line) for line in builtin.splitlines()}

    @staticmethod
    def _name(path: str) -> str:
        return _plain(path.rpartition("/")[2].partition(".ko")[0])

    def order(self, names: Sequence[str]) -> list[str]:
        """The modules to load for these to work, those that others need first.

        :raises LabError: the kernel does not have one of them
        """
        ordered: list[str] = []

        def add(name: str) -> None:
            if name in ordered or name in self._builtin:
                return
            if name not in self._path:
                raise LabError(f"The kernel {self.tree.name} has no module {name}.")
            for need in reversed(self._needs[name]):
                add(need)
            ordered.append(name)

        for name in names:
            add(_plain(name))
        return ordered

    def read(self, name: str) -> bytes:
        """The object code of a module, not compressed.

        :raises LabError: it is compressed in a way other than xz
        """
        path = self.tree / self._path[_plain(name)]
        data = path.read_bytes()
        if path.suffix == ".xz":
            return lzma.decompress(data)
        if path.suffix != ".ko":
            raise LabError(f"{path.name} is compressed with {path.suffix}; expected .ko or .xz.")
        return data

    def entries(self, names: Sequence[str]) -> list[Entry]:
        """The modules to load for ``names``, as files of an archive, in loading order."""
        return [
            Entry(f"{INSMOD_DIR}/{name}.ko", stat.S_IFREG | 0o644, self.read(name))
            for name in self.order(names)
        ]


def insmod_lines(entries: Iterable[Entry]) -> str:
    """Shell commands that load these modules in this order."""
    return "".join(f"insmod /{entry.path}\n" for entry in entries)
