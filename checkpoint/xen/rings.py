# SPDX-License-Identifier: Apache-2.0
"""Shared rings between the guest's frontends and Dom0's backends.  Pure.

Layouts: ``xen/include/public/io/ring.h`` (indices), ``io/netif.h`` (slots), ``io/xs_wire.h``
(xenstore).  An answer overwrites its request's slot, which is why a ring is only copied where
every slot is either wholly a request or wholly answered.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from checkpoint import native
from checkpoint.driver import PAGE_SIZE
from checkpoint.errors import CheckpointError

#: req_prod, req_event, rsp_prod, rsp_event
_INDICES = struct.Struct("<4I")

#: XenbusStateConnected (io/xenbus.h)
_CONNECTED = "4"

#: struct xenstore_domain_interface: two buffers, req_cons, req_prod, rsp_cons, rsp_prod
XENSTORE_RING = 1024
_XENSTORE_INDICES = struct.Struct("<4I")
_XENSTORE_INDICES_AT = 2 * XENSTORE_RING

#: grant entry version 1: flags, domid, frame
GRANT = struct.Struct("<HHI")
GRANTS_PER_FRAME = PAGE_SIZE // GRANT.size


class Kind(enum.Enum):
    """What a ring is for."""

    TRANSMIT = enum.auto()
    #: receive buffers that the guest offers: requests that wait for frames to come
    RECEIVE = enum.auto()
    DISK = enum.auto()


@dataclass(frozen=True, slots=True)
class Ring:
    """A ring between the guest and a backend, or one of the queues of a device.

    :ivar gfn: guest frame of its page, the first one if it has several: the one with the indices
    """

    gfn: int
    kind: Kind


#: (device, node of its frontend) -> what the node refers to (io/netif.h, io/blkif.h); further pages
#: of a disk's ring are under grants that its backend keeps mapped, and are copied as such
_REFERENCES = {
    ("vif", "tx-ring-ref"): Kind.TRANSMIT,
    ("vif", "rx-ring-ref"): Kind.RECEIVE,
    ("vbd", "ring-ref"): Kind.DISK,
    ("vbd", "ring-ref0"): Kind.DISK,
}


def device_rings(store: dict[str, str], grants: bytes | memoryview) -> list[Ring]:
    """The rings of every connected network interface and disk.

    :param store: the guest's xenstore subtree
    :param grants: shared frames of its grant table
    :raise CheckpointError: when a ring reference is no grant
    """
    rings = []
    for path, value in store.items():
        parts = path.split("/")
        if len(parts) < 4 or parts[0] != "device":
            continue
        kind = _REFERENCES.get((parts[1], parts[-1]))
        # The references of a closed frontend stay, and name pages that now serve something else.
        if kind is None or store.get("/".join(parts[:3]) + "/state") != _CONNECTED:
            continue
        try:
            reference = int(value)
            _flags, _domid, frame = GRANT.unpack_from(grants, reference * GRANT.size)
        except (ValueError, struct.error):
            raise CheckpointError(f"xenstore node {path} has no valid grant: {value!r}") from None
        rings.append(Ring(frame, kind))
    return rings


def answered(page: memoryview) -> bool:
    """Whether the backend has answered every request on a transmit or disk ring."""
    req_prod, _req_event, rsp_prod, _rsp_event = _INDICES.unpack_from(page, 0)
    return bool(req_prod == rsp_prod)


def receive_unambiguous(page: bytes | bytearray | memoryview, grants: int) -> bool:
    """Whether every slot not yet answered on a receive ring still holds its request.

    netback writes answers into the slots first and moves the index later, in batches; a copy from
    in between would offer answers as requests.  An answer read as a request names a grant beyond
    any table, because its length field is in the upper half; before that is written, its flags
    alone name a reserved one.

    :param grants: number of entries of the guest's grant table
    """
    return native.receive_ring_whole(page, grants)


def xenstore_indices(page: bytes | bytearray | memoryview) -> tuple[int, int, int, int]:
    """(req_cons, req_prod, rsp_cons, rsp_prod) of a xenstore ring."""
    req_cons, req_prod, rsp_cons, rsp_prod = _XENSTORE_INDICES.unpack_from(
        page, _XENSTORE_INDICES_AT
    )
    return req_cons, req_prod, rsp_cons, rsp_prod


def xenstore_empty(page: bytes | bytearray | memoryview) -> bool:
    """Whether no byte is on its way in either direction."""
    req_cons, req_prod, rsp_cons, rsp_prod = xenstore_indices(page)
    return req_cons == req_prod and rsp_cons == rsp_prod


def unused_grants(frames: bytes) -> bytes:
    """The same grant entries, not in use by anybody (bits GTF_reading and GTF_writing cleared).

    On the standby no backend has mapped them yet.
    """
    out = bytearray(frames)
    for at in range(0, len(out), GRANT.size):
        out[at] &= ~0x18 & 0xFF
    return bytes(out)
