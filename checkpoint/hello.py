# SPDX-License-Identifier: Apache-2.0
"""What the two ends of a connection tell each other first (``docs/protocol.md``: Greeting)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from checkpoint.codec import COMPRESSIONS
from checkpoint.errors import ProtocolError
from checkpoint.fields import Fields
from checkpoint.wire import VERSIONS

ROLES = ("replicate", "liveness")
_PULSE_KEY = re.compile(r"([0-9a-f]{64})?")


@dataclass(frozen=True, slots=True)
class Hello:
    """What an end says of itself.

    :ivar role: "replicate" or "liveness"; that of an accepting end is the connecting end's
    :ivar host: name of the host, for people
    :ivar host_id: identity of the host, the same on every connection and after a restart
    :ivar heartbeat: seconds of silence after which this end takes the other for dead
    :ivar addresses: further addresses, "address:port", at which it accepts liveness connections
    :ivar compression: compressions that it can unpack
    :ivar software: name and version, for people
    :ivar pulse_key: what its pulses are made with, 64 hexadecimal digits, or "": it sends none
    """

    role: str
    host: str
    host_id: str
    heartbeat: float
    addresses: tuple[str, ...] = ()
    compression: tuple[str, ...] = COMPRESSIONS
    software: str = ""
    pulse_key: str = ""

    def pack(self) -> dict[str, Any]:
        """The keys that HELLO and HELLO_ACK share."""
        return {
            "role": self.role,
            "host": self.host,
            "host_id": self.host_id,
            "heartbeat_ms": max(1, round(self.heartbeat * 1000)),
            "addresses": list(self.addresses),
            "compression": list(self.compression),
            "software": self.software,
            "pulse_key": self.pulse_key,
        }


def unpack(untrusted_fields: Fields) -> Hello:
    """Check what the peer says of itself.

    :raise ProtocolError: a key is missing or wrong
    """
    return Hello(
        role=untrusted_fields.choice("role", ROLES),
        host=untrusted_fields.text("host"),
        host_id=untrusted_fields.text("host_id"),
        heartbeat=untrusted_fields.integer("heartbeat_ms", 1, 3_600_000) / 1000,
        addresses=untrusted_fields.texts("addresses"),
        compression=untrusted_fields.texts("compression"),
        software=untrusted_fields.text("software"),
        pulse_key=_pulse_key(untrusted_fields.text("pulse_key")),
    )


def _pulse_key(untrusted: str) -> str:
    if not _PULSE_KEY.fullmatch(untrusted):
        raise ProtocolError("'pulse_key' is neither empty nor 64 hexadecimal digits")
    return untrusted


def common_version(untrusted_versions: tuple[int, ...]) -> int | None:
    """The highest version that both ends speak, or None."""
    return max(set(VERSIONS) & set(untrusted_versions), default=None)


def check_answer(mine: Hello, untrusted_fields: Fields) -> Hello:
    """Check the answer to a HELLO.

    :raise ProtocolError: a version that was not offered, or another role
    """
    version = untrusted_fields.integer("version")
    if version not in VERSIONS:
        raise ProtocolError(f"HELLO_ACK chooses version {version}, offered were {VERSIONS}")
    peer = unpack(untrusted_fields)
    if peer.role != mine.role:
        raise ProtocolError(f"HELLO_ACK is for the role {peer.role!r}, expected {mine.role!r}")
    return peer
