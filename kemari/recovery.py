# SPDX-License-Identifier: Apache-2.0
"""What a restarted daemon does about guests that were protected when the last one died.

The kernel has kept their output held.  Nothing is let go, and nothing is destroyed, before the peer
has said which copy is the guest.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from checkpoint.errors import CheckpointError
from checkpoint.faultpoints import reach
from kemari.config import parse_address
from kemari.endings import RESTART_PATIENCE, Asking, patience
from kemari.host import Host
from kemari.inquiry import peer_runs
from kemari.ledger import Duty, LedgerError, Record, Role, duty_at_start
from kemari.ownership import HANDED
from kemari.peers import Answer, Peers
from kemari.shared import RECORDED, settle
from kemari.stragglers import owing

log = logging.getLogger(__name__)

#: Seconds between questions to a peer that does not answer, when nothing waits for the answer.
PATIENT_PACE = 5.0


class Recovery:
    """One guest whose ownership is unknown until the peer has answered.

    :ivar record: what the ledger says
    :ivar resolved: the record after the answer; None until then
    :ivar unrecorded: what it should be and is not, because the ledger could not be written
    """

    def __init__(self, host: Host, peers: Peers, record: Record) -> None:
        self.record = record
        self.resolved: Record | None = None
        self.unrecorded: Record | None = None
        self._host = host
        self._peers = peers
        self._addresses = tuple(parse_address(text) for text in record.addresses)

    def status(self) -> dict[str, Any]:
        """What ``kemari status`` shows meanwhile."""
        record = self.record
        return {
            "guest": record.guest,
            "uuid": record.uuid,
            "role": "primary" if record.role is Role.PRIMARY else "moved",
            "state": "asking",
            "protected": False,
            "peer": record.peer,
            "generation": record.generation,
            "since": round(record.changed, 3),
            "why": f"kemarid was restarted; {record.peer} has not yet said who owns the guest",
        }

    async def resolve(self) -> Record:
        """Ask until it is certain, or until the policy decides; then act.

        :return: the new record: role OWNER (the guest is this host's) or MOVED
        """
        record, host = self.record, self._host
        here = await copy_here(host, record)
        self._note(
            "restarted",
            f"kemarid was restarted; {record.peer} is asked who owns {record.guest}"
            + (", its output stays held until then" if here and await self._held() else ""),
        )
        reach("recover-ask")
        if record.role is Role.MOVED:
            # Whatever the peer says now: what was protected here is old since it took over.
            return await self._give_up(record.generation)
        answer = await self._ask(here)
        if answer.runs_since:
            return await self._give_up(answer.runs_since)
        return await self._keep(here, answer.stood_down)

    async def _ask(self, here: bool) -> Answer:
        host, record = self._host, self.record
        heartbeat = host.config.heartbeat
        asking, said = Asking(heartbeat), False
        while True:
            answer = await asking.wait(
                self._peers.ask_to_stand_down(
                    str(record.options.get("peer_id", "")),
                    self._addresses,
                    record.uuid,
                    record.generation,
                    heartbeat,
                )
            )
            if answer.conclusive:
                return answer
            waited = asking.waited
            may_release = (
                here
                and host.config.on_standby_loss == "release"
                and not record.options.get(RECORDED)
                and not record.options.get(HANDED)
                and waited >= patience(answer, heartbeat)
            )
            if may_release:
                return answer
            said = await self._ask_on(waited, said)

    async def _ask_on(self, waited: float, said: bool) -> bool:
        """Wait before the next question; whether it was said, once, that there is no answer."""
        late = waited >= RESTART_PATIENCE
        if late and not said:
            self._note("holding", f"{self.record.peer} gives no answer; it will be asked on")
        await asyncio.sleep(PATIENT_PACE if late else self._host.config.heartbeat / 4)
        return late or said

    async def _keep(self, here: bool, promised: bool) -> Record:
        record = self.record
        why = (
            f"{record.peer} stood down"
            if promised
            else f"{record.peer} gives no answer and on_standby_loss is release"
        )
        reach("recover-keep")
        await _settle_disks(self._host, self.record, mine=True)
        if here:
            await let_run(self._host, self.record.guest)
        await self._reclaim(release=True)
        reach("recover-released")
        what = "runs on here UNPROTECTED" if here else "runs on neither host"
        self._note("unprotected", f"{record.guest} {what} ({why})")
        return await self._put(
            lambda known: {
                "role": Role.OWNER,
                "generation": record.generation,
                "reason": why,
                "options": owing(known.options, record.generation, promised),
            }
        )

    async def _give_up(self, generation: int) -> Record:
        """The peer has taken over: destroy the copy here, if it may be.

        The one that was protected is old, and nobody may see what it did since.  One that was
        started since, by an administrator or at the host's start, may be all that there is of the
        guest.
        """
        record, host = self.record, self._host
        why = f"{record.peer} runs it since generation {generation}"
        reach("recover-give-up")
        resolved = await self._put(
            lambda _: {"role": Role.MOVED, "generation": generation, "reason": why}
        )
        here = await copy_here(host, record)
        if here and not await self._is_old() and not await self._runs_there():
            self._note(
                "moved",
                f"{record.guest} does not run on {record.peer} any more: the domain here was "
                "started since, it is left alone and is UNPROTECTED",
            )
            await self._reclaim(release=False)
            return resolved
        await _settle_disks(host, record, mine=False)
        # Asking takes its time: it may have ended meanwhile.
        here = await copy_here(host, record)
        if here:
            try:
                await asyncio.to_thread(host.hypervisor.destroy_domain, record.guest)
            except CheckpointError as error:
                self._note("trouble", f"the stale copy of {record.guest} is still there: {error}")
        reach("recover-destroyed")
        await self._reclaim(release=False)
        self._note(
            "moved",
            f"{record.guest}: {why}; "
            + ("the stale copy here was destroyed" if here else "no copy runs here"),
            generation=generation,
        )
        return resolved

    async def _is_old(self) -> bool:
        """Whether the domain here is the very one that was protected, and none started since."""
        hypervisor, was = self._host.hypervisor, self.record.options.get("incarnation")
        return bool(was) and was == await asyncio.to_thread(
            hypervisor.incarnation, self.record.guest
        )

    async def _held(self) -> bool:
        """Whether output of the guest that was protected is still held here."""
        left = await asyncio.to_thread(self._host.network.leftovers)
        return not self._devices().isdisjoint(left)

    def _devices(self) -> set[str]:
        """Those of the guest that was protected, unless another one has them now."""
        others = {
            str(device)
            for record in self._host.ledger
            if record.role is Role.PRIMARY and record.uuid != self.record.uuid
            for device in record.options.get("devices", ())
        }
        return set(map(str, self.record.options.get("devices", ()))) - others

    async def _runs_there(self) -> bool:
        """Whether the peer runs the guest now; asked until it has answered."""
        loop, said = asyncio.get_running_loop(), False
        since = loop.time()
        while (runs := await peer_runs(self._peers, self.record)) is None:
            said = await self._ask_on(loop.time() - since, said)
        return runs

    async def _reclaim(self, *, release: bool) -> None:
        for device in sorted(self._devices()):
            await reclaim(self._host, self.record.guest, device, release=release)

    async def _put(self, changes: Callable[[Record], dict[str, Any]]) -> Record:
        ledger, uuid = self._host.ledger, self.record.uuid
        try:
            await asyncio.to_thread(ledger.amend, uuid, changes)
        except LedgerError as error:
            self._note("trouble", f"{self.record.guest}: {error}; it will be asked for again")
            self.resolved = ledger.get(uuid) or self.record
            self.unrecorded = replace(self.resolved, **changes(self.resolved))
        else:
            self.resolved = ledger.get(uuid) or self.record
        return self.resolved

    def _note(self, event: str, text: str, **figures: Any) -> None:
        self._host.journal.note(self.record.guest, event, text, **figures)


async def _settle_disks(host: Host, record: Record, *, mine: bool, guest: str = "") -> None:
    """See :func:`kemari.shared.settle`; failures are told."""
    for failure in await settle(host, record.options, mine=mine, guest=guest):
        host.journal.note(record.guest, "trouble", f"{record.guest}: {failure}")


async def copy_here(host: Host, record: Record) -> bool:
    """Whether a domain of the guest's name lives here, unless the ledger knows it as another guest.

    A guest whose configuration has no UUID gets a new one each time that it is started.
    """
    uuid = await asyncio.to_thread(host.hypervisor.domain_uuid, record.guest)
    known = uuid != record.uuid and host.ledger.get(uuid) is not None
    return bool(uuid) and not known


async def took_over_unrecorded(host: Host, record: Record) -> bool:
    """Whether this host runs a guest that by its ledger it only stands by for.

    The ledger's disk was full when it took over, which must not cost the guest.
    """
    return record.role is Role.STANDBY and await host.runs(record)


def _unrecorded(record: Record) -> dict[str, Any]:
    """What changes in the record of a guest that was found running here."""
    if record.role not in (Role.STANDBY, Role.CLAIMED):
        return {}
    return {
        "role": Role.OWNER,
        "generation": record.generation + (record.role is Role.STANDBY),
        "came_from": record.peer,
        "reason": "found running after an unrecorded takeover",
    }


async def remember_takeover(host: Host, uuid: str) -> None:
    """See to it that a takeover is in the ledger, now that the guest runs here.

    Where its disk is full it is tried on; until then the guest itself is what tells of it.
    """
    ledger = host.ledger
    while (record := ledger.get(uuid)) is not None:
        if not _unrecorded(record) or not await host.runs(record):
            return
        try:
            await asyncio.to_thread(ledger.amend, uuid, _unrecorded)
        except LedgerError as error:
            log.info("%s: %s", record.guest, error)
            await asyncio.sleep(PATIENT_PACE)


async def let_run(host: Host, guest: str) -> None:
    """A daemon that was killed in a capture, or at a revival's end, has left the guest paused."""
    try:
        await asyncio.to_thread(host.hypervisor.recover, guest)
    except CheckpointError as error:
        host.journal.note(guest, "trouble", f"{guest} could not be looked at: {error}")


async def settle_name(host: Host, record: Record) -> None:
    """A daemon that was killed right after a takeover has left the guest with its shell's name."""
    if not await host.runs(record):
        return
    try:
        renamed = await asyncio.to_thread(host.hypervisor.settle, record.guest)
    except CheckpointError as error:
        host.journal.note(record.guest, "trouble", f"could not name {record.guest}: {error}")
    else:
        if renamed:
            text = f"{record.guest} still had the name of its shell: it has its own now"
            host.journal.note(record.guest, "cleaned", text)


async def reclaim(host: Host, guest: str, device: str, *, release: bool) -> None:
    """Remove an output buffer that was left behind, and say so."""
    try:
        found = await asyncio.to_thread(lambda: host.network.reclaim(device, release=release))
    except Exception as error:
        log.debug("reclaim of %s failed", device, exc_info=error)
        host.journal.note(guest, "trouble", f"held output of {device} is still there: {error}")
    else:
        if found:
            host.journal.note(guest, "cleaned", found)


async def clean(host: Host) -> list[Record]:
    """Remove what a killed daemon left and nobody needs to be asked about.

    :return: records whose guests need a :class:`Recovery`
    """
    asked, keep = [], set()
    for record in host.ledger:
        duty = duty_at_start(record)
        # What was revived here has the guest's own UUID.
        here = duty in (Duty.STAND_DOWN, Duty.LOOK) and await host.runs(record)
        if here:
            # Before it is said to run: it is marked as revived just before it is let run.
            await let_run(host, record.guest)
        if duty is Duty.LOOK and here:
            await _put(host, record, role=Role.OWNER, reason="the takeover was complete")
        elif duty is Duty.STAND_DOWN and here:
            await _put(host, record, **_unrecorded(record))
        elif duty in (Duty.STAND_DOWN, Duty.LOOK):
            await _stand_down(host, record)
        elif record.role is Role.RELEASED:
            await _remove_shell(host, record)  # the last daemon died between promise and deed
        elif duty is Duty.ASK or (duty is Duty.GIVE_UP and await copy_here(host, record)):
            asked.append(record)
            keep |= set(record.options.get("devices", ()))
    # Before any output: the last daemon died while it let go, or the storage failed it.
    for record in host.ledger:
        if record.role in (Role.OWNER, Role.RELEASED):
            await _settle_disks(host, record, mine=True, guest=record.uuid)
        if record.role in (Role.OWNER, Role.PRIMARY):
            await settle_name(host, record)
    owners = {
        device: record for record in host.ledger for device in record.options.get("devices", ())
    }
    for device in await asyncio.to_thread(host.network.leftovers):
        if device not in keep:
            owner = owners.get(device)
            if owner is not None and owner.role is Role.OWNER:
                await let_run(host, owner.guest)  # the last daemon died while it let go
            gone = owner is not None and owner.role is Role.MOVED
            await reclaim(host, owner.guest if owner else "", device, release=not gone)
    return asked


async def _stand_down(host: Host, record: Record) -> None:
    """The epochs held here died with the last daemon: remove what is left of the shell."""
    reach("recover-stand-down")
    found = await _remove_shell(host, record)
    if found is None:
        return
    reach("recover-stood-down")
    await _put(host, record, role=Role.RELEASED, reason="kemarid was restarted")
    host.journal.note(
        record.guest,
        "stood-down",
        f"kemarid was restarted: no longer stands by for {record.guest}"
        + ("; its shell was removed" if found else ""),
    )


async def _remove_shell(host: Host, record: Record) -> bool | None:
    """Whether there was one; None if it is still there."""
    try:
        return await asyncio.to_thread(host.hypervisor.destroy_shell, record.guest)
    except CheckpointError as error:
        host.journal.note(
            record.guest, "trouble", f"a shell of {record.guest} is still there: {error}"
        )
        return None


async def _put(host: Host, record: Record, **changes: Any) -> None:
    try:
        await asyncio.to_thread(functools.partial(host.ledger.update, record.uuid, **changes))
    except LedgerError as error:
        host.journal.note(record.guest, "trouble", f"{record.guest}: {error}")
