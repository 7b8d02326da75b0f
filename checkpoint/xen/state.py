# SPDX-License-Identifier: Apache-2.0
"""The machine state that goes with an epoch's pages.  Pure.

A fixed header and a sequence of sections, each 8-byte aligned, so that two states of one guest
have the same shape and their difference is small.  Little-endian.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field

from checkpoint.driver import PAGE_SIZE
from checkpoint.errors import ProtocolError

_MAGIC = b"KMST0001"
_SECTION = struct.Struct("<II")
_EVENT = struct.Struct("<5I")
_GFN = struct.Struct("<Q")
_PARAM = struct.Struct("<QQ")

_CONTEXT, _EVENTS, _GRANTS, _PAGES, _STORE, _PARAMS = range(1, 7)
_NAMES = {
    _CONTEXT: "vCPU context",
    _EVENTS: "event channels",
    _GRANTS: "grant table",
    _PAGES: "special pages",
    _STORE: "xenstore",
    _PARAMS: "parameters",
}


@dataclass(frozen=True, slots=True)
class EventChannel:
    """One port of the guest (``EVTCHNOP_status``, ``xen/include/public/event_channel.h``).

    :ivar status: 1 unbound, 2 interdomain, 3 pirq, 4 VIRQ, 5 IPI
    :ivar vcpu: the vCPU that it notifies
    :ivar detail: the VIRQ number, or the remote domain of an unbound or interdomain port
    """

    port: int
    status: int
    vcpu: int
    detail: int


@dataclass(slots=True)
class MachineState:
    """Everything of a guest but its RAM.

    :ivar context: HVM save records
    :ivar events: bound ports, ascending
    :ivar grants: the grant table's shared frames, in order; pieces of any number of them
    :ivar pages: contents of pages outside RAM (xenstore and console rings) by guest frame
    :ivar params: HVM parameters that the guest set
    :ivar store: the guest's xenstore subtree, path relative to ``/local/domain/N`` -> value
    """

    context: bytes
    events: list[EventChannel]
    grants: list[bytes]
    pages: dict[int, bytes]
    params: dict[int, int]
    store: dict[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The state as it travels."""
        return StateEncoder().encode(self)

    @classmethod
    def from_bytes(cls, untrusted_raw: bytes) -> MachineState:
        """Parse what :meth:`to_bytes` made.

        :raise ProtocolError: when anything does not fit
        """
        raw = untrusted_raw
        if raw[: len(_MAGIC)] != _MAGIC:
            raise ProtocolError("the machine state does not begin with its magic number")
        found: dict[int, bytes] = {}
        at = len(_MAGIC)
        while at < len(raw):
            if at + _SECTION.size > len(raw):
                raise ProtocolError("the machine state ends inside a section header")
            kind, length = _SECTION.unpack_from(raw, at)
            at += _SECTION.size
            if kind not in _NAMES or kind in found or at + length > len(raw):
                raise ProtocolError(f"machine state section {kind} of {length} bytes does not fit")
            found[kind] = raw[at : at + length]
            at += length + -length % 8
        missing = [name for kind, name in _NAMES.items() if kind not in found]
        if missing:
            raise ProtocolError(f"the machine state lacks: {', '.join(missing)}")
        _whole(found[_EVENTS], _EVENT.size, "event channels")
        _whole(found[_GRANTS], PAGE_SIZE, "grant table")
        _whole(found[_PAGES], 8 + PAGE_SIZE, "special pages")
        _whole(found[_PARAMS], 16, "parameters")
        grants = found[_GRANTS]
        pages = found[_PAGES]
        try:
            store = json.loads(found[_STORE])
        except (ValueError, RecursionError):
            raise ProtocolError("the machine state's xenstore section is not JSON") from None
        if not isinstance(store, dict) or not all(isinstance(v, str) for v in store.values()):
            raise ProtocolError("the machine state's xenstore section is not a map of texts")
        return cls(
            context=found[_CONTEXT],
            events=[EventChannel(*item[:4]) for item in _EVENT.iter_unpack(found[_EVENTS])],
            grants=[grants[i : i + PAGE_SIZE] for i in range(0, len(grants), PAGE_SIZE)],
            pages={
                int.from_bytes(pages[i : i + 8], "little"): pages[i + 8 : i + 8 + PAGE_SIZE]
                for i in range(0, len(pages), 8 + PAGE_SIZE)
            },
            params=dict(struct.iter_unpack("<QQ", found[_PARAMS])),
            store=store,
        )


class StateEncoder:
    """Encodes the states of one guest.  What is the same object as last time is not coded again."""

    def __init__(self) -> None:
        self._events: tuple[list[EventChannel] | None, bytes] = (None, b"")
        self._store: tuple[dict[str, str] | None, bytes] = (None, b"")

    def encode(self, state: MachineState) -> bytes:
        """``state`` as it travels."""
        if self._events[0] is not state.events:
            packed = [_EVENT.pack(e.port, e.status, e.vcpu, e.detail, 0) for e in state.events]
            self._events = (state.events, b"".join(packed))
        if self._store[0] is not state.store:
            text = json.dumps(state.store, separators=(",", ":")).encode()
            self._store = (state.store, text)
        out = [_MAGIC]
        for kind, body in (
            (_CONTEXT, state.context),
            (_EVENTS, self._events[1]),
            (_GRANTS, b"".join(state.grants)),
            (_PAGES, b"".join(_GFN.pack(gfn) + page for gfn, page in state.pages.items())),
            (_PARAMS, b"".join(_PARAM.pack(*item) for item in state.params.items())),
            (_STORE, self._store[1]),
        ):
            out += [_SECTION.pack(kind, len(body)), body, bytes(-len(body) % 8)]
        return b"".join(out)


def _whole(body: bytes, unit: int, what: str) -> None:
    if len(body) % unit:
        raise ProtocolError(
            f"the machine state's {what} section has {len(body)} bytes "
            f"(expected a multiple of {unit})"
        )
