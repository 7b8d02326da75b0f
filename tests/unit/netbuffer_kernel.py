# SPDX-License-Identifier: Apache-2.0
"""The part of the kernel that an output buffer uses, in memory, for tests on any Linux.

Answers the encoded messages of :mod:`netbuffer.messages` as the kernel does; what it refuses and
how was taken from Linux net/sched/sch_api.c, cls_api.c, sch_plug.c and drivers/net/ifb.c, and is
compared with the real one by tests/lab/netbuffer_checks.py.
"""

from __future__ import annotations

import errno
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from netbuffer import messages as m
from netbuffer.epochs import PlugAction
from netbuffer.errors import NetlinkError
from netbuffer.netlink import NLM_F_EXCL, attributes, text


class SchPlug:
    """``sch_plug``: a queue, the counts of two epochs, and how many frames may leave.

    :ivar left: frames that have left, in order
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.queue: deque[int] = deque()
        self.current = 0
        self.last = 0
        self.to_release = 0
        self.unplugged = False
        self.drops = 0
        self.left: list[int] = []

    def enqueue(self, frame: int) -> bool:
        if len(self.queue) >= self.limit:
            self.drops += 1
            return False
        if not self.unplugged:
            self.current += 1
        self.queue.append(frame)
        return True

    def act(self, action: PlugAction) -> None:
        match action:
            case PlugAction.BUFFER:
                self.last, self.current = self.current, 0
                self.unplugged = False
            case PlugAction.RELEASE_ONE:
                self.to_release += self.last
                self.last = 0
            case PlugAction.RELEASE_INDEFINITE:
                self.unplugged = True
                self.to_release = self.last = self.current = 0
            case PlugAction.LIMIT:
                raise AssertionError("not used")

    def run(self, at_most: int = 1 << 30) -> None:
        """Let the transmit interrupt take some frames from the head."""
        while at_most and self.queue and (self.unplugged or self.to_release):
            if not self.unplugged:
                self.to_release -= 1
            self.left.append(self.queue.popleft())
            at_most -= 1


@dataclass
class Device:
    """A network device with what hangs on it."""

    index: int
    name: str
    kind: str = ""
    alias: str = ""
    up: bool = False
    plug: SchPlug | None = None
    ingress: str = ""
    redirect: int = 0
    others: list[str] = field(default_factory=list)


class FakeKernel:
    """Devices, and a count of the requests that change them.

    :ivar missing: kinds of queue or filter that this kernel has not got
    :ivar before: called with the number of each changing request before it is done
    """

    def __init__(self, *names: str) -> None:
        self.devices: dict[int, Device] = {}
        self.out: list[int] = []  # frames that reached the bridge
        self.lost: list[int] = []
        self.missing: set[str] = set()
        self.requests = 0
        self.before: Callable[[int], None] = lambda _number: None
        for name in names:
            self.add(name)

    def add(self, name: str, kind: str = "") -> Device:
        device = Device(len(self.devices) + 2 + self.requests, name, kind)
        self.devices[device.index] = device
        return device

    def by_name(self, name: str) -> Device | None:
        return next((d for d in self.devices.values() if d.name == name), None)

    def send(self, vif: str, *frames: int) -> None:
        """The guest behind ``vif`` sends."""
        device = self.by_name(vif)
        assert device is not None
        for frame in frames:
            target = self.devices.get(device.redirect)
            if not device.redirect:
                self.out.append(frame)
            elif target is None or not target.up or target.plug is None:
                self.lost.append(frame)
            elif target.plug.enqueue(frame):
                self._pass(target)
            else:
                self.lost.append(frame)

    # ---- What netbuffer.netlink.Netlink has ----

    def close(self) -> None:
        pass

    def request(self, message: bytearray, purpose: str) -> None:
        self.requests += 1
        self.before(self.requests)
        _length, kind, flags = m.header(message)
        try:
            if kind in (m.RTM_NEWLINK, m.RTM_SETLINK, m.RTM_DELLINK):
                self._change_link(kind, message)
            else:
                self._change_tc(kind, flags, message)
        except _Refused as err:
            raise NetlinkError(purpose, err.errno, err.detail) from None

    def get(self, message: bytearray, purpose: str) -> bytes:
        _length, kind, _flags = m.header(message)
        try:
            if kind == m.RTM_GETLINK:
                name = text(attributes(bytes(message[32:])).get(3))
                return self._show_link(self._known(self.by_name(name)))
            device = self._at(message)
            if device.plug is None:
                raise _Refused(errno.ENOENT, "Cannot find specified qdisc on specified device")
            queue = struct.pack(
                "=IIIII",
                len(device.plug.queue),
                100 * len(device.plug.queue),
                device.plug.drops,
                0,
                0,
            )
            stats = _attribute(7, _attribute(3, queue))
            return _tcmsg(device.index, 0x10000, m.TC_H_ROOT) + _attribute(1, b"plug\0") + stats
        except _Refused as err:
            raise NetlinkError(purpose, err.errno, err.detail) from None

    def dump(self, message: bytearray, purpose: str) -> list[bytes]:
        del purpose
        _length, kind, _flags = m.header(message)
        if kind == m.RTM_GETLINK:
            return [self._show_link(device) for device in self.devices.values()]
        if kind == m.RTM_GETQDISC:
            return [
                _tcmsg(d.index, m.INGRESS_HANDLE, m.TC_H_INGRESS)
                + _attribute(1, d.ingress.encode() + b"\0")
                for d in self.devices.values()
                if d.ingress
            ]
        device = self.devices.get(struct.unpack_from("=i", message, 20)[0])
        if device is None:
            # No error: tc_dump_tfilter in Linux net/sched/cls_api.c.
            return []
        found = [_tcmsg(device.index, 0, m.INGRESS_FILTERS) + _attribute(1, b"matchall\0")]
        if device.redirect:
            ours = _tcmsg(device.index, m.FILTER_HANDLE, m.INGRESS_FILTERS)
            found.append(ours + _attribute(1, b"matchall\0"))
        for other in device.others:
            theirs = _tcmsg(device.index, 1, m.INGRESS_FILTERS)
            found.append(theirs + _attribute(1, other.encode() + b"\0"))
        return found

    # ---- Machinery ----

    def _pass(self, ifb: Device) -> None:
        assert ifb.plug is not None
        ifb.plug.run()
        self.out += ifb.plug.left
        ifb.plug.left.clear()

    def _at(self, message: bytearray) -> Device:
        return self._known(self.devices.get(struct.unpack_from("=i", message, 20)[0]))

    @staticmethod
    def _known(device: Device | None) -> Device:
        if device is None:
            raise _Refused(errno.ENODEV, "")
        return device

    def _change_link(self, kind: int, message: bytearray) -> None:
        found = attributes(bytes(message[32:]))
        if kind == m.RTM_NEWLINK:
            driver = text(attributes(found[18]).get(1))
            if driver in self.missing:
                raise _Refused(errno.EOPNOTSUPP, "Unknown device type")
            if self.by_name(text(found[3])):
                raise _Refused(errno.EEXIST, "")
            self.add(text(found[3]), driver)
            return
        device = self._at(message)
        if kind == m.RTM_DELLINK:
            self._purge(device)
            del self.devices[device.index]
            return
        if 20 in found:
            device.alias = text(found[20])
        flags, change = struct.unpack_from("=II", message, 24)
        if change & 1:
            device.up = bool(flags & 1)
            if not device.up:
                self._purge(device)

    def _purge(self, device: Device) -> None:
        if device.plug is not None:
            self.lost += device.plug.queue
            device.plug.queue.clear()

    def _change_tc(self, kind: int, flags: int, message: bytearray) -> None:
        device = self._at(message)
        parent: int = struct.unpack_from("=I", message, 28)[0]
        found = attributes(bytes(message[36:]))
        name = text(found.get(1))
        if kind in (m.RTM_NEWQDISC, m.RTM_NEWTFILTER) and name in self.missing:
            part = (
                "TC classifier not found" if kind == m.RTM_NEWTFILTER else "qdisc kind is unknown"
            )
            raise _Refused(errno.ENOENT, part)
        if kind == m.RTM_NEWQDISC and parent == m.TC_H_ROOT:
            action, limit = struct.unpack("=iI", found[2])
            if flags & NLM_F_EXCL:
                device.plug = SchPlug(limit // 100)
            elif device.plug is None:
                raise _Refused(errno.ENOENT, "")
            else:
                device.plug.act(PlugAction(action))
                self._pass(device)
        elif kind == m.RTM_NEWQDISC:
            device.ingress = name
        elif kind == m.RTM_DELQDISC:
            device.ingress, device.redirect, device.others = "", 0, []
        elif kind == m.RTM_NEWTFILTER:
            if "mirred" in self.missing:
                raise _Refused(errno.ENOENT, "Failed to load TC action module")
            device.redirect = struct.unpack("=I", message[-4:])[0]
        elif kind == m.RTM_DELTFILTER:
            device.redirect = 0
        else:
            raise AssertionError(f"unknown message {kind}")

    @staticmethod
    def _show_link(device: Device) -> bytes:
        return (
            struct.pack("=BxHiII", 0, 1, device.index, int(device.up), 0)
            + _attribute(3, device.name.encode() + b"\0")
            + _attribute(18, _attribute(1, device.kind.encode() + b"\0"))
            + _attribute(20, device.alias.encode() + b"\0")
        )


class _Refused(Exception):
    def __init__(self, number: int, detail: str) -> None:
        self.errno = number
        self.detail = detail
        super().__init__(number, detail)


def _attribute(kind: int, payload: bytes) -> bytes:
    length = 4 + len(payload)
    return struct.pack("=HH", length, kind) + payload + bytes(-length % 4)


def _tcmsg(index: int, handle: int, parent: int) -> bytes:
    return struct.pack("=BxxxiIII", 0, index, handle, parent, 0)
