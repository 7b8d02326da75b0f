# SPDX-License-Identifier: Apache-2.0
"""Taking an output buffer down, also one that a killed daemon left.

The kernel keeps everything that a buffer is made of when the daemon dies: the guest's frames stay
held, which is right, because nobody knows whether the standby has their epoch.  What is found is
recognised by the name and the description of its ifb device and by the handle of its filter, so
that nothing needs to be written down elsewhere, and every step of setting up or taking down may
be the last one that a daemon lived to make.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import time
from dataclasses import dataclass

from netbuffer import messages
from netbuffer.epochs import PlugAction
from netbuffer.errors import InterfaceNotFound, NetlinkError
from netbuffer.messages import Link, Queue
from netbuffer.netlink import Netlink

_log = logging.getLogger(__name__)

#: First letters of the name of every ifb device that this package makes.
IFB_PREFIX = "kmi"
_ALIAS_PREFIX = "kemari"
_NAME_MAX = 15  # IFNAMSIZ - 1
_VIF = re.compile(r"vif\d+\.\d+(-emu)?")
# A frame is handed from the filter to the ifb within one soft interrupt; when the filter is gone
# this long, none is on its way any more.
_GRACE_SECONDS = 0.02
_POLL_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Remains:
    """What is left of an output buffer.

    :ivar vif: the device whose output it held; the same as ``ifb`` where that cannot be told
    :ivar ifb: name of its ifb device; "" when that is gone (then every frame is dropped)
    :ivar filtered: whether frames of the vif are still redirected
    :ivar held_packets: frames in the queue
    :ivar held_bytes: their length
    """

    vif: str
    ifb: str
    filtered: bool
    held_packets: int
    held_bytes: int


@dataclass(frozen=True, slots=True)
class Removal:
    """What taking a buffer down did.

    :ivar found: whether there was anything
    :ivar released_packets: held frames that were let go, in order
    :ivar dropped_packets: held frames that were not
    """

    found: bool
    released_packets: int
    dropped_packets: int


def ifb_name(vif: str) -> str:
    """Name of the ifb device for a vif: ``vif3.0`` gives ``kmi3.0``; at most 15 characters.

    Such a name stands for itself, so that a device whose vif is not known can be taken down too.
    """
    if vif.startswith(IFB_PREFIX):
        return vif
    if _VIF.fullmatch(vif):
        rest = vif.removeprefix("vif")
        if len(IFB_PREFIX + rest) <= _NAME_MAX:
            return IFB_PREFIX + rest
    return IFB_PREFIX + "-" + hashlib.sha256(vif.encode()).hexdigest()[: _NAME_MAX - 4]


def alias(vif: str, *, own_ingress: bool) -> str:
    """Description of the ifb device: which vif it serves and whether the ingress qdisc is ours."""
    return f"{_ALIAS_PREFIX}:{'own' if own_ingress else 'shared'}:{vif}"


def find_link(netlink: Netlink, name: str) -> Link | None:
    """The network device of that name, or None."""
    if not 0 < len(name) <= _NAME_MAX:
        return None
    try:
        answer = netlink.get(messages.link_get(name), f"find device {name}")
    except NetlinkError as err:
        if err.errno == errno.ENODEV:
            return None
        raise
    return messages.read_link(answer)


def ingress_kind(netlink: Netlink, index: int) -> str:
    """Kind of the qdisc that a device's ingress filters hang on; "" when there is none."""
    for answer in netlink.dump(messages.qdisc_dump(), "list queues"):
        found = messages.read_traffic_control(answer)
        if found.index == index and found.parent == messages.TC_H_INGRESS:
            return found.kind
    return ""


def filters(netlink: Netlink, index: int) -> tuple[bool, list[str]]:
    """(whether our filter is there, kinds of all others) among a device's ingress filters."""
    ours = False
    others: list[str] = []
    for answer in netlink.dump(messages.filter_dump(index), "list ingress filters"):
        found = messages.read_traffic_control(answer)
        # Each priority is listed once by itself, with handle 0, and once for each filter in it.
        if found.handle == messages.FILTER_HANDLE and found.kind == "matchall":
            ours = True
        elif found.handle != 0:
            others.append(found.kind)
    return ours, others


def find_queue(netlink: Netlink, ifb: Link) -> Queue | None:
    """The plug of an ifb device; None when its queue is another one."""
    try:
        answer = netlink.get(messages.plug_get(ifb.index), f"read the queue of {ifb.name}")
    except NetlinkError as err:
        if err.errno in (errno.ENOENT, errno.EINVAL, errno.ENODEV):
            return None
        raise
    queue = messages.read_queue(answer)
    return queue if queue.kind == "plug" else None


def is_drained(netlink: Netlink, name: str) -> bool:
    """Whether no frame is in the queue of an ifb device or between it and the stack."""
    ifb = find_link(netlink, name)
    if ifb is None:
        return True
    queue = find_queue(netlink, ifb)
    return (queue is None or queue.packets == 0) and ifb.underway <= 0


def await_drained(netlink: Netlink, name: str, seconds: float) -> bool:
    """Wait until :func:`is_drained`, at most ``seconds``.

    The kernel gives no event for it.  A release empties the queue before the request to release
    returns, unless it is long, so that usually nothing is waited for.
    """
    end = time.monotonic() + seconds
    while not is_drained(netlink, name):
        if time.monotonic() >= end:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def find(netlink: Netlink) -> list[Remains]:
    """Every output buffer of this network namespace, whole or in parts."""
    links = [messages.read_link(a) for a in netlink.dump(messages.link_dump(), "list devices")]
    by_index = {link.index: link for link in links}
    filtered: set[str] = set()
    for answer in netlink.dump(messages.qdisc_dump(), "list queues"):
        queue = messages.read_traffic_control(answer)
        if queue.parent == messages.TC_H_INGRESS and queue.index in by_index:
            ours, _others = filters(netlink, queue.index)
            if ours:
                filtered.add(by_index[queue.index].name)
    found: list[Remains] = []
    for link in links:
        if link.kind != "ifb" or not link.name.startswith(IFB_PREFIX):
            continue
        vif = _vif_of(link, [other.name for other in links])
        held = find_queue(netlink, link)
        packets, size = (held.packets, held.backlog_bytes) if held is not None else (0, 0)
        found.append(Remains(vif, link.name, vif in filtered, packets, size))
    with_ifb = {remains.vif for remains in found}
    found += [Remains(vif, "", True, 0, 0) for vif in sorted(filtered - with_ifb)]
    return found


def take_down(netlink: Netlink, vif: str, *, release: bool, drain_timeout: float) -> Removal:
    """Remove whatever there is of the output buffer for ``vif``; the vif may be gone.

    With ``release`` all held frames leave first, in order.  Without, all held frames and all that
    the guest sends meanwhile are dropped; once this returns, frames of the vif pass again.

    :raise NetlinkError: the kernel refused; what is left can be taken down by another call
    """
    ifb = find_link(netlink, ifb_name(vif))
    link = find_link(netlink, vif) if ifb_name(vif) != vif else None
    queue = find_queue(netlink, ifb) if ifb is not None else None
    held = queue.packets if queue is not None else 0
    if ifb is not None and queue is not None and release:
        action = messages.plug_do(ifb.index, PlugAction.RELEASE_INDEFINITE)
        netlink.request(action, f"release the frames held for {vif}")
        await_drained(netlink, ifb.name, drain_timeout)
    elif ifb is not None and not release:
        # Down rather than gone: its description is still needed, and a redirect to a device that
        # is down drops the frame (tcf_mirred in Linux net/sched/act_mirred.c).
        netlink.request(messages.up_set(ifb.index, False), f"drop the frames held for {vif}")
    unfiltered = link is not None and _remove_filter(netlink, link, ifb)
    lost = 0
    if ifb is not None:
        if release and unfiltered:
            time.sleep(_GRACE_SECONDS)
            if not await_drained(netlink, ifb.name, drain_timeout):
                left = find_queue(netlink, ifb)
                lost = left.packets if left is not None else 0
                _log.error("%d frames held for %s could not be released in time", lost, vif)
        _remove(netlink, messages.link_delete(ifb.index), f"remove {ifb.name}")
    dropped = lost if release else held
    return Removal(ifb is not None or unfiltered, held - dropped if release else 0, dropped)


def _remove_filter(netlink: Netlink, link: Link, ifb: Link | None) -> bool:
    """Take filter and, where it is ours, ingress qdisc from a vif; True if a filter was there."""
    kind = ingress_kind(netlink, link.index)
    if not kind:
        return False
    ours, others = filters(netlink, link.index)
    if ours:
        redirect = messages.redirect_delete(link.index)
        _remove(netlink, redirect, f"remove the redirection of {link.name}")
    if ifb is not None:
        own_ingress = ifb.alias == alias(link.name, own_ingress=True)
    else:
        # The ifb and with it the knowledge is gone; an empty ingress qdisc does nothing.
        own_ingress = ours and kind == "ingress"
    if own_ingress and not others:
        _remove(netlink, messages.ingress_delete(link.index), f"remove ingress of {link.name}")
    return ours


def _remove(netlink: Netlink, message: bytearray, purpose: str) -> None:
    """Ask for a removal; a device that is gone meanwhile took along what hung on it.

    A guest's vif goes when its domain does, whatever is being done to it here.
    """
    try:
        netlink.request(message, purpose)
    except NetlinkError as err:
        if err.errno != errno.ENODEV:
            raise


def _vif_of(ifb: Link, names: list[str]) -> str:
    """The vif that an ifb serves: by its description, or else by its name."""
    parts = ifb.alias.split(":", 2)
    if len(parts) == 3 and parts[0] == _ALIAS_PREFIX:
        return parts[2]
    if _VIF.fullmatch(vif := "vif" + ifb.name.removeprefix(IFB_PREFIX)):
        return vif
    # Killed before it was described: the name is a digest of a device's name.
    others = (name for name in names if name != ifb.name)
    return next((name for name in others if ifb_name(name) == ifb.name), ifb.name)


def require_link(netlink: Netlink, name: str) -> Link:
    """The network device of that name.

    :raise InterfaceNotFound: there is none
    """
    link = find_link(netlink, name)
    if link is None:
        raise InterfaceNotFound(name)
    return link
