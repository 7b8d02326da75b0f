# SPDX-License-Identifier: Apache-2.0
"""What a primary asks its standby about who owns a guest, and what both write down of that."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any, Final

from checkpoint.driver import Source
from checkpoint.fields import Fields
from kemari.config import COMPRESSIONS, INTERVAL_MS, Address, Options
from kemari.endings import PATIENCE
from kemari.errors import PeerError, Refused
from kemari.host import Host
from kemari.ledger import Record, Role
from kemari.pace import PACES
from kemari.peers import OWNING, Peers
from kemari.shared import RECORDED

#: In the record's options: a handover may have been sent, so the standby may run the guest
#: without a further word, however long it stood still.
HANDED: Final = "handed"


async def next_generation(
    host: Host, peers: Peers, address: Address, host_id: str, name: str, guest: str
) -> int:
    """The generation after all that either host knows of.

    :param host_id: of the standby, ``address`` is one of its
    :param name: of the guest; ``guest`` is its UUID
    :raise Refused: the standby runs the guest, or will not give it up
    :raise PeerError: the standby does not answer
    """
    own = host.ledger.generation(guest)
    answer = await peers.inquire(address, guest, own)
    if answer.state == "standby":
        # What an earlier protection by this host left there: the guest runs here.
        await peers.ask_to_stand_down(
            host_id, (address,), guest, answer.generation, host.config.heartbeat * PATIENCE
        )
        answer = await peers.inquire(address, guest, own)
    if answer.state in (*OWNING, "reviving"):
        raise Refused(
            f"the standby is {answer.state} for {name} in generation {answer.generation}; "
            "expected it to have nothing of that guest"
        )
    return max(own, answer.generation) + 1


def handing_over(record: Record) -> dict[str, Any]:
    """What changes in a primary's record before its guest is handed over.

    A daemon that is started again must not go by its policy after that either.
    """
    return {"options": record.options | {HANDED: True}} if record.role is Role.PRIMARY else {}


def is_wished(record: Record | None) -> bool:
    """Whether a guest that runs here, unprotected, is to be protected."""
    return record is not None and record.role is Role.OWNER and bool(record.options.get("resume"))


async def still_stands_by(
    peers: Peers, addresses: tuple[Address, ...], guest: str, generation: int, heartbeat: float
) -> bool:
    """Whether the standby has surely not taken over by now: it is asked, over any path.

    :param heartbeat: seconds of silence after which it would; an answer that old says nothing
    """
    for address in addresses:
        asked = time.monotonic()
        try:
            owner = await peers.inquire(address, guest, generation)
        except PeerError:
            continue
        fresh = time.monotonic() - asked < heartbeat
        return fresh and (owner.state, owner.generation) == ("standby", generation)
    return False


def offered_options(untrusted: dict[str, Any]) -> Options:
    """The options of ``kemari start`` in what a primary says with PREPARE.

    :raise ProtocolError: they are missing, or not such options
    """
    fields = Fields("PREPARE.options", untrusted)
    return Options(
        interval_ms=fields.integer("interval_ms", *INTERVAL_MS),
        interval_only=fields.flag("interval_only"),
        pace=fields.choice("pace", PACES),
        compression=fields.choice("compression", COMPRESSIONS),
    )


def recorded_options(record: Record) -> Options:
    """Those with which a guest was protected: by a version, perhaps, that did not know each one."""
    known = Options.__dataclass_fields__.keys() & record.options.keys()
    return Options(**{key: record.options[key] for key in known})


def primary_record(
    source: Source,
    generation: int,
    standby: tuple[str, str],
    addresses: tuple[tuple[Address, ...], tuple[Address, ...]],
    options: Options,
    incarnation: str,
    *,
    resume: bool,
) -> Record:
    """What the ledger says of a guest from its first checkpoint on.

    :param standby: name and UUID of its host
    :param addresses: of it: those that were asked for, and those that it has told
    :param incarnation: of the domain that is protected (:mod:`checkpoint.driver`)
    :param resume: whether it is to be protected again when this protection is lost
    """
    (name, host_id), (asked, further) = standby, addresses
    return Record(
        uuid=source.description.uuid,
        guest=source.description.name,
        role=Role.PRIMARY,
        generation=generation,
        peer=name,
        addresses=tuple(str(each) for each in (*asked, *further)),
        options=asdict(options)
        | {
            "peer_id": host_id,
            "incarnation": incarnation,
            "devices": [nic.vif for nic in source.nics],
            "standby": [str(each) for each in asked],
            # From the beginning: a daemon may be killed between any two records of an end.
            "resume": resume,
            RECORDED: [disk.target for disk in source.disks if disk.shared and disk.writable],
        },
        reason="protection started",
    )


def standby_record(
    uuid: str,
    guest: str,
    generation: int,
    primary: tuple[str, str],
    addresses: tuple[Address, ...],
    options: Options,
    *,
    back: bool,
) -> Record:
    """What the ledger of a standby says of a guest.

    :param primary: name and UUID of the host that runs it
    :param addresses: of that host, as it has told them
    :param back: whether, once the guest has come here, it is to be protected to where it came from
    """
    name, host_id = primary
    told = [str(each) for each in addresses]
    return Record(
        uuid=uuid,
        guest=guest,
        role=Role.STANDBY,
        generation=generation,
        peer=name,
        addresses=tuple(told),
        # Whichever way this host comes to run the guest, it finds in its record what to do then.
        options=asdict(options)
        | {"peer_id": host_id, "standby": told, "resume": back and bool(told)},
        reason=f"standby of {name}",
    )
