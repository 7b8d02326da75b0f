# SPDX-License-Identifier: Apache-2.0
"""Standbys that owe a promise: the guest went on without their having stood down.

By its policy, or by an administrator's force, a primary lets output go although its standby gave
no answer.  If that standby was not dead but stood still, it wakes with a copy that grows old, and
would run it when this host dies: what the guest has said since would be forgotten.  So it is asked
on, for as long as it takes.  What is owed is in the ledger, :data:`OWED` in the record's options.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any, Final

from kemari.config import parse_address
from kemari.errors import KemariError
from kemari.host import Host
from kemari.inquiry import peer_runs
from kemari.ledger import Record, Role
from kemari.peers import Peers

#: The generation that the standby has not promised to leave alone.
OWED: Final = "unpromised"
#: Seconds between two questions.
PACE: Final = 5.0


def owing(options: dict[str, Any], generation: int, promised: bool) -> dict[str, Any]:
    """The options of a record after output was let go, with or without the standby's promise."""
    rest = {key: value for key, value in options.items() if key != OWED}
    return rest if promised else rest | {OWED: generation}


def _paid(generation: int, record: Record) -> dict[str, Any]:
    """What changes in the record, whatever was written meanwhile, once that promise is there."""
    if record.options.get(OWED) != generation:
        return {}
    return {"options": owing(record.options, generation, promised=True)}


class Stragglers:
    """Asks all of them, each in a task of its own."""

    def __init__(self, host: Host, peers: Peers) -> None:
        self._host = host
        self._peers = peers
        self._asking: set[str] = set()

    def look(self, uuid: str) -> None:
        """Begin to ask about a guest if its record says that a promise is owed."""
        record = self._owed(uuid)
        if record is not None and uuid not in self._asking:
            self._asking.add(uuid)
            self._host.spawn(self._ask(uuid), f"{record.guest}: straggler")

    def _owed(self, uuid: str) -> Record | None:
        record = self._host.ledger.get(uuid)
        owed = record is not None and record.role is Role.OWNER and OWED in record.options
        return record if owed else None

    async def _ask(self, uuid: str) -> None:
        host = self._host
        try:
            while (record := self._owed(uuid)) is not None:
                answer = await self._peers.ask_to_stand_down(
                    str(record.options.get("peer_id", "")),
                    tuple(parse_address(text) for text in record.addresses),
                    uuid,
                    int(record.options[OWED]),
                    host.config.heartbeat,
                )
                # A later generation may be one in which it stands by for this host again.
                runs = await peer_runs(self._peers, record) if answer.runs_since else False
                if answer.conclusive and runs is not None and self._owed(uuid) == record:
                    await self._settled(record, answer.runs_since if runs else 0)
                    return
                await asyncio.sleep(PACE)
        finally:
            self._asking.discard(uuid)

    async def _settled(self, record: Record, runs_since: int) -> None:
        """The promise is owed no more.

        :param runs_since: the generation since which the peer runs the guest; 0 if it does not
        """
        journal, guest, peer = self._host.journal, record.guest, record.peer
        if runs_since:
            journal.note(
                guest,
                "two-owners",
                f"{peer} runs {guest} as well, since generation {runs_since}, and both copies can "
                "be seen: destroy one of them",
            )
        else:
            journal.note(guest, "stood-down", f"{peer} has stood down for {guest} at last")
        try:
            paid = functools.partial(_paid, int(record.options[OWED]))
            await asyncio.to_thread(self._host.ledger.amend, record.uuid, paid)
        except KemariError as error:
            journal.note(guest, "trouble", f"{guest}: {error}; {peer} will be asked again")
