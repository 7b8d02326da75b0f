# SPDX-License-Identifier: Apache-2.0
"""The standby's copies of a guest's disks; :mod:`kemari.disks` is the primary's end."""

from __future__ import annotations

import asyncio
import functools
import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from checkpoint.errors import CheckpointError, ProtocolError, ReviveError
from checkpoint.faultpoints import reach
from checkpoint.fields import Fields
from diskbuffer import bitmap
from diskbuffer.errors import DiskError, RecordError
from diskbuffer.metadata import state_folder
from diskbuffer.replica import Known, Replica
from diskbuffer.shared import SharedReplica
from kemari.config import Paths
from kemari.diskservers import DiskServers
from kemari.errors import Refused
from kemari.targets import target_size

log = logging.getLogger(__name__)

#: Disks that a guest may have here.
MAX_DISKS: Final = 256


class StandbyDisks:
    """All disks of one guest that another host runs.  For the event loop.

    :param locate: where a target is on this host
    :param report: called with (last epoch wholly on disk, number of the disk, batches of it that
        are on disk)
    :ivar sealed: last epoch whose changes are complete here, -1 before the base copy is
    """

    def __init__(
        self,
        paths: Paths,
        locate: Callable[[str], Path],
        report: Callable[[int, int, int], None],
    ) -> None:
        self._paths = paths
        self._locate = locate
        self._report = report
        self._replicas: dict[int, Replica | SharedReplica] = {}
        self._servers = DiskServers(paths.run)
        self.sealed = -1

    async def prepare(
        self, untrusted_offer: Any, peer: str, guest: str, generation: int
    ) -> list[dict[str, Any]]:
        """Make this host's copies replicas; what PREPARED says of them.

        :param untrusted_offer: ``options.disks`` of PREPARE
        :param peer: the primary's UUID
        :param guest: the guest's UUID
        :raise CheckpointError: a target does not fit, with the sentence
        """
        if not isinstance(untrusted_offer, list) or len(untrusted_offer) > MAX_DISKS:
            raise ProtocolError("PREPARE has no proper list of disks")
        answers = []
        for number, untrusted_disk in enumerate(untrusted_offer):
            if not isinstance(untrusted_disk, dict):
                raise ProtocolError("PREPARE has a disk that is no object")
            fields = Fields(f"PREPARE.disks[{number}]", untrusted_disk)
            target, size = fields.text("target"), fields.integer("size", 512)
            if not target.startswith("/") or "\0" in target:
                raise ProtocolError(f"{target!r} is no path of a disk's target")
            shared = untrusted_disk.get("shared") is True
            try:
                if untrusted_disk.get("readonly") is True:
                    await self._compare(self._locate(target), size)
                    known = Known()
                elif shared:
                    await self._shared(number, self._locate(target)).setup(
                        size=size,
                        queue=fields.integer("queue", 1),
                        peer=str(uuid.UUID(peer)),
                        generation=generation,
                        guest=guest,
                    )
                    known = Known()
                else:
                    most_runs = bitmap.MAX_RUNS // len(untrusted_offer)
                    replica = self._replica(number, self._locate(target))
                    known = await replica.setup(
                        size=size,
                        pair=_name(fields, "pair"),
                        new_pair=_new_pair(fields),
                        peer=str(uuid.UUID(peer)),
                        generation=generation,
                        guest=guest,
                        most_runs=most_runs,
                    )
            except (DiskError, Refused) as error:
                raise CheckpointError(str(error)) from error
            answers.append(
                {
                    "pair": known.pair,
                    "state": known.state,
                    "shift": known.shift,
                    "runs": [figure for run in known.runs for figure in run],
                    "full": known.full,
                    "shared": shared,
                }
            )
        return answers

    def _shared(self, number: int, target: Path) -> SharedReplica:
        replica = SharedReplica(target, state_folder(target, self._paths.state / "disks"))
        self._replicas[number] = replica
        return replica

    async def _compare(self, target: Path, size: int) -> None:
        here = await asyncio.to_thread(target_size, target)
        if here != size:
            raise Refused(f"{target} has {here} bytes on this host, expected {size}")

    def _replica(self, number: int, target: Path) -> Replica:
        state = state_folder(target, self._paths.state / "disks")
        replica = Replica(
            target,
            state,
            on_applied=functools.partial(self._applied, number),
            step=lambda step: reach(f"replica-{step}"),
        )
        self._replicas[number] = replica
        return replica

    async def attach(self) -> None:
        """The shell is there: see that its disks are served.

        :raise CheckpointError: one is not
        """
        try:
            await self._servers.attach(
                (replica.target, isinstance(replica, SharedReplica))
                for replica in self._replicas.values()
            )
        except DiskError as error:
            raise CheckpointError(str(error)) from error

    def _applied(self, number: int, epoch: int, batches: int) -> None:
        self._report(epoch, number, batches)

    # ---- Epochs ----

    async def writes(self, epoch: int, number: int, untrusted_records: memoryview) -> None:
        """See :meth:`checkpoint.receiver.Standby.writes`."""
        replica = self._replicas.get(number)
        if replica is None:
            raise ProtocolError(f"records of disk {number} came, which is not replicated")
        try:
            await replica.stage(epoch, untrusted_records)
        except RecordError as error:
            raise ProtocolError(f"WRITES of epoch {epoch}: {error}") from error
        except DiskError as error:
            raise CheckpointError(str(error)) from error

    def issued(self, number: int, position: int) -> None:
        """See :meth:`checkpoint.receiver.Standby.issued`."""
        replica = self._replicas.get(number)
        if not isinstance(replica, SharedReplica):
            raise ProtocolError(f"ISSUED is of disk {number}, which is not shared")
        try:
            replica.issued(position)
        except RecordError as error:
            raise ProtocolError(f"ISSUED of disk {number}: {error}") from error

    def seal(self, epoch: int) -> None:
        """The epoch is complete: its changes will be applied.

        :raise CheckpointError: a disk failed, or could not be run from: the epoch must not be
            acknowledged
        """
        try:
            self._servers.require()
            for replica in self._replicas.values():
                replica.seal(epoch)
        except DiskError as error:
            raise CheckpointError(str(error)) from error
        self.sealed = epoch

    # ---- Ends ----

    async def take_over(self, epoch: int, generation: int) -> None:
        """Make the copies the guest's disks, as they were in ``epoch``.

        :param generation: the one that begins
        :raise ReviveError: they are not of that epoch, or a disk failed
        """
        if not self._replicas:
            return
        if self.sealed != epoch:
            raise ReviveError(f"the disks are of epoch {self.sealed}, expected {epoch}")
        replicas = list(self._replicas.values())
        reach("disks-settle")
        try:
            # All before any: a failure leaves no disk that is a replica no more.
            await asyncio.gather(*(replica.settle() for replica in replicas))
            reach("disks-settled")
            await asyncio.gather(*(replica.take_over(generation) for replica in replicas))
            reach("disks-taken")
            await self._servers.activate()
            reach("disks-activated")
        except DiskError as error:
            raise ReviveError(str(error)) from error

    async def close(self) -> None:
        """Apply what is sealed, drop the rest (idempotent)."""
        await self._servers.close()
        for replica in self._replicas.values():
            await replica.close()


def _name(fields: Fields, key: str) -> str:
    text = fields.text(key)
    try:
        return str(uuid.UUID(text)) if text else ""
    except ValueError:
        raise ProtocolError(f"{fields.where} has no UUID {key!r}") from None


def _new_pair(fields: Fields) -> str:
    name = _name(fields, "new_pair")
    if not name:
        raise ProtocolError("PREPARE has a disk without a name for a new pair")
    return name
