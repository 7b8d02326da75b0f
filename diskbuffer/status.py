# SPDX-License-Identifier: Apache-2.0
"""The page of figures that a disk's server shares: read without a system call.

``struct status`` in ``diskbuffer/_disk.h``: eight bytes of magic, then 64-bit integers in the
machine's order, each of which the server stores at once.
"""

from __future__ import annotations

import mmap
import os
import sys
from dataclasses import dataclass, fields
from enum import IntEnum, IntFlag
from pathlib import Path

from diskbuffer.errors import ServerError

_MAGIC = b"KMRIDISK"
_VERSION = 1
_SIZE = 4096

if sys.byteorder != "little":  # pragma: no cover - Xen on such a machine does not exist
    raise ImportError("diskbuffer needs a little-endian machine")


class StreamState(IntEnum):
    """What the server does with changes."""

    #: They are marked in the bitmap at most.
    IDLE = 0
    #: They are also written down for the reader of the stream.
    STREAMING = 1
    #: They were, until something failed or the reader went away.
    BROKEN = 2


class Flag(IntFlag):
    """Facts about a disk."""

    READONLY = 1
    REPLICA = 2
    TRACKING = 4
    SYNCING = 8
    SHARED = 16
    HOLDING = 32


@dataclass(frozen=True, slots=True)
class Figures:
    """All that the page says, in its order.

    :ivar pid: the server's process
    :ivar size: of the disk, bytes
    :ivar flags: see :class:`Flag`
    :ivar session: number of the stream, counted from 1 since the server began
    :ivar state: see :class:`StreamState`
    :ivar position: bytes of this stream that were written so far
    :ivar drained: of these, bytes that were handed to the socket
    :ivar limit: bytes that may wait
    :ivar sync_total: chunks to copy in this session
    :ivar sync_left: chunks left to copy
    :ivar dirty: chunks marked in the bitmap
    :ivar waits: writes that waited for room
    :ivar errors: requests that failed on this disk
    :ivar issued: of a shared disk, position up to which changes are on its target's stable storage
    """

    version: int
    pid: int
    size: int
    flags: int
    session: int
    state: int
    position: int
    drained: int
    limit: int
    sync_total: int
    sync_left: int
    dirty: int
    reads: int
    read_bytes: int
    writes: int
    written_bytes: int
    flushes: int
    waits: int
    errors: int
    issued: int


_NAMES = [field.name for field in fields(Figures)]
_SESSION, _STATE, _POSITION = map(_NAMES.index, ("session", "state", "position"))


class StatusPage:
    """A server's page, mapped.

    :raise ServerError: there is none, or it is not one of this version
    """

    def __init__(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._map = mmap.mmap(descriptor, _SIZE, prot=mmap.PROT_READ)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ServerError(
                f"{path} cannot be read: {error.strerror}; expected a disk's server"
            ) from None
        except ValueError:
            raise ServerError(f"{path} is shorter than {_SIZE} bytes") from None
        self._words = memoryview(self._map)[8 : 8 * (1 + len(_NAMES))].cast("Q")
        if self._map[:8] != _MAGIC or self._words[0] != _VERSION:
            self.close()
            raise ServerError(f"{path} is not the status page of a disk's server")

    def figures(self) -> Figures:
        """Everything, each figure by itself of one moment."""
        return Figures(*self._words)

    def position(self, session: int) -> int | None:
        """How far stream ``session`` was written; None when changes are not written to it.

        Every change that was answered before this call is in the stream before the position.
        """
        words = self._words
        position = words[_POSITION]
        # Position first: a change that is not in the stream any more was preceded by the state.
        if words[_STATE] != StreamState.STREAMING or words[_SESSION] != session:
            return None
        return position

    def close(self) -> None:
        """Unmap (idempotent)."""
        self._words.release()
        self._map.close()
