# SPDX-License-Identifier: Apache-2.0
"""A target that another host reaches too, read and written past this host's page cache.

``O_DIRECT`` wants offsets, lengths and memory that are multiples of the target's block; what is
not is read, changed and written back (open(2), NOTES).
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from pathlib import Path
from typing import Final

from diskbuffer.errors import ReplicaError
from diskbuffer.stream import Buffer

SECTOR: Final = 512
_LARGEST_BLOCK: Final = 4096
_SLICE: Final = 1 << 20


class DirectTarget:
    """An open target.

    :param path: regular file or block device
    :param writing: whether it is to be changed
    :ivar size: bytes
    :raise ReplicaError: it is neither, or cannot be opened so
    """

    def __init__(self, path: Path, *, writing: bool = False) -> None:
        self.path = path
        self._memory = mmap.mmap(-1, _SLICE + 2 * _LARGEST_BLOCK)
        mode = os.O_RDWR if writing else os.O_RDONLY
        self._fd = -1
        try:
            kind = path.stat().st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
                raise ReplicaError(f"{path} is neither a file nor a block device")
            self._fd = os.open(path, mode | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            why = "it takes no direct I/O" if error.errno == errno.EINVAL else error.strerror
            raise ReplicaError(f"{path} cannot be used as a shared disk: {why}") from error
        try:
            self.size = os.lseek(self._fd, 0, os.SEEK_END) // SECTOR * SECTOR
            self._block = self._probe()
        except BaseException:
            self.close()
            raise

    def _probe(self) -> int:
        """The block of which requests are multiples, bytes."""
        block = SECTOR
        while True:
            try:
                os.preadv(self._fd, [memoryview(self._memory)[:block]], 0)
            except OSError as error:
                if error.errno != errno.EINVAL or block == _LARGEST_BLOCK:
                    raise self._failed(error) from error
                block *= 2
            else:
                return block

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the target.

        :raise ReplicaError: it cannot be read
        """
        data = bytearray()
        while len(data) < length:
            at = offset + len(data)
            skip = at % self._block
            part = min(length - len(data), _SLICE)
            self._get(0, at - skip, self._whole(skip + part))
            data += self._memory[skip : skip + part]
        return bytes(data)

    def write(self, offset: int, data: Buffer) -> None:
        """Write bytes.

        :raise ReplicaError: it cannot be written
        """
        view = memoryview(data)
        for start in range(0, len(view), _SLICE):
            self._write_slice(offset + start, view[start : start + _SLICE])

    def zero(self, offset: int, length: int) -> None:
        """Write zeros.

        :raise ReplicaError: it cannot be written
        """
        zeros = memoryview(bytes(min(length, _SLICE)))
        for start in range(0, length, _SLICE):
            self._write_slice(offset + start, zeros[: length - start])

    def flush(self) -> None:
        """Bring everything to stable storage.

        :raise ReplicaError: the target fails
        """
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Close it (idempotent)."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _whole(self, length: int) -> int:
        return -(-length // self._block) * self._block

    def _get(self, place: int, offset: int, length: int) -> None:
        """Read whole blocks into the memory at ``place``."""
        with memoryview(self._memory) as memory:
            try:
                while length:
                    got = os.preadv(self._fd, [memory[place : place + length]], offset)
                    if not got:
                        raise OSError(errno.EIO, os.strerror(errno.EIO))
                    place, offset, length = place + got, offset + got, length - got
            except OSError as error:
                raise self._failed(error) from error

    def _write_slice(self, offset: int, data: memoryview) -> None:
        skip = offset % self._block
        end = skip + len(data)
        whole = self._whole(end)
        start = offset - skip
        if skip:
            self._get(0, start, self._block)
        if end != whole and not (skip and whole == self._block):
            self._get(whole - self._block, start + whole - self._block, self._block)
        self._memory[skip:end] = bytes(data)
        with memoryview(self._memory) as memory:
            done = 0
            try:
                while done < whole:
                    done += os.pwritev(self._fd, [memory[done:whole]], start + done)
            except OSError as error:
                raise self._failed(error) from error

    def _failed(self, error: OSError) -> ReplicaError:
        return ReplicaError(f"The shared disk {self.path} fails here: {error.strerror}")
