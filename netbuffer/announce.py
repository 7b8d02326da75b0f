# SPDX-License-Identifier: Apache-2.0
"""Telling switches and neighbours where a guest is now.

After a move every switch still sends the guest's frames to its old place, until a frame with the
guest's address as its source has come from the new one.  A guest that was moved without knowing
sends none by itself.  So Dom0 sends some in its name:

- RARP requests, as other hypervisors do after a migration: they say nothing of IP, need no
  knowledge of it, and no station answers them;
- where the guest's IP addresses are known, an ARP announcement (RFC 5227, 3) for each IPv4
  address and an unsolicited neighbour advertisement (RFC 4861, 7.2.6) for each IPv6 address;
- the host's own bridge does not learn from what is sent through its own device, and is told by
  netlink (:func:`learn`).

Frames may be lost, and a switch port may take a moment to forward: so they are repeated in
growing steps (the schedule that QEMU uses: 50, 150, 250, 350 ms).
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

from netbuffer import messages, packets, remains
from netbuffer.errors import AnnounceError, InterfaceNotFound, NetlinkError
from netbuffer.netlink import Netlink

#: Seconds to wait before each round of frames: five rounds, the first one at once.
SCHEDULE: tuple[float, ...] = (0.0, 0.05, 0.15, 0.25, 0.35)

_BROADCAST = b"\xff" * 6
_ALL_NODES_MAC = bytes.fromhex("333300000001")
_ALL_NODES = IPv6Address("ff02::1").packed
_ETH_P_ARP = 0x0806
_ETH_P_RARP = 0x8035
_ETH_P_IPV6 = 0x86DD
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_ARP_REQUEST = 1
_RARP_REQUEST = 3
_NO_IPV4 = bytes(4)
_MIN_FRAME = 60  # without checksum
_ICMPV6 = 58
_NEIGHBOUR_ADVERTISEMENT = 136
_OVERRIDE = 0x20000000
_TARGET_LINK_LAYER_ADDRESS = 2


def parse_mac(mac: str) -> bytes:
    """The six bytes of a unicast address ``aa:bb:cc:dd:ee:ff``.

    :raise ValueError: it is not one
    """
    parts = mac.split(":")
    try:
        octets = bytes(int(part, 16) for part in parts if len(part) == 2)
    except ValueError:
        octets = b""
    if len(octets) != 6 or len(parts) != 6 or octets[0] & 1 or not any(octets):
        raise ValueError(f"{mac!r} is not a unicast MAC address, expected aa:bb:cc:dd:ee:ff")
    return octets


def rarp(mac: bytes) -> bytes:
    """A broadcast RARP request from ``mac`` for itself (RFC 903), 60 bytes."""
    body = _ARP.pack(1, 0x0800, 6, 4, _RARP_REQUEST, mac, _NO_IPV4, mac, _NO_IPV4)
    return _ethernet(_BROADCAST, mac, _ETH_P_RARP, body)


def arp_announcement(mac: bytes, address: IPv4Address) -> bytes:
    """An ARP announcement: a broadcast request whose sender and target are ``address``."""
    ip = address.packed
    body = _ARP.pack(1, 0x0800, 6, 4, _ARP_REQUEST, mac, ip, bytes(6), ip)
    return _ethernet(_BROADCAST, mac, _ETH_P_ARP, body)


def neighbour_advertisement(mac: bytes, address: IPv6Address) -> bytes:
    """An unsolicited neighbour advertisement to all nodes that overrides what they know."""
    source = address.packed
    option = struct.pack("!BB6s", _TARGET_LINK_LAYER_ADDRESS, 1, mac)
    rest = struct.pack("!I16s", _OVERRIDE, source) + option
    length = 4 + len(rest)
    pseudo = source + _ALL_NODES + struct.pack("!I3xB", length, _ICMPV6)
    blank = struct.pack("!BBH", _NEIGHBOUR_ADVERTISEMENT, 0, 0)
    checksum = _checksum(pseudo + blank + rest)
    icmp = struct.pack("!BBH", _NEIGHBOUR_ADVERTISEMENT, 0, checksum) + rest
    # Hop limit 255: receivers refuse any other (RFC 4861, 7.1.2).
    ip = struct.pack("!IHBB16s16s", 0x60000000, length, _ICMPV6, 255, source, _ALL_NODES)
    return _ethernet(_ALL_NODES_MAC, mac, _ETH_P_IPV6, ip + icmp)


def frames(mac: str, addresses: Iterable[str] = ()) -> list[bytes]:
    """The Ethernet frames of one round.

    :param mac: the guest's address
    :param addresses: its IPv4 and IPv6 addresses, as far as they are known
    :raise ValueError: one of them is not an address
    """
    source = parse_mac(mac)
    result = [rarp(source)]
    for text in addresses:
        address = ip_address(text)
        if isinstance(address, IPv4Address):
            result.append(arp_announcement(source, address))
        else:
            result.append(neighbour_advertisement(source, address))
    return result


def learn(port: str, mac: str) -> None:
    """Tell the bridge that ``port`` belongs to that ``mac`` is behind it now.

    As if it had learnt it: the entry ages, and moves when the guest does.

    :raise InterfaceNotFound: there is no such device
    :raise AnnounceError: it is not a bridge's port, or the kernel refused
    :raise ValueError: ``mac`` is not an address
    """
    source = parse_mac(mac)
    netlink = Netlink()
    try:
        link = remains.require_link(netlink, port)
        netlink.request(messages.learn(link.index, source), f"have the bridge of {port} learn")
    except NetlinkError as err:
        raise AnnounceError(f"The bridge of {port} did not learn {mac}: {err}") from err
    finally:
        netlink.close()


async def announce(
    interface: str,
    mac: str,
    *,
    addresses: Iterable[str] = (),
    port: str = "",
    schedule: Sequence[float] = SCHEDULE,
) -> int:
    """Send announcements, repeated as ``schedule`` says; the first round is sent at once.

    :param interface: where to send: the bridge that the guest is on, or one of its uplinks
    :param mac: the guest's address
    :param addresses: its IP addresses, as far as they are known
    :param port: the guest's vif, for :func:`learn` before the first round; "" to do without
    :param schedule: seconds to wait before each round
    :return: number of frames sent
    :raise InterfaceNotFound: there is no such device
    :raise AnnounceError: the kernel refused to send, e.g. because the device is down
    :raise ValueError: ``mac`` or one of ``addresses`` is not an address
    """
    once = frames(mac, addresses)
    if port:
        learn(port, mac)
    sent = 0
    with _open(interface) as sender:
        for pause in schedule:
            if pause > 0:
                await asyncio.sleep(pause)
            for frame in once:
                try:
                    sender.send(frame)
                except OSError as err:
                    raise AnnounceError(
                        f"An announcement of {mac} could not be sent by {interface}: {err.strerror}"
                    ) from err
                sent += 1
    return sent


def _open(interface: str) -> socket.socket:
    try:
        sender = packets.unbound()
    except PermissionError:
        raise AnnounceError(f"Announcing by {interface} needs CAP_NET_RAW") from None
    try:
        sender.bind((interface, packets.NO_KIND))
    except OSError as err:
        sender.close()
        if err.errno == errno.ENODEV:
            raise InterfaceNotFound(interface) from None
        raise AnnounceError(f"Nothing can be sent by {interface}: {err.strerror}") from err
    return sender


def _ethernet(destination: bytes, source: bytes, kind: int, payload: bytes) -> bytes:
    frame = destination + source + struct.pack("!H", kind) + payload
    return frame.ljust(_MIN_FRAME, b"\0")


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
