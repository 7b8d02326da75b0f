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
import logging
from typing import Any, Final

from kemari.config import parse_address
from kemari.errors import KemariError
from kemari.host import Host
from kemari.inquiry import peer_runs
from kemari.ledger import Record, Role
from kemari.peers import Peers

log = logging.getLogger(__name__)

#: The generation that the standby has not promised to leave alone.
OWED: Final = "unpromised"
#: Seconds between two questions.
PACE: Final = 5.0


def owing(options: dict[str, Any], generation: int, promised: bool) -> dict[str, Any]:
    """The options of a record after output was let go, with or without the standby's promise."""
    rest = {key: value for key, value in options.items() if key != OWED}
    return rest if promised else rest | {OWED: generation}


def _paid(generation: int, meant: Record | None, known: Record) -> dict[str, Any]:
    """What changes in the record, whatever was written meanwhile, once that promise is there."""
    changes = _late(meant, known) if meant else {}
    options = changes.get("options", known.options)
    if options.get(OWED) != generation:
        return {}
    return changes | {"options": owing(options, generation, promised=True)}


def _late(meant: Record, known: Record) -> dict[str, Any]:
    """What changes in the record of a protection whose end could not be recorded."""
    if known.role is not Role.PRIMARY or known.generation != meant.generation:
        return {}
    # Whether it is to be protected again may have been said since.
    options = meant.options | {"resume": known.options.get("resume", False)}
    return {"role": meant.role, "reason": meant.reason, "options": options}


class Stragglers:
    """Asks all of them, each in a task of its own."""

    def __init__(self, host: Host, peers: Peers) -> None:
        self._host = host
        self._peers = peers
        self._asking: set[str] = set()
        self._unrecorded: dict[str, Record] = {}

    def look(self, uuid: str, unrecorded: Record | None = None) -> None:
        """Begin to ask about a guest if its record says that a promise is owed.

        :param unrecorded: what the record should be; a full disk does not make a standby forget
            its copy, so it is asked all the same, and the record is written once it can be
        """
        if unrecorded is not None:
            self._unrecorded[uuid] = unrecorded
        record = self._owed(uuid)
        if record is not None and uuid not in self._asking:
            self._asking.add(uuid)
            self._host.spawn(self._ask(uuid), f"{record.guest}: straggler")

    def _owed(self, uuid: str) -> Record | None:
        record = self._meant(uuid) or self._host.ledger.get(uuid)
        owed = record is not None and record.role is Role.OWNER and OWED in record.options
        return record if owed else None

    def _meant(self, uuid: str) -> Record | None:
        """What could not be recorded, unless something was since."""
        meant, known = self._unrecorded.get(uuid), self._host.ledger.get(uuid)
        return meant if meant and known and _late(meant, known) else None

    async def _written(self, uuid: str) -> Record | None:
        """See :meth:`_owed`; what could not be recorded is, if that is possible now."""
        meant = self._meant(uuid)
        if meant is None:
            self._unrecorded.pop(uuid, None)
            return self._owed(uuid)
        try:
            await asyncio.to_thread(self._host.ledger.amend, uuid, functools.partial(_late, meant))
        except KemariError as error:
            log.info("%s: %s", meant.guest, error)
        return self._owed(uuid)

    async def _ask(self, uuid: str) -> None:
        host = self._host
        try:
            while (record := await self._written(uuid)) is not None:
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
        meant = self._unrecorded.pop(record.uuid, None)
        try:
            paid = functools.partial(_paid, int(record.options[OWED]), meant)
            await asyncio.to_thread(self._host.ledger.amend, record.uuid, paid)
        except KemariError as error:
            journal.note(guest, "trouble", f"{guest}: {error}; {peer} will be asked again")
