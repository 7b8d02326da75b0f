# SPDX-License-Identifier: Apache-2.0
"""Both ends of a protected guest's replication session (``docs/protocol.md``).

:class:`Sender` is the primary's end, :class:`Receiver` the standby's.  They keep the protocol and
decide nothing: when to checkpoint, whether a silence is a death, who owns the guest is for those
who hold them.  Each method states the run states that it needs; the first failure of the connection
is what every waiting and later call raises.
"""

from __future__ import annotations

from checkpoint.incoming import ApplyError, Committed
from checkpoint.receiver import Outcome, Receiver, StaleGeneration, Standby
from checkpoint.runstate import Runstate, StateError
from checkpoint.sender import Declined, Sender, Sent

__all__ = [
    "ApplyError",
    "Committed",
    "Declined",
    "Outcome",
    "Receiver",
    "Runstate",
    "Sender",
    "Sent",
    "StaleGeneration",
    "Standby",
    "StateError",
]
