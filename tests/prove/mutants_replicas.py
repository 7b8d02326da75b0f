# SPDX-License-Identifier: Apache-2.0
"""Broken rules of a disk that is replicated: ``docs/disk.md``."""

from __future__ import annotations

from typing import Final

from tests.prove.mutant import Edit, Mutant

_DISKS: Final = "kemari/disks.py"
_REPLICAS: Final = "kemari/replicas.py"
_CYCLE: Final = "kemari/cycle.py"
_REPLICA: Final = "diskbuffer/replica.py"
_DURABLE: Final = "diskbuffer/durable.py"
_BACKING: Final = "diskbuffer/backing.py"
_SERVER: Final = "tests/prove/diskserver.py"
_STANDBY: Final = "kemari/standby.py"
_TAKEOVER: Final = "kemari/takeover.py"


def _mutant(name: str, rule: str, *edits: Edit, tests: tuple[str, ...] = ()) -> Mutant:
    return Mutant(name, rule, edits, tests, disks=True)


REPLICAS: Final[tuple[Mutant, ...]] = (
    # ---- The disk of the epoch that runs ----
    _mutant(
        "disk-applied-before-commit",
        "nothing of an epoch reaches the replica before its COMMIT",
        Edit(_REPLICA, "        if epoch == 0:\n", "        if epoch >= 0:\n"),
    ),
    _mutant(
        "disk-half-an-epoch",
        "what was not committed is dropped when the guest is taken over",
        Edit(
            _REPLICA,
            "        self.discard()\n        await self.settle()\n",
            "        self._seal(last=True)\n        await self.settle()\n",
        ),
    ),
    _mutant(
        "disk-records-out-of-order",
        "records are applied in the order in which they were made",
        Edit(
            _REPLICA,
            "        self._backing.apply(epoch.records)\n",
            "        self._backing.apply(reversed(epoch.records))\n",
        ),
    ),
    _mutant(
        "disk-closed-after-unpause",
        "an epoch ends for the disks while the guest is paused",
        Edit(
            _CYCLE,
            "                self._disks.close_epoch,\n",
            "                lambda: None,\n",
        ),
        Edit(
            _CYCLE,
            "        self._keeper.do(self._keeper.machine.sent_epoch(number))\n",
            "        self._disks.close_epoch()\n"
            "        self._keeper.do(self._keeper.machine.sent_epoch(number))\n",
        ),
    ),
    _mutant(
        "disk-ack-without-writes",
        "an epoch is acknowledged when the standby has its changes of the disks",
        Edit(
            _CYCLE,
            "            async with aclosing(self._disks.read(pending)) as writes:\n",
            "            async with aclosing(self._disks.read(pending)) as late:\n"
            "                writes = self._disks.read([])\n"
            "                [each async for each in late]\n",
        ),
    ),
    _mutant(
        "disk-of-another-epoch-taken",
        "records of an epoch that is not due are refused",
        Edit(
            "checkpoint/incoming.py",
            "        if frame.epoch != self.number:\n",
            "        if frame.epoch < self.number:\n",
        ),
        tests=("tests/unit/test_session_writes.py",),
    ),
    # ---- The takeover ----
    _mutant(
        "disk-not-flushed-before-the-guest-runs",
        "the replica is on stable storage before the guest runs, and before APPLIED",
        Edit(_REPLICA, "            self._backing.flush()\n", "            self._backing.size\n"),
    ),
    _mutant(
        "disk-taken-over-after-the-guest",
        "the replicas are the guest's disks before it runs",
        Edit(
            _TAKEOVER,
            "        await self._disks.take_over(committed.epoch, legacy.generation)\n",
            "",
        ),
        Edit(
            _TAKEOVER,
            "(self._shell.revive, committed.state, elapsed, deliver)\n",
            "(self._shell.revive, committed.state, elapsed, deliver)\n"
            "        await self._disks.take_over(committed.epoch, legacy.generation)\n",
        ),
    ),
    _mutant(
        "disk-not-activated",
        "a server takes changes once its copy is the guest's disk",
        Edit(
            _REPLICAS,
            "            await self._servers.activate()\n",
            "            self._servers.require()\n",
        ),
    ),
    _mutant(
        "disk-error-told-to-the-cleaner",
        "the flush before marks are cleared leaves a failure for the guest's own flush to tell",
        Edit(
            _SERVER,
            "        if self._flush(self._cleaner) and not self._sync_failed:\n",
            "        if self._flush(self._opened) and not self._sync_failed:\n",
        ),
    ),
    _mutant(
        "disk-marks-cleared-after-a-failure",
        "no mark is cleared any more once something could not be brought to the disk",
        Edit(
            _SERVER,
            "        if self._flush(self._cleaner) and not self._sync_failed:\n",
            "        if self._flush(self._cleaner) or self._sync_failed:\n",
        ),
    ),
    _mutant(
        "disk-left-to-an-ended-session",
        "a session begins when nothing of the last one can reach the replica any more",
        Edit(
            _STANDBY,
            '        await self._attempt("close the disks", self._disks.close())\n',
            "",
        ),
    ),
    _mutant(
        "disk-served-as-no-replica",
        "a protection does not begin with a server that would mark nothing after a takeover",
        Edit(
            "kemari/diskservers.py",
            "            if not flags & Flag.REPLICA or bool(flags & Flag.SHARED) != shared:\n",
            "            if bool(flags & Flag.SHARED) != shared:\n",
        ),
        tests=("tests/unit/test_kemari_disks.py",),
    ),
    _mutant(
        "disk-bitmap-believed-unkept",
        "a bitmap is believed only if the server has marked what changed",
        Edit(
            "diskbuffer/disk.py",
            "            if self._bitmap is not None and not flags & Flag.TRACKING:\n",
            "            if self._bitmap is not None and flags < 0:\n",
        ),
        tests=("tests/unit/test_kemari_disks.py",),
    ),
    _mutant(
        "disk-taken-over-without-bitmap",
        "an empty bitmap is on disk before the guest runs",
        Edit(_REPLICA, '        fresh.save(self._state / "bitmap")\n', "        fresh.count()\n"),
    ),
    _mutant(
        "disk-fit-while-syncing",
        "a replica that is being brought up to date is not fit to run",
        Edit(
            _REPLICA,
            "            Role.REPLICA, Fitness.SYNCING, size,",
            "            Role.REPLICA, Fitness.CONSISTENT, size,",
        ),
    ),
    _mutant(
        "disk-flush-ignored",
        "a flush of the guest is a flush of the replica",
        Edit(
            _BACKING,
            "                    case Kind.FLUSH:\n                        self._flush()\n",
            "                    case Kind.FLUSH:\n                        continue\n",
        ),
    ),
    # ---- What may differ is marked ----
    _mutant(
        "marks-of-the-other-host-skipped",
        "what either host knows to differ is copied when they are joined again",
        Edit(
            _DISKS,
            "differing=None if full else zip(runs[::2], runs[1::2], strict=True),",
            "differing=None if full else (),",
        ),
    ),
    _mutant(
        "marks-forgotten-before-epoch-1",
        "the standby keeps its old bitmap until epoch 1 is committed",
        Edit(
            _REPLICA,
            "        if self.known.full:\n            # Marks",
            "        if self.known:\n            # Marks",
        ),
    ),
    _mutant(
        "marks-cleared-when-sent",
        "the server is told what is on the standby's disk, not what was sent to it",
        Edit(
            _DISKS,
            "                position = stream.applied\n",
            "                position = stream.buffer.taken\n",
        ),
    ),
    _mutant(
        "mark-after-write",
        "a bit is durable before the change touches the target (the server's twin)",
        Edit(
            _SERVER,
            "        self._append(record)\n        return True\n",
            "        if self._marks is not None:\n"
            "            self._marks.mark(record.offset, record.extent)\n"
            "        self._append(record)\n        return True\n",
        ),
        Edit(
            _SERVER,
            "            self._marks.mark(record.offset, record.extent)\n"
            '            self.page.put("dirty", len(self._marks.bits))\n',
            '            self.page.put("dirty", len(self._marks.bits))\n',
        ),
    ),
    _mutant(
        "mark-not-flushed",
        "a bit is on stable storage before the change touches the target (the server's twin)",
        Edit(
            _SERVER,
            "        self._write()\n        self._files.sync(self._descriptor)\n",
            "        self._write()\n",
        ),
    ),
    _mutant(
        "mark-cleared-without-flush",
        "a bit is cleared after a flush on this host (the server's twin)",
        Edit(
            _SERVER,
            "        if self._flush(self._cleaner) and not self._sync_failed:\n",
            "        if not self._sync_failed:\n",
        ),
    ),
    _mutant(
        "mark-cleared-without-applied",
        "a bit is cleared after APPLIED (the server's twin)",
        Edit(_SERVER, "        if self._applied < position or ", "        if position < 0 or "),
    ),
    _mutant(
        "mark-cleared-though-touched",
        "a bit is not cleared of a chunk that was changed meanwhile (the server's twin)",
        Edit(
            _SERVER,
            "        kept = self.bits & (self.touched | self.todo)\n",
            "        kept = self.bits & self.todo\n",
        ),
    ),
    _mutant(
        "record-renamed-not-synced",
        "a record is on stable storage under its name",
        Edit(
            _DURABLE,
            '    reached("renamed")\n    sync_folder(path.parent)\n',
            '    reached("renamed")\n',
        ),
    ),
)
