# SPDX-License-Identifier: Apache-2.0
"""The file or block device that holds a replica."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from diskbuffer.errors import ReplicaError
from diskbuffer.stream import Flags, Kind, Record

SECTOR = 512
_ZEROS = bytes(1 << 20)
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # FALLOC_FL_* of Linux linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Backing:
    """An open target.

    Not opened exclusively: the server that shows it to a shell has it open too, and refuses writes.

    :param path: regular file or block device
    :ivar size: bytes, whole sectors
    :raise ReplicaError: it is neither, or cannot be opened for writing
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ReplicaError(
                f"{path} cannot be used for the copy of a disk: {error.strerror}"
            ) from error
        mode = os.fstat(self._fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            self.close()
            raise ReplicaError(f"{path} is neither a file nor a block device")
        self.size = os.lseek(self._fd, 0, os.SEEK_END) // SECTOR * SECTOR
        self._unflushed = False

    def apply(self, records: Iterable[Record]) -> None:
        """Do what the records say, in order; a FLUSH among them is one here.

        :raise ReplicaError: the disk fails or is full: what it holds now is of no epoch
        """
        try:
            for record in records:
                match record.kind:
                    case Kind.WRITE:
                        self._write(record.payload, record.offset)
                    case Kind.ZERO:
                        self._zero(record)
                    case Kind.FLUSH:
                        self._flush()
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        """Bring everything to stable storage.

        :raise ReplicaError: the disk fails
        """
        try:
            self._flush()
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Close the target (idempotent)."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _failed(self, error: OSError) -> ReplicaError:
        return ReplicaError(
            f"The copy of the disk in {self.path} cannot be kept up: {error.strerror}"
        )

    def _write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        self._unflushed = True
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done

    def _zero(self, record: Record) -> None:
        self._unflushed = True
        if record.flags & Flags.PUNCH and self._punch(record.offset, record.extent):
            return
        end = record.offset + record.extent
        for offset in range(record.offset, end, len(_ZEROS)):
            self._write(memoryview(_ZEROS)[: min(len(_ZEROS), end - offset)], offset)

    def _punch(self, offset: int, length: int) -> bool:
        """Make a hole; False where that is not possible."""
        if _libc.fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length) == 0:
            return True
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return False
        raise OSError(number, os.strerror(number))

    def _flush(self) -> None:
        if self._unflushed:
            os.fdatasync(self._fd)
            self._unflushed = False
