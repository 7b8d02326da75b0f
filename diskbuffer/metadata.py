# SPDX-License-Identifier: Apache-2.0
"""What a host durably knows of its copy of a disk: ``state.json`` of ``docs/disk.md``."""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from diskbuffer import durable
from diskbuffer.errors import MetadataError

VERSION = 1


class Role(Enum):
    """What a host's copy is; the hotplug script looks for the words."""

    #: The guest's disk, or nobody's: it may be written.
    DISK = "disk"
    #: A copy of another host's disk: only :class:`diskbuffer.replica.Replica` writes it.
    REPLICA = "replica"
    #: A shared disk whose guest is protected, or has moved: no server may begin to serve it.
    HELD = "held"


class Fitness(Enum):
    """Whether a guest could run from a replica."""

    SYNCING = "syncing"
    CONSISTENT = "consistent"


@dataclass(frozen=True, slots=True)
class Metadata:
    """See ``docs/disk.md``.

    :ivar size: of the disk, bytes
    :ivar pair: UUID of the pair of copies, "" for none
    :ivar peer: UUID of the other host, "" for none
    :ivar epoch: the last one known to be applied; may be behind
    :ivar guest: UUID of the guest whose disk it is, "" if that is not known
    :ivar shared: the target is the peer's as well
    """

    role: Role
    state: Fitness
    size: int
    pair: str = ""
    peer: str = ""
    generation: int = 0
    epoch: int = 0
    guest: str = ""
    shared: bool = False

    def save(self, path: Path) -> None:
        """Replace the file, durably.

        :raise MetadataError: it cannot be written; the old one is as it was
        """
        values = asdict(self) | {
            "version": VERSION,
            "role": self.role.value,
            "state": self.state.value,
        }
        try:
            durable.replace(path, [json.dumps(values, indent=1).encode() + b"\n"])
        except OSError as error:
            raise MetadataError(f"{path} cannot be written: {error.strerror}") from error


def load(path: Path) -> Metadata | None:
    """What the file says; None when there is none.

    :raise MetadataError: it cannot be read, or says nothing that makes sense
    """
    try:
        untrusted_values = json.loads(path.read_text())
        if untrusted_values.pop("version") != VERSION:
            raise ValueError("another version")
        return Metadata(
            role=Role(untrusted_values["role"]),
            state=Fitness(untrusted_values["state"]),
            size=_number(untrusted_values["size"]),
            pair=_name(untrusted_values["pair"]),
            peer=_name(untrusted_values["peer"]),
            generation=_number(untrusted_values["generation"]),
            epoch=_number(untrusted_values["epoch"]),
            guest=_name(untrusted_values.get("guest", "")),
            shared=untrusted_values.get("shared") is True,
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MetadataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise MetadataError(
            f"{path} is damaged ({error}); expected what kemari wrote there"
        ) from None


def _number(untrusted_value: Any) -> int:
    if not isinstance(untrusted_value, int) or untrusted_value < 0:
        raise ValueError(f"{untrusted_value!r} is no number")
    return untrusted_value


def _name(untrusted_value: Any) -> str:
    return str(uuid.UUID(untrusted_value)) if untrusted_value else ""


def of_guest(base: Path, guest: str) -> list[Path]:
    """Durable folders of a guest's disks; those that make no sense are nobody's.

    :param base: as for :func:`state_folder`
    :param guest: UUID
    """
    found = []
    for folder in sorted(base.glob("*")):
        try:
            known = load(folder / "state.json")
        except MetadataError:
            continue
        if known is not None and known.guest == guest:
            found.append(folder)
    return found


def forget(folder: Path) -> None:
    """Remove what is known of a disk, durably: its target is nobody's from then on (idempotent).

    :raise MetadataError: something is still there
    """
    try:
        for name in ("bitmap", "state.json"):
            durable.remove(folder / name)
    except OSError as error:
        raise MetadataError(f"{folder} cannot be removed: {error.strerror}") from error


def state_folder(target: Path, base: Path) -> Path:
    """The durable folder of a target, as the hotplug script names it.

    :param base: the folder of all of them, e.g. ``/var/lib/kemari/disks``
    """
    path = str(target.resolve())
    return base / hashlib.sha256(path.encode()).hexdigest()[:16]
