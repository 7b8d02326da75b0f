# SPDX-License-Identifier: Apache-2.0
"""What a simulated host has on its disks, and what a power cut leaves of it.

A :class:`Target` holds a guest's disk, :class:`Files` knows what of small files is on stable
storage.  Until it was flushed, any part of a change may be there after a power cut or not, in any
order: sector by sector in a target, name by name and bit by bit in files.  What a process that is
killed has written stays: its kernel has it.

:class:`DiskOs` and :class:`FileOs` stand in for the module ``os`` where the product writes both.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

SECTOR: Final = 512


class Target:
    """What holds a guest's disk on one host.

    :param changed: called with (first byte, end) after each change
    :ivar lost: sectors that its kernel shows, and will bring to stable storage only if they are
        written again: that failed once
    :ivar errors: so many times bringing something there has failed
    :ivar untold: nobody has been told of the last time
    :ivar stuck: seconds for which the next call of a daemon stands still
    :ivar now: what its kernel shows
    :ivar stable: what is on stable storage for sure
    :ivar pending: (offset, data) of what was written since the last flush, in order
    """

    def __init__(self, contents: bytes, changed: Callable[[int, int], None]) -> None:
        self.now = bytearray(contents)
        self.stable = bytearray(contents)
        self.pending: list[tuple[int, bytes]] = []
        self.lost: set[int] = set()
        self.errors = 0
        self.untold = False
        self.stuck = 0.0
        self._changed = changed

    def write(self, offset: int, data: bytes) -> None:
        """Change it, in memory."""
        end = offset + len(data)
        self.now[offset:end] = data
        self.pending.append((offset, data))
        self._changed(offset, end)

    def flush(self) -> None:
        """Bring all of it to stable storage, but for what is lost; see :class:`Opened`."""
        for offset, data in self.pending:
            self.stable[offset : offset + len(data)] = data
            for sector in self.lost.intersection(_sectors(offset, len(data))):
                at = sector * SECTOR
                self.stable[at : at + SECTOR] = self.now[at : at + SECTOR]
                self.lost.discard(sector)
        self.pending.clear()

    def break_writing_back(self) -> None:
        """Nothing of what waits can be brought to stable storage; the kernel forgets that it waits.

        What is shown stays as it is (Linux mm/filemap.c, __filemap_set_wb_err).
        """
        if self.pending:
            for offset, data in self.pending:
                self.lost.update(_sectors(offset, len(data)))
            self.pending.clear()
            self.errors += 1
            self.untold = True

    def settled(self, first: int, end: int) -> bool:
        """Whether a power cut would leave bytes ``first`` to ``end`` as they are."""
        if self.lost and not self.lost.isdisjoint(_sectors(first, end - first)):
            return False
        return not any(at < end and first < at + len(data) for at, data in self.pending)

    def left(self, chance: random.Random) -> bytearray:
        """What a power cut may leave: each sector not flushed is as it was at some time since.

        Now and then what was written last is there, and what was written before is not.
        """
        share = chance.choice((0.0, 0.5, 1.0))
        first = chance.randrange(len(self.pending) + 1) if chance.random() < 0.5 else 0
        versions: dict[int, list[bytes]] = {}
        image, shown = bytearray(self.stable), bytearray(self.stable)
        for number, (offset, data) in enumerate(self.pending):
            shown[offset : offset + len(data)] = data
            for sector in _sectors(offset, len(data)):
                at = sector * SECTOR
                if number >= first:
                    versions.setdefault(sector, []).append(bytes(shown[at : at + SECTOR]))
        for sector, known in versions.items():
            if chance.random() < share:
                at = sector * SECTOR
                image[at : at + SECTOR] = known[-1] if share == 1 else chance.choice(known)
        return image

    def crash(self, image: bytearray) -> None:
        """Power fails, and that is what is left."""
        self.pending.clear()
        self.lost.clear()
        self.untold = False
        self.stable[:] = self.now[:] = image


class Opened:
    """An open file of a target, which is told once of each failure (Linux lib/errseq.c).

    One that is opened later is told of the last one if nobody was yet.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._told = target.errors - target.untold

    def flush(self) -> bool:
        """Bring everything to stable storage; False if something was lost since the last time."""
        self.target.flush()
        whole, self._told = self._told == self.target.errors, self.target.errors
        if not whole:
            self.target.untold = False
        return whole


class Files:
    """Small files below one folder: which of them would outlive a power cut.

    :ivar version: grows with each change that is known
    """

    def __init__(self, root: Path, changed: Callable[[], None]) -> None:
        self.version = 0
        self._root = root
        self._changed = changed
        self._synced: dict[int, bytes] = {}
        self._names: dict[Path, dict[str, int]] = {}

    def fresh(self, descriptor: int) -> None:
        """A file was made or emptied."""
        self._synced.pop(os.fstat(descriptor).st_ino, None)

    def sync(self, descriptor: int) -> None:
        """A file, or a folder's names, are on stable storage."""
        about = os.fstat(descriptor)
        if stat.S_ISDIR(about.st_mode):
            path = _path(descriptor)
            self._names[path] = _names(path)
        else:
            # Not by the descriptor itself, which may be for writing only.
            self._synced[about.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()
        self.touched()

    def touched(self) -> None:
        """Something was written."""
        self.version += 1
        self._changed()

    def stable(self, path: Path) -> bytes | None:
        """What is surely in a file after a power cut; None when it may be missing."""
        inode = self._names.get(path.parent, {}).get(path.name)
        return None if inode is None else self._synced.get(inode, b"")

    def crash(self, chance: random.Random) -> None:
        """Power fails: of what was not flushed, anything may be left."""
        for folder, known in self._names.items():
            present = _names(folder)
            for name in sorted(known.keys() | present):
                path = folder / name
                left: bytes | None
                before = self._synced.get(known[name], b"") if name in known else None
                after = path.read_bytes() if name in present else None
                if known.get(name) == present.get(name):
                    left = _torn(chance, before or b"", after or b"")
                else:
                    if name in present:
                        after = self._synced.get(present[name], b"")
                    left = chance.choice((before, after))
                if left is None:
                    path.unlink(missing_ok=True)
                else:
                    path.write_bytes(left)
                    self._synced[path.stat().st_ino] = left
            self._names[folder] = _names(folder)
        self.touched()


def _sectors(offset: int, length: int) -> range:
    return range(offset // SECTOR, (offset + length - 1) // SECTOR + 1)


def _path(descriptor: int) -> Path:
    """Where the file or folder is that is open as ``descriptor``."""
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def _names(folder: Path) -> dict[str, int]:
    return {each.name: each.inode() for each in os.scandir(folder) if each.is_file()}


def _torn(chance: random.Random, before: bytes, after: bytes) -> bytes:
    """What may be left of a file that was changed in its place."""
    if len(before) != len(after) or before == after:
        return chance.choice((before, after))
    mixed = bytearray(before)
    for place, (one, other) in enumerate(zip(before, after, strict=True)):
        if one != other:
            mixed[place] = one ^ ((one ^ other) & chance.randrange(256))
    return bytes(mixed)


class _Os(types.ModuleType):
    """The module ``os``, but for what is simulated."""

    def __init__(self) -> None:
        super().__init__("os")

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class FileOs(_Os):
    """For :mod:`diskbuffer.durable`.

    :param files: which of them a path is one of; None if power cuts spare it
    """

    def __init__(self, files: Callable[[Path], Files | None]) -> None:
        super().__init__()
        self._files = files

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        """See :func:`os.open`."""
        descriptor = os.open(path, flags, mode)
        files = self._files(path)
        if files is not None and flags & os.O_CREAT:
            files.fresh(descriptor)
        return descriptor

    def fsync(self, descriptor: int) -> None:
        """See :func:`os.fsync`."""
        files = self._files(_path(descriptor))
        if files is not None:
            files.sync(descriptor)


class DiskOs(_Os):
    """For :mod:`diskbuffer.backing`: a target is a file of its size, whose contents are elsewhere.

    :param targets: path -> target
    :param hang: has the calling thread stand still for so many seconds
    """

    def __init__(self, targets: dict[Path, Target], hang: Callable[[float], None]) -> None:
        super().__init__()
        self._targets = targets
        self._hang = hang
        self._open: dict[int, Opened] = {}

    def open(self, path: Path, flags: int) -> int:
        """See :func:`os.open`."""
        descriptor = os.open(path, flags)
        self._open[descriptor] = Opened(self._targets[path])
        return descriptor

    def close(self, descriptor: int) -> None:
        """See :func:`os.close`."""
        del self._open[descriptor]
        os.close(descriptor)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        """See :func:`os.pwrite`."""
        self._stand_still(descriptor)
        self._open[descriptor].target.write(offset, bytes(data))
        return len(data)

    def fdatasync(self, descriptor: int) -> None:
        """See :func:`os.fdatasync`."""
        self._stand_still(descriptor)
        if not self._open[descriptor].flush():
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fallocate(self, descriptor: int, _mode: int, offset: int, length: int) -> int:
        """As the C library's: a hole reads as zeros."""
        self._stand_still(descriptor)
        self._open[descriptor].target.write(offset, bytes(length))
        return 0

    def _stand_still(self, descriptor: int) -> None:
        target = self._open[descriptor].target
        seconds, target.stuck = target.stuck, 0.0
        if seconds:
            self._hang(seconds)

    def end(self) -> None:
        """Close what killed processes had open."""
        for descriptor in list(self._open):
            self.close(descriptor)
