# SPDX-License-Identifier: Apache-2.0
"""What another host says of a guest that it has taken over, or may have."""

from __future__ import annotations

from kemari.config import parse_address
from kemari.errors import PeerError
from kemari.ledger import Record
from kemari.peers import Peers


async def peer_runs(peers: Peers, record: Record) -> bool | None:
    """Whether the peer of a record runs the guest now; None if it has not said so or denied it.

    That is more than what its answer to "stand down" tells, which may be from its ledger alone: the
    guest may have ended there since.
    """
    for text in record.addresses:
        try:
            owner = await peers.inquire(parse_address(text), record.uuid, record.generation)
        except PeerError:
            continue
        return None if owner.state == "reviving" else owner.state in ("running", "primary")
    return None
