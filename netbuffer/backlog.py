# SPDX-License-Identifier: Apache-2.0
"""Frames for a guest that come while no host runs it: kept, and handed over once it runs.

When a host dies, its switch port goes down, and a switch forgets who was behind a port that goes
down: what is sent to the guest from then on is flooded, and passes the bridge of the host that
stands by for it.  Nobody there wants it yet.  A sender of TCP repeats it after a time that doubles
(RFC 6298): after a silence of 1.5 s its next attempt may come a second after the guest is back.
What passed the bridge meanwhile is kept here, so that the guest answers it as soon as it runs.

To the guest these are frames that the network has delayed, which a network may do; one that it has
had before is one that the network has delivered twice, which it may do as well.

A packet socket on the bridge device sees them: a bridge device in promiscuous mode is handed a
copy of every frame that its bridge forwards (``br_handle_frame_finish``, Linux
``net/bridge/br_input.c``), and the kernel ends that mode with the socket that asked for it.  It
keeps them in the socket's receive buffer, of which the size is the limit; the ones that do not fit
are lost, as they would have been.  Each comes with its ``struct virtio_net_hdr`` (Linux
``uapi/linux/virtio_net.h``), and goes on with it: it may have been merged from several, or lack its
checksum still.
"""

from __future__ import annotations

import errno
import fcntl
import select
import socket
import struct
import time
from typing import Final

from netbuffer import packets
from netbuffer.announce import parse_mac
from netbuffer.errors import BacklogError, InterfaceNotFound

#: Bytes of kernel memory for kept frames; the kernel allows twice that, and no more than twice
#: ``net.core.rmem_max``.
LIMIT: Final = 1 << 18
#: Frames in a backlog at most; the kernel takes more than this of its limit for each.
_MOST: Final = LIMIT * 2 // 256

_PACKET_ADD_MEMBERSHIP: Final = 1  # Linux uapi/linux/if_packet.h, as the next two
_PACKET_VNET_HDR: Final = 15
_PACKET_MR_PROMISC: Final = 1
_VNET_HDR: Final = 10
_RTMGRP_LINK: Final = 1  # Linux uapi/linux/rtnetlink.h
_IFREQ: Final = struct.Struct("=16sH22x")  # netdevice(7)
_SIOCGIFFLAGS: Final = 0x8913
_IFF_RUNNING: Final = 0x40
#: Seconds after which a device without carrier is sent the frames all the same.
_CARRIER_BOUND: Final = 1.0
_WHOLE: Final = 0xFFFFFFFF


class Backlog:
    """What passes a bridge on its way to one address.

    :param bridge: network device of a Linux bridge, e.g. ``xenbr0``
    :param mac: the guest's address
    :raise InterfaceNotFound: there is no such device
    :raise BacklogError: the kernel refused, e.g. for want of CAP_NET_RAW
    :raise ValueError: ``mac`` is not an address
    """

    def __init__(self, bridge: str, mac: str) -> None:
        filtered = _only_to(parse_mac(mac))
        self._socket = _open()
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LIMIT)
            packets.attach(self._socket, filtered)
            self._socket.bind((bridge, packets.EVERY_KIND))
            index = socket.if_nametoindex(bridge)
            request = struct.pack("=iHH8x", index, _PACKET_MR_PROMISC, 0)
            self._socket.setsockopt(packets.SOL_PACKET, _PACKET_ADD_MEMBERSHIP, request)
        except OSError as err:
            self._socket.close()
            if err.errno == errno.ENODEV:
                raise InterfaceNotFound(bridge) from None
            raise BacklogError(f"Frames on {bridge} cannot be kept: {err.strerror}") from err

    def deliver(self, vif: str) -> int:
        """Hand what was kept to the guest behind ``vif``, in order, and close; number of frames.

        Waits a little until the device carries frames, which is when its frontend has been seen to
        take them.  What the guest's queue does not take is lost, as in a network.

        :raise InterfaceNotFound: there is no such device
        :raise BacklogError: the device is down, or the kernel refused otherwise
        """
        count = 0
        with self._socket as kept, _open() as way:
            try:
                way.bind((vif, packets.NO_KIND))
                _await_carrier(vif)
                for frame in _frames(kept):
                    try:
                        way.send(frame)
                    except OSError as err:
                        if err.errno not in _FULL:
                            raise
                    else:
                        count += 1
            except OSError as err:
                if err.errno == errno.ENODEV:
                    raise InterfaceNotFound(vif) from None
                raise BacklogError(
                    f"Frames that were kept for {vif} could not be delivered: {err.strerror}"
                ) from err
        return count

    def close(self) -> None:
        """Forget what was kept (idempotent)."""
        self._socket.close()


#: What a full queue answers, and a frame that this device cannot take.
_FULL: Final = {errno.ENOBUFS, errno.EAGAIN, errno.EMSGSIZE}


def _await_carrier(vif: str) -> None:
    """Wait until frames pass the device; without its queue the kernel drops them without a word.

    netback reports a carrier once the guest's ring has room (``xenvif_queue_carrier_on``, Linux
    ``drivers/net/xen-netback/rx.c``); only then is the queue put in place (``dev_activate``, Linux
    ``net/sched/sch_generic.c``), and the device is said to be running.
    """
    deadline = time.monotonic() + _CARRIER_BOUND
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as changes:
        changes.bind((0, _RTMGRP_LINK))
        while not _running(vif) and (left := deadline - time.monotonic()) > 0:
            if select.select([changes], [], [], left)[0]:
                changes.recv(1 << 16)


def _running(device: str) -> bool:
    """Whether it is up and has a carrier: ``dev_get_flags``, Linux ``net/core/dev.c``.

    :raise OSError: there is no such device
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        request = _IFREQ.pack(device.encode(), 0)
        flags: int = _IFREQ.unpack(fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
    return bool(flags & _IFF_RUNNING)


def _frames(kept: socket.socket) -> list[bytes]:
    """All that is there, each with its header; what cannot be had whole is left out."""
    frames = []
    room = bytearray(_VNET_HDR + (1 << 16) + 64)
    for _ in range(_MOST):
        try:
            size, _, flags, _ = kept.recvmsg_into([room])
        except BlockingIOError:
            break
        except OSError as err:
            # One whose header cannot be told (packet_rcv_vnet, Linux net/packet/af_packet.c); the
            # bridge's being down for a moment.
            if err.errno not in (errno.EINVAL, errno.ENETDOWN):
                raise
            continue
        if not flags & socket.MSG_TRUNC:
            frames.append(bytes(memoryview(room)[:size]))
    return frames


def _open() -> socket.socket:
    try:
        opened = packets.unbound()
    except PermissionError:
        raise BacklogError("Keeping frames for a guest needs CAP_NET_RAW") from None
    try:
        opened.setsockopt(packets.SOL_PACKET, _PACKET_VNET_HDR, 1)
    except OSError as err:
        opened.close()
        raise BacklogError(f"Frames cannot be had with their headers: {err.strerror}") from err
    return opened


def _only_to(mac: bytes) -> list[packets.Step]:
    """A filter for frames to that address."""
    high, low = struct.unpack("!HI", mac)
    return [
        (packets.LOAD_HALF, 0, 0, 0),
        (packets.JUMP_IF_EQUAL, 0, 3, high),
        (packets.LOAD_WORD, 0, 0, 2),
        (packets.JUMP_IF_EQUAL, 0, 1, low),
        (packets.RETURN, 0, 0, _WHOLE),
        (packets.RETURN, 0, 0, 0),
    ]
