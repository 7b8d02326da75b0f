# SPDX-License-Identifier: Apache-2.0
"""The rtnetlink messages of the output buffer: encoded by pyroute2's classes, read by hand.

Encoding is done once for each message and costs about a millisecond; what is sent over and over
is sent as the same bytes.  Answers are read with :func:`netbuffer.netlink.attributes`, because
decoding a whole one in pyroute2 costs more than the question to the kernel.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Any

from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.tcmsg import cls_matchall, sched_plug, tcmsg

from netbuffer.epochs import PlugAction
from netbuffer.netlink import (
    HEADER,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_ECHO,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NLM_F_REQUEST,
    attributes,
    text,
)

# Linux linux/rtnetlink.h
RTM_NEWLINK = 16
RTM_DELLINK = 17
RTM_GETLINK = 18
RTM_SETLINK = 19
RTM_NEWNEIGH = 28
RTM_NEWQDISC = 36
RTM_DELQDISC = 37
RTM_GETQDISC = 38
RTM_NEWTFILTER = 44
RTM_DELTFILTER = 45
RTM_GETTFILTER = 46

# Linux linux/pkt_sched.h.  The class of ingress filters is the same for the qdiscs "ingress" and
# "clsact" (net/sched/sch_ingress.c: the former does not look at the minor number).
TC_H_ROOT = 0xFFFFFFFF
TC_H_INGRESS = 0xFFFFFFF1
INGRESS_HANDLE = 0xFFFF0000
INGRESS_FILTERS = 0xFFFFFFF2
PLUG_HANDLE = 0x00010000

#: Priority of the redirecting filter: the first that is looked at.
FILTER_PRIORITY = 1
#: Its handle, by which it is known again: "kemi" in ASCII.
FILTER_HANDLE = 0x6B656D69
_ETH_P_ALL = 0x0003
_IFF_UP = 0x1
_IN6_ADDR_GEN_MODE_NONE = 1
_AF_BRIDGE = 7
_NUD_REACHABLE = 0x02
_NTF_MASTER = 0x04

_IFINFOMSG = struct.Struct("=BBHiII")  # family, pad, type, index, flags, change
_TCMSG = struct.Struct("=BBHiIII")  # family, pad, pad, index, handle, parent, info
_IFLA_IFNAME = 3
_IFLA_LINKINFO = 18
_IFLA_IFALIAS = 20
_IFLA_STATS64 = 23
_IFLA_INFO_KIND = 1
_TCA_KIND = 1
_TCA_STATS2 = 7
_TCA_STATS_QUEUE = 3
_GNET_STATS_QUEUE = struct.Struct("=IIII")  # packets, bytes, drops, requeues
# rtnl_link_stats64: rx_packets, tx_packets, rx_bytes, tx_bytes, rx_errors, tx_errors,
# rx_dropped, tx_dropped
_LINK_STATS64 = struct.Struct("=8Q")


def _encode(message: Any, kind: int, flags: int) -> bytearray:
    message["header"]["type"] = kind
    message["header"]["flags"] = flags | NLM_F_REQUEST
    message.encode()
    return bytearray(message.data)


def _tc(index: int, handle: int, parent: int, info: int = 0) -> Any:
    message = tcmsg()
    message["family"] = socket.AF_UNSPEC
    message["index"] = index
    message["handle"] = handle
    message["parent"] = parent
    message["info"] = info
    return message


def _link(index: int = 0) -> Any:
    message = ifinfmsg()
    message["family"] = socket.AF_UNSPEC
    message["index"] = index
    return message


# ---- The plug ----


def plug_add(index: int, limit_bytes: int) -> bytearray:
    """Make sch_plug the root queue of a device; it holds from its first frame."""
    message = _tc(index, PLUG_HANDLE, TC_H_ROOT)
    options = sched_plug.get_parameters({"limit": limit_bytes})
    message["attrs"] = [["TCA_KIND", "plug"], ["TCA_OPTIONS", options]]
    return _encode(message, RTM_NEWQDISC, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)


def plug_do(index: int, action: PlugAction, limit_bytes: int = 0) -> bytearray:
    """Tell the plug of a device something.

    :raise AssertionError: pyroute2 has encoded something else (it turns what it does not know
        into BUFFER without a word)
    """
    message = _tc(index, PLUG_HANDLE, TC_H_ROOT)
    options = sched_plug.get_parameters({"action": action.netlink_name, "limit": limit_bytes})
    message["attrs"] = [["TCA_KIND", "plug"], ["TCA_OPTIONS", options]]
    encoded = _encode(message, RTM_NEWQDISC, NLM_F_ACK)
    # struct tc_plug_qopt is the last thing in the message.
    if encoded[-8:] != struct.pack("=iI", action, limit_bytes):
        raise AssertionError(f"{action!r} was encoded as {encoded[-8:].hex()}")
    return encoded


def plug_get(index: int) -> bytearray:
    """Ask for the plug with its statistics.

    NLM_F_ECHO: without it the kernel tells the answer to listeners only, not to the one who
    asked (rtnetlink_send in qdisc_notify, Linux net/sched/sch_api.c).
    """
    return _encode(_tc(index, PLUG_HANDLE, TC_H_ROOT), RTM_GETQDISC, NLM_F_ECHO)


@dataclass(frozen=True, slots=True)
class Queue:
    """Statistics of a queue.

    :ivar packets: frames in it
    :ivar backlog_bytes: their length, without the copies' overhead in memory
    :ivar drops: frames that did not fit, since the queue was made (counts modulo 2**32)
    """

    kind: str
    packets: int
    backlog_bytes: int
    drops: int


def read_queue(payload: bytes) -> Queue:
    """The statistics in an answer to :func:`plug_get`."""
    found = attributes(memoryview(payload)[_TCMSG.size :])
    nested = attributes(found.get(_TCA_STATS2, memoryview(b"")))
    queue = nested.get(_TCA_STATS_QUEUE)
    packets, backlog, drops, _requeues = (
        _GNET_STATS_QUEUE.unpack_from(queue) if queue is not None else (0, 0, 0, 0)
    )
    return Queue(text(found.get(_TCA_KIND)), packets, backlog, drops)


# ---- Ingress and the redirecting filter ----


def ingress_add(index: int) -> bytearray:
    """Give a device the qdisc that ingress filters hang on."""
    message = _tc(index, INGRESS_HANDLE, TC_H_INGRESS)
    message["attrs"] = [["TCA_KIND", "ingress"]]
    return _encode(message, RTM_NEWQDISC, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)


def ingress_delete(index: int) -> bytearray:
    """Take it away again, with all filters on it."""
    return _encode(_tc(index, INGRESS_HANDLE, TC_H_INGRESS), RTM_DELQDISC, NLM_F_ACK)


def qdisc_dump() -> bytearray:
    """Ask for the queues of all devices: the kernel does not select."""
    return _encode(_tc(0, 0, 0), RTM_GETQDISC, NLM_F_DUMP)


def redirect_add(index: int, target: int) -> bytearray:
    """Send every frame that enters by device ``index`` out of device ``target`` instead.

    Classifier ``matchall``: ``u32`` does not match a frame with fewer than four bytes behind its
    Ethernet header, whatever the mask is (skb_header_pointer in Linux net/sched/cls_u32.c).
    """
    message = _tc(
        index, FILTER_HANDLE, INGRESS_FILTERS, FILTER_PRIORITY << 16 | socket.htons(_ETH_P_ALL)
    )
    mirred = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": target}
    options = cls_matchall.get_parameters({"action": mirred})
    message["attrs"] = [["TCA_KIND", "matchall"], ["TCA_OPTIONS", options]]
    return _encode(message, RTM_NEWTFILTER, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)


def redirect_delete(index: int) -> bytearray:
    """Delete what has the priority of :func:`redirect_add`'s filter, if it is a matchall.

    Not by its handle: one matchall cannot be deleted from its priority (mall_delete in Linux
    net/sched/cls_matchall.c), and it is always alone there.
    """
    message = _tc(index, 0, INGRESS_FILTERS, FILTER_PRIORITY << 16 | socket.htons(_ETH_P_ALL))
    message["attrs"] = [["TCA_KIND", "matchall"]]
    return _encode(message, RTM_DELTFILTER, NLM_F_ACK)


def filter_dump(index: int) -> bytearray:
    """Ask for the ingress filters of a device."""
    return _encode(_tc(index, 0, INGRESS_FILTERS), RTM_GETTFILTER, NLM_F_DUMP)


@dataclass(frozen=True, slots=True)
class TrafficControl:
    """A queue or filter of a dump.

    :ivar index: of the device that has it
    """

    index: int
    handle: int
    parent: int
    kind: str


def read_traffic_control(payload: bytes) -> TrafficControl:
    """One answer to :func:`qdisc_dump` or :func:`filter_dump`."""
    _family, _pad1, _pad2, index, handle, parent, _info = _TCMSG.unpack_from(payload)
    found = attributes(memoryview(payload)[_TCMSG.size :])
    return TrafficControl(index, handle, parent, text(found.get(_TCA_KIND)))


# ---- Devices ----


def ifb_add(name: str) -> bytearray:
    """Make an ifb device; the kernel refuses a name that exists."""
    message = _link()
    kind = {"attrs": [["IFLA_INFO_KIND", "ifb"]]}
    message["attrs"] = [["IFLA_IFNAME", name], ["IFLA_LINKINFO", kind]]
    return _encode(message, RTM_NEWLINK, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)


def alias_set(index: int, alias: str) -> bytearray:
    """Give a device a description."""
    message = _link(index)
    message["attrs"] = [["IFLA_IFALIAS", alias]]
    return _encode(message, RTM_SETLINK, NLM_F_ACK)


def ipv6_silence(index: int) -> bytearray:
    """Keep IPv6 of this host from making an address for the device.

    Otherwise the frames that it sends on its own (multicast reports, router solicitations) are
    counted as frames of the guest.
    """
    message = _link(index)
    inet6 = {"attrs": [["IFLA_INET6_ADDR_GEN_MODE", _IN6_ADDR_GEN_MODE_NONE]]}
    message["attrs"] = [["IFLA_AF_SPEC", {"attrs": [["AF_INET6", inet6]]}]]
    return _encode(message, RTM_SETLINK, NLM_F_ACK)


def up_set(index: int, up: bool) -> bytearray:
    """Set a device up or down."""
    message = _link(index)
    message["flags"] = _IFF_UP if up else 0
    message["change"] = _IFF_UP
    return _encode(message, RTM_SETLINK, NLM_F_ACK)


def link_delete(index: int) -> bytearray:
    """Remove a device."""
    return _encode(_link(index), RTM_DELLINK, NLM_F_ACK)


def link_get(name: str) -> bytearray:
    """Ask for a device by its name."""
    message = _link()
    message["attrs"] = [["IFLA_IFNAME", name]]
    return _encode(message, RTM_GETLINK, 0)


def link_dump() -> bytearray:
    """Ask for all devices."""
    return _encode(_link(), RTM_GETLINK, NLM_F_DUMP)


@dataclass(frozen=True, slots=True)
class Link:
    """A network device.

    :ivar kind: of the driver, e.g. "ifb"; "" where the driver tells none
    :ivar underway: of an ifb, frames that have left its queue and are not yet re-injected
    """

    index: int
    name: str
    kind: str
    alias: str
    up: bool
    underway: int


def read_link(payload: bytes) -> Link:
    """One answer to :func:`link_get` or :func:`link_dump`."""
    _family, _pad, _type, index, flags, _change = _IFINFOMSG.unpack_from(payload)
    found = attributes(memoryview(payload)[_IFINFOMSG.size :])
    info = attributes(found.get(_IFLA_LINKINFO, memoryview(b"")))
    underway = 0
    stats = found.get(_IFLA_STATS64)
    if stats is not None:
        # ifb counts a frame as received when its queue hands it over (ifb_xmit) and as sent when
        # it is re-injected (ifb_ri_tasklet); Linux drivers/net/ifb.c.
        entered, left, _, _, _, _, refused, _ = _LINK_STATS64.unpack_from(stats)
        underway = entered - refused - left
    return Link(
        index=index,
        name=text(found.get(_IFLA_IFNAME)),
        kind=text(info.get(_IFLA_INFO_KIND)),
        alias=text(found.get(_IFLA_IFALIAS)),
        up=bool(flags & _IFF_UP),
        underway=underway,
    )


# ---- Bridges ----


def learn(index: int, mac: bytes) -> bytearray:
    """Have the bridge of port ``index`` believe that it saw ``mac`` there just now.

    A dynamic entry: it ages, and moves on as if it had been learnt.
    """
    message = ndmsg()
    message["family"] = _AF_BRIDGE
    message["ifindex"] = index
    message["state"] = _NUD_REACHABLE
    message["flags"] = _NTF_MASTER
    message["attrs"] = [["NDA_LLADDR", mac.hex(":")]]
    return _encode(message, RTM_NEWNEIGH, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE)


def header(message: bytearray) -> tuple[int, int, int]:
    """(length, type, flags) of an encoded message."""
    length, kind, flags, _sequence, _port = HEADER.unpack_from(message)
    return length, kind, flags
