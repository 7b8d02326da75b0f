# SPDX-License-Identifier: Apache-2.0
"""Registering the guest's xenstore watches again, in its name, before it runs.

Watches live in xenstored, not in the guest, so a moved guest would never hear of ``xl shutdown``.
The requests are put into the shell's still empty ring as the guest would have put them; the stub
notifies xenstored.  Message format: ``xen/include/public/io/xs_wire.h``.  Pure but for the ring
memory it is given.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from checkpoint.errors import ReviveError
from checkpoint.xen.rings import XENSTORE_RING, xenstore_indices

_HEADER = struct.Struct("<4I")
_XS_WATCH, _XS_WATCH_EVENT, _XS_ERROR = 4, 15, 16
_REQ_PROD_AT, _RSP_CONS_AT = 2 * XENSTORE_RING + 4, 2 * XENSTORE_RING + 8


class WatchRequests:
    """Sends watches through a xenstore ring and takes the answers out again.

    Each watch is answered, and then fires once (``docs/misc/xenstore.txt``); it is done when both
    were taken out, since whatever xenstored still had to write would go into the guest's own ring
    later.
    """

    def __init__(self, page: memoryview, watches: Sequence[tuple[str, str]]) -> None:
        """:param page: the shell's xenstore page, writable
        :param watches: (path, token) of each watch
        """
        self._page = page
        self._waiting = list(enumerate(watches, 1))
        self._unanswered: set[int] = set()
        self._silent: set[bytes] = set()
        self._received = bytearray()
        self._paths = {index: path for index, (path, _token) in self._waiting}

    @property
    def answered(self) -> bool:
        """Whether every watch was answered."""
        return not (self._waiting or self._unanswered or self._received)

    @property
    def done(self) -> bool:
        """Whether every watch was answered and has fired, and the ring is empty."""
        return self.answered and not self._silent

    def pump(self) -> bool:
        """Take answers and put requests, as far as the ring allows; never blocks.

        :return: whether xenstored must be notified: of requests, or of room in a ring that it had
            filled
        :raise ReviveError: xenstored refused a watch
        """
        put = self._take()
        while self._waiting:
            index, (path, token) = self._waiting[0]
            payload = path.encode() + b"\0" + token.encode() + b"\0"
            message = _HEADER.pack(_XS_WATCH, index, 0, len(payload)) + payload
            if not self._put(message):
                break
            self._unanswered.add(index)
            self._silent.add(token.encode())
            del self._waiting[0]
            put = True
        return put

    def _put(self, message: bytes) -> bool:
        req_cons, req_prod, _rsp_cons, _rsp_prod = xenstore_indices(self._page)
        if len(message) > XENSTORE_RING:
            raise ReviveError(
                f"a xenstore watch needs {len(message)} bytes (expected 1024 or less)"
            )
        if len(message) > XENSTORE_RING - ((req_prod - req_cons) & 0xFFFFFFFF):
            return False
        for offset, byte in enumerate(message):
            self._page[(req_prod + offset) % XENSTORE_RING] = byte
        struct.pack_into("<I", self._page, _REQ_PROD_AT, (req_prod + len(message)) & 0xFFFFFFFF)
        return True

    def _take(self) -> bool:
        """Take out what is there; whether the ring was full."""
        _req_cons, _req_prod, rsp_cons, rsp_prod = xenstore_indices(self._page)
        available = (rsp_prod - rsp_cons) & 0xFFFFFFFF
        if available > XENSTORE_RING:
            raise ReviveError(
                f"xenstored claims {available} bytes in a ring (expected {XENSTORE_RING} or less)"
            )
        for offset in range(available):
            self._received.append(self._page[XENSTORE_RING + (rsp_cons + offset) % XENSTORE_RING])
        struct.pack_into("<I", self._page, _RSP_CONS_AT, (rsp_cons + available) & 0xFFFFFFFF)
        while len(self._received) >= _HEADER.size:
            kind, index, _tx, length = _HEADER.unpack_from(self._received, 0)
            if len(self._received) < _HEADER.size + length:
                break
            payload = bytes(self._received[_HEADER.size : _HEADER.size + length])
            del self._received[: _HEADER.size + length]
            if kind == _XS_WATCH_EVENT:
                self._silent.discard(payload.rstrip(b"\0").rpartition(b"\0")[2])
                continue
            self._unanswered.discard(index)
            error = payload.rstrip(b"\0").decode("latin-1")
            # A path that this host does not have yet may still be watched; EEXIST cannot happen
            # on a fresh connection, so that any error is one.
            if kind == _XS_ERROR:
                raise ReviveError(f"xenstored refused a watch on {self._paths[index]}: {error}")
        return available == XENSTORE_RING
