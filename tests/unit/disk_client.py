# SPDX-License-Identifier: Apache-2.0
"""A small NBD client: as much of the protocol as the tests of a disk's server need.

https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md: fixed newstyle, NBD_OPT_GO,
simple replies.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

_OPTION_GO = 7
_ACK, _INFO = 1, 3
_READ, _WRITE, _DISCONNECT, _FLUSH, _TRIM, _ZEROES = 0, 1, 2, 3, 4, 6
_FUA, _NO_HOLE = 1, 2


class NbdClient:
    """One connection; requests are answered before the call returns.

    :raise OSError: with the server's error number
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(os.fspath(path))
        magic, version, _flags = struct.unpack("!8s8sH", self._take(18))
        assert (magic, version) == (b"NBDMAGIC", b"IHAVEOPT")
        self._socket.sendall(struct.pack("!I", 3))
        self._socket.sendall(struct.pack("!8sIIIH", b"IHAVEOPT", _OPTION_GO, 6, 0, 0))
        self.size = self.flags = 0
        while True:
            _magic, _option, kind, length = struct.unpack("!QIII", self._take(20))
            data = self._take(length)
            if kind == _INFO and data[:2] == b"\0\0":
                self.size, self.flags = struct.unpack("!2xQH", data)
            elif kind == _ACK:
                break
            elif kind & 1 << 31:
                raise OSError(f"the server refused: {data!r}")

    def _take(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            got = self._socket.recv(length - len(data))
            if not got:
                raise ConnectionError("the server closed the connection")
            data += got
        return bytes(data)

    def _do(self, kind: int, offset: int, length: int, data: bytes = b"", flags: int = 0) -> None:
        head = struct.pack("!IHHQQI", 0x25609513, flags, kind, 1, offset, length)
        self._socket.sendall(head + data)
        magic, error, _cookie = struct.unpack("!IIQ", self._take(16))
        assert magic == 0x67446698
        if error:
            raise OSError(error, os.strerror(error))

    def read(self, offset: int, length: int) -> bytes:
        self._do(_READ, offset, length)
        return self._take(length)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        self._do(_WRITE, offset, len(data), data, _FUA if fua else 0)

    def zero(self, offset: int, length: int, *, hole: bool = True) -> None:
        self._do(_ZEROES, offset, length, flags=0 if hole else _NO_HOLE)

    def trim(self, offset: int, length: int) -> None:
        self._do(_TRIM, offset, length)

    def flush(self) -> None:
        self._do(_FLUSH, 0, 0)

    def close(self) -> None:
        try:
            self._socket.sendall(struct.pack("!IHHQQI", 0x25609513, 0, _DISCONNECT, 1, 0, 0))
        except OSError:
            pass
        self._socket.close()
