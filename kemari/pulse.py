# SPDX-License-Identifier: Apache-2.0
"""Pulses: datagrams that say that a host lives (``docs/protocol.md``), and where they are noted.

No I/O.  :mod:`kemari.pacemaker` is the process that sends and hears them, :mod:`kemari.pulses` the
daemon's end of it.
"""

from __future__ import annotations

import hmac
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

MAGIC: Final = b"KMRP"
VERSION: Final = 1
_BODY: Final = struct.Struct("<4sB3s16sQI")
_MAC_SIZE: Final = 16
#: Bytes of a datagram.
SIZE: Final = _BODY.size + _MAC_SIZE
_MOST_STOOD: Final = 0xFFFFFFFF
#: Paths that can be noted, over all hosts.
SLOTS: Final = 511


def pack(key: bytes, host: bytes, number: int, stood_ms: int) -> bytes:
    """One datagram.

    :param host: the sender's UUID, 16 bytes
    :param number: greater than that of the datagram before
    :param stood_ms: milliseconds since the daemon's loop last turned
    """
    body = _BODY.pack(MAGIC, VERSION, bytes(3), host, number, min(stood_ms, _MOST_STOOD))
    return body + _mac(key, body)


def _mac(key: bytes, body: bytes) -> bytes:
    return blake2b(body, key=key, digest_size=_MAC_SIZE).digest()


@dataclass(slots=True)
class _Sender:
    key: bytes
    number: int = -1


class Ear:
    """Tells good datagrams from others.

    :ivar limit_ms: a daemon that has stood still for longer gives no evidence
    """

    def __init__(self, limit_ms: int) -> None:
        self.limit_ms = limit_ms
        self._senders: dict[bytes, _Sender] = {}

    def know(self, keys: Mapping[bytes, bytes]) -> None:
        """From now on these are the hosts: 16 bytes of UUID -> key."""
        self._senders = {
            host: known
            if (known := self._senders.get(host)) is not None and known.key == key
            else _Sender(key)
            for host, key in keys.items()
        }

    def hear(self, untrusted: bytes) -> bytes | None:
        """The host that lives by this datagram, or None: it proves nothing."""
        if len(untrusted) != SIZE:
            return None
        body, mac = untrusted[: _BODY.size], untrusted[_BODY.size :]
        magic, version, reserved, host, number, stood_ms = _BODY.unpack(body)
        sender = self._senders.get(host)
        if sender is None or (magic, version, reserved) != (MAGIC, VERSION, bytes(3)):
            return None
        if not hmac.compare_digest(mac, _mac(sender.key, body)) or number <= sender.number:
            return None
        sender.number = number
        return bytes(host) if stood_ms <= self.limit_ms else None


class Board:
    """Times that two processes tell each other through shared memory.

    Each is one aligned 64-bit number, which is written and read at once on every machine that Xen
    runs on; all are ``time.monotonic_ns()``, one clock for the whole host.

    :param memory: :attr:`BYTES` bytes that both processes have mapped
    """

    BYTES: Final = 8 * (SLOTS + 1)

    def __init__(self, memory: memoryview) -> None:
        self._words = memory.cast("Q")

    def turn(self) -> None:
        """The daemon's event loop turns."""
        self._words[0] = time.monotonic_ns()

    @property
    def stood_ms(self) -> int:
        """Milliseconds since it last did."""
        return max(0, time.monotonic_ns() - self._words[0]) // 1_000_000

    def note(self, slot: int) -> None:
        """Evidence on the path of this slot, 0 to SLOTS - 1, came now."""
        self._words[1 + slot] = time.monotonic_ns()

    def heard(self, slot: int) -> float:
        """``time.monotonic()`` of the last evidence on that path, or 0."""
        return self._words[1 + slot] / 1e9

    def clear(self, slot: int) -> None:
        """The slot will be that of another path."""
        self._words[1 + slot] = 0
