# SPDX-License-Identifier: Apache-2.0
"""Who owns a guest: one durable record per guest and host, and the rules that read it.

Each protection has a *generation*.  ``start`` takes the generation after the highest that either
host knows; a takeover takes the next one.  The record is on disk before the act that it allows: a
primary's before its first checkpoint, a standby's claim before the guest runs there.  So a host
that comes back from a power cut finds in its own ledger what it must not run without asking.

Records are replaced atomically and durably (:mod:`diskbuffer.durable`).  Any thread may read and
change them.
"""

from __future__ import annotations

import enum
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from checkpoint.faultpoints import reach
from diskbuffer import durable
from kemari.errors import KemariError

#: A record is small; a bigger file is not one.
MAX_RECORD = 64 << 10

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")


class LedgerError(KemariError):
    """A record cannot be read or written; what it says about ownership is unknown."""

    code = "ledger"


class Role(enum.StrEnum):
    """What this host is to the guest, as far as its disk knows."""

    #: runs the guest, and a standby may hold copies of it
    PRIMARY = "primary"
    #: holds copies of the guest for the peer
    STANDBY = "standby"
    #: claimed the guest and began to revive it
    CLAIMED = "claimed"
    #: runs the guest alone: it took over, or protection ended here
    OWNER = "owner"
    #: the peer owns the guest: a copy here must never run
    MOVED = "moved"
    #: holds nothing, promised never to take over this generation
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class Record:
    """What one host knows about the ownership of one guest.

    :ivar uuid: the guest's UUID, canonical lower-case text
    :ivar guest: the guest's name
    :ivar role: see :class:`Role`
    :ivar generation: the protection that this record is about; never decreases
    :ivar peer: name of the other host
    :ivar addresses: addresses of the other host, ``host:port``
    :ivar options: options of ``kemari start``, to resume with
    :ivar came_from: host that ran the guest before, after a takeover or planned failover
    :ivar reason: the sentence that explains the last change
    :ivar changed: wall-clock time of the last change, seconds since 1970 (for people only)
    """

    uuid: str
    guest: str
    role: Role
    generation: int
    peer: str = ""
    addresses: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    came_from: str = ""
    reason: str = ""
    changed: float = 0.0


class Duty(enum.Enum):
    """What a daemon has to do about a record that it finds when it starts."""

    #: nothing: the record only remembers
    NONE = enum.auto()
    #: ask the peer to stand down; output stays held until the answer
    ASK = enum.auto()
    #: remove the remains of a shell and never take over that generation
    STAND_DOWN = enum.auto()
    #: find out whether the revival was finished; if not, undo it
    LOOK = enum.auto()
    #: destroy a copy of the guest if one is here: the peer owns it
    GIVE_UP = enum.auto()


def duty_at_start(record: Record) -> Duty:
    """The rule for a restarted daemon.  Pure.

    A primary never goes on by itself: its standby may have taken over meanwhile.  A standby whose
    daemon died holds nothing complete any more (the staged epoch and the machine state were in its
    memory), so it stands down for good.
    """
    match record.role:
        case Role.PRIMARY:
            return Duty.ASK
        case Role.STANDBY:
            return Duty.STAND_DOWN
        case Role.CLAIMED:
            return Duty.LOOK
        case Role.MOVED:
            return Duty.GIVE_UP
        case Role.OWNER | Role.RELEASED:
            return Duty.NONE


def answer_to_stand_down(record: Record | None, generation: int) -> tuple[bool, int]:
    """The answer of a host without a live standby to "stand down for ``generation``".  Pure.

    :return: (whether this host runs the guest, the generation since which it does)
    """
    owns = record is not None and record.role in (Role.OWNER, Role.PRIMARY, Role.CLAIMED)
    if owns and record is not None and record.generation > generation:
        return True, record.generation
    return False, generation


# ---- On disk --------------------------------------------------------------------------------


class Ledger:
    """The records of one host.

    All methods block for the time of an fsync.

    :param folder: one ``UUID.json`` per guest; made on the first write
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._records: dict[str, Record] = {}
        # Held while a record is written: by several threads, and each must see what the others put.
        self._lock = threading.RLock()
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            record = _read(path)
            self._records[record.uuid] = record

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._records.values()))

    def get(self, uuid: str) -> Record | None:
        """The record of a guest, or None."""
        return self._records.get(uuid)

    def by_name(self, guest: str) -> Record | None:
        """The most recently changed record of a guest of that name, or None."""
        found = [record for record in self._records.values() if record.guest == guest]
        return max(found, key=lambda record: record.changed, default=None)

    def generation(self, uuid: str) -> int:
        """The highest generation known here; 0 for an unknown guest."""
        record = self._records.get(uuid)
        return record.generation if record else 0

    def put(self, record: Record) -> Record:
        """Make ``record`` the durable truth about its guest; on return it is on disk.

        :raise LedgerError: it could not be written, or would go back in generations; the old
            record stands
        """
        if not _UUID.match(record.uuid):
            raise LedgerError(f"{record.uuid!r} is not a UUID in lower-case canonical form")
        with self._lock:
            known = self.generation(record.uuid)
            if record.generation < known:
                raise LedgerError(
                    f"generation {record.generation} of {record.guest} is over; {known} is known "
                    "here"
                )
            record = replace(record, changed=time.time())
            try:
                _write(self._folder / f"{record.uuid}.json", record)
            except OSError as error:
                raise LedgerError(
                    f"the ownership record of {record.guest} cannot be written: {error.strerror}"
                ) from error
            self._records[record.uuid] = record
            return record

    def forget(self, uuid: str) -> None:
        """Remove the record of a guest, durably (idempotent).

        :raise LedgerError: it could not be removed
        """
        with self._lock:
            try:
                durable.remove(self._folder / f"{uuid}.json")
            except OSError as error:
                raise LedgerError(
                    f"the ownership record {uuid} cannot be removed: {error.strerror}"
                ) from error
            self._records.pop(uuid, None)

    def update(self, uuid: str, **changes: Any) -> Record:
        """Replace fields of an existing record; as :meth:`put`."""
        with self._lock:
            return self.put(replace(self._records[uuid], **changes))

    def amend(self, uuid: str, changes: Callable[[Record], dict[str, Any]]) -> None:
        """As :meth:`update`, with what follows from the record as it is then; {} leaves it so."""
        with self._lock:
            record = self._records.get(uuid)
            if record is not None and (changed := changes(record)):
                self.put(replace(record, **changed))


def _read(path: Path) -> Record:
    try:
        if path.stat().st_size > MAX_RECORD:
            raise LedgerError(f"{path} is too big for an ownership record")
        untrusted = json.loads(path.read_text())
        known = {each.name for each in fields(Record)}
        values = {key: value for key, value in untrusted.items() if key in known}
        record = Record(
            **values
            | {
                "role": Role(values["role"]),
                "generation": int(values["generation"]),
                "addresses": tuple(str(each) for each in values.get("addresses", ())),
            }
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LedgerError(f"{path} is not an ownership record: {error}") from error
    if record.uuid != path.stem:
        raise LedgerError(f"{path} is the record of another guest, {record.uuid}")
    return record


def _write(path: Path, record: Record) -> None:
    text = json.dumps(asdict(record), indent=1, sort_keys=True) + "\n"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    durable.replace(path, [text.encode()], lambda step: reach(f"ledger-{step}"))
