# SPDX-License-Identifier: Apache-2.0
"""xenstored's end of a domain's ring (``xen/include/public/io/xs_wire.h``), for watches only.

It sleeps until it is notified, and goes to sleep again when it has read all there is and has
nothing to write or no room to write it, as the C and the OCaml one do.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator

RING = 1024
WATCH, EVENT, ERROR = 4, 15, 16
_HEADER = struct.Struct("<4I")


class RingEnd:
    """Reads requests and writes answers, in pieces.

    :param page: the ring's page
    :param start: value of all indices at first
    :param pieces: how many bytes are read or written at one time, one number after the other
    :param refuse: the error for a watch on this path, or None
    :param noise: (path, token) of events that nobody asked for, one after each answer
    :ivar watches: what was registered: (path, token)
    """

    def __init__(
        self,
        page: bytearray | memoryview,
        start: int = 0,
        pieces: Iterable[int] = (),
        refuse: Callable[[str], str | None] = lambda path: None,
        noise: Iterable[tuple[str, str]] = (),
    ) -> None:
        self.page = page
        self.watches: list[tuple[str, str]] = []
        self._refuse = refuse
        self._noise = list(noise)
        self._pieces: Iterator[int] = iter(list(pieces))
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._awake = False
        struct.pack_into("<4I", page, 2048, *[start & 0xFFFFFFFF] * 4)

    def notify(self) -> None:
        """The event channel fires."""
        self._awake = True

    def step(self) -> bool:
        """Read a piece, work, write a piece; False when asleep."""
        if not self._awake:
            return False
        piece = next(self._pieces, RING)
        read = self._read(piece)
        self._work()
        wrote = self._write(piece)
        self._awake = bool(read or wrote)
        return True

    def _read(self, most: int) -> int:
        cons: int
        prod: int
        cons, prod = struct.unpack_from("<2I", self.page, 2048)
        count = min((prod - cons) & 0xFFFFFFFF, most)
        assert (prod - cons) & 0xFFFFFFFF <= RING
        for offset in range(count):
            self._incoming.append(self.page[(cons + offset) % RING])
        struct.pack_into("<I", self.page, 2048, (cons + count) & 0xFFFFFFFF)
        return count

    def _work(self) -> None:
        while len(self._incoming) >= _HEADER.size:
            kind, number, transaction, length = _HEADER.unpack_from(self._incoming)
            if len(self._incoming) < _HEADER.size + length:
                return
            assert (kind, transaction) == (WATCH, 0)
            body = bytes(self._incoming[_HEADER.size : _HEADER.size + length])
            del self._incoming[: _HEADER.size + length]
            path, token, rest = body.split(b"\0")
            assert rest == b""
            error = self._refuse(path.decode())
            if error is not None:
                self._send(ERROR, number, error.encode() + b"\0")
                continue
            self.watches.append((path.decode(), token.decode()))
            self._send(WATCH, number, b"OK\0")
            if self._noise:
                self._event(*self._noise.pop())
            self._event(path.decode(), token.decode())

    def _event(self, path: str, token: str) -> None:
        self._send(EVENT, 0, path.encode() + b"\0" + token.encode() + b"\0")

    def _send(self, kind: int, number: int, body: bytes) -> None:
        self._outgoing += _HEADER.pack(kind, number, 0, len(body)) + body

    def _write(self, most: int) -> int:
        cons: int
        prod: int
        cons, prod = struct.unpack_from("<2I", self.page, 2056)
        assert (prod - cons) & 0xFFFFFFFF <= RING
        count = min(RING - ((prod - cons) & 0xFFFFFFFF), most, len(self._outgoing))
        for offset in range(count):
            self.page[RING + (prod + offset) % RING] = self._outgoing[offset]
        del self._outgoing[:count]
        struct.pack_into("<I", self.page, 2060, (prod + count) & 0xFFFFFFFF)
        return count

    @property
    def quiet(self) -> bool:
        """Whether nothing is left to be written."""
        return not self._outgoing and not self._incoming
