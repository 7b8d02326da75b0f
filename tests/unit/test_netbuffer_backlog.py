# SPDX-License-Identifier: Apache-2.0
"""What passes a bridge on its way to a guest, in a network of the test's own."""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from netbuffer.backlog import LIMIT, Backlog
from netbuffer.errors import BacklogError, InterfaceNotFound
from tests.unit.netbuffer_netns import add_link, own_network

_MAC = "00:16:3e:00:00:10"
_GUEST = bytes.fromhex("00163e000010")
_OTHER = bytes.fromhex("00163e000011")
_CLIENT = bytes.fromhex("00163e0000ff")
_PATIENCE = 20.0
_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
#: linux/virtio_net.h: VIRTIO_NET_HDR_F_NEEDS_CSUM, no segmentation, begins at 34, goes to 34 + 16.
_LACKS_CHECKSUM = struct.pack("=BBHHHH", 1, 0, 0, 0, 34, 16)
_PLAIN = bytes(10)


def frame(number: int, to: bytes = _GUEST, size: int = 60) -> bytes:
    """With its number behind what an IPv4 and TCP header would take.

    Of a type for experiments: netfilter, where it looks at bridges, drops what is no proper IPv4.
    """
    return (to + _CLIENT + b"\x88\xb5" + bytes(40) + struct.pack("!I", number)).ljust(size, b"\0")


def segments(count: int, size: int) -> bytes:
    """One frame that the kernel has made of several segments of TCP."""
    address = bytes([10, 0, 0, 1])
    ip = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, 40 + count * size, 0, 0x4000, 64, 6, 0))
    ip += address + address
    total = sum(struct.unpack("!10H", ip))
    ip[10:12] = struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF)
    tcp = struct.pack("!HHIIHHHH", 1, 1, 0, 0, 0x5010, 1, 0, 0)
    return _GUEST + _CLIENT + b"\x08\0" + ip + tcp + bytes(count * size)


@contextmanager
def end_of(device: str, kind: int = 0x0003) -> Iterator[socket.socket]:
    """A packet socket with headers."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as opened:
        opened.settimeout(_PATIENCE)
        opened.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        opened.bind((device, kind))
        yield opened


def number_of(received: bytes) -> int:
    number: int = struct.unpack_from("!I", received, 10 + 54)[0]
    return number


def carrier(far_end: str, state: str) -> None:
    """The other end of a veth pair has a carrier while this one is up."""
    subprocess.run(["ip", "link", "set", far_end, state], check=True)


def make_network() -> None:
    """A bridge with an uplink, whose far end is ``client``; and a vif that is no port of it."""
    add_link("br0", "bridge")
    add_link("up0", "veth", peer="client", master="br0")
    add_link("vif0", "veth", peer="guest0")


@own_network
def test_what_was_sent_meanwhile_is_delivered_in_order() -> None:
    make_network()
    with end_of("client", 0) as client, end_of("guest0") as guest:
        client.send(_PLAIN + frame(1))
        backlog = Backlog("br0", _MAC)
        client.send(_PLAIN + frame(2))
        client.send(_PLAIN + frame(3, to=_OTHER))
        client.send(_PLAIN + frame(4, to=b"\xff" * 6))
        client.send(_LACKS_CHECKSUM + frame(5, size=1514))
        assert backlog.deliver("vif0") == 2
        first, second = guest.recv(2000), guest.recv(2000)
        assert [number_of(first), number_of(second)] == [2, 5]
        assert first[:1] == b"\0"
        assert second[:10] == _LACKS_CHECKSUM, "its checksum would be taken for one that is wrong"
        assert len(second) == 10 + 1514


@own_network
def test_a_device_that_gets_its_carrier_late_is_waited_for() -> None:
    """As a vif does, when its guest's ring has been seen to have room."""
    make_network()
    with end_of("client", 0) as client, end_of("guest0") as guest:
        carrier("guest0", "down")
        # The socket is told, and sees frames again once its device is up.
        assert guest.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ENETDOWN
        backlog = Backlog("br0", _MAC)
        client.send(_PLAIN + frame(1))
        later = threading.Timer(0.1, carrier, ("guest0", "up"))
        later.start()
        assert backlog.deliver("vif0") == 1
        later.join()
        assert number_of(guest.recv(2000)) == 1


@own_network
def test_a_frame_of_many_is_delivered_whole() -> None:
    """As the kernel makes one of those that come right after one another."""
    make_network()
    with end_of("client", 0) as client, end_of("guest0") as guest:
        backlog = Backlog("br0", _MAC)
        # VIRTIO_NET_HDR_GSO_TCPV4; 54 bytes of headers, segments of 1448.
        header = struct.pack("=BBHHHH", 1, 1, 54, 1448, 34, 16)
        contents = segments(10, 1448)
        client.send(header + contents)
        assert backlog.deliver("vif0") == 1
        received = guest.recv(1 << 17)
        assert len(received) == 10 + len(contents)
        assert received[1] == 1
        assert struct.unpack_from("=H", received, 4) == (1448,)


@own_network
def test_a_flood_takes_bounded_memory() -> None:
    make_network()
    with end_of("client", 0) as client:
        backlog = Backlog("br0", _MAC)
        for number in range(5000):
            client.send(_PLAIN + frame(number, size=1514))
        assert 10 <= backlog.deliver("vif0") <= LIMIT * 2 // 1514


@own_network
def test_the_bridge_sees_all_frames_only_meanwhile() -> None:
    make_network()

    def promiscuous() -> bool:
        said = subprocess.run(
            ["ip", "-d", "link", "show", "br0"], check=True, capture_output=True, text=True
        ).stdout
        return " promiscuity 1 " in said

    backlog = Backlog("br0", _MAC)
    assert promiscuous()
    backlog.close()
    backlog.close()
    assert not promiscuous()
    Backlog("br0", _MAC).deliver("vif0")
    assert not promiscuous()


@own_network
def test_a_device_that_cannot_take_them_is_an_error() -> None:
    make_network()
    with end_of("client", 0) as client:
        backlog = Backlog("br0", _MAC)
        client.send(_PLAIN + frame(1))
        subprocess.run(["ip", "link", "set", "vif0", "down"], check=True)
        with pytest.raises(
            BacklogError,
            match="Frames that were kept for vif0 could not be delivered: Network is down",
        ):
            backlog.deliver("vif0")
        with pytest.raises(InterfaceNotFound, match="Network device vif7 does not exist"):
            Backlog("br0", _MAC).deliver("vif7")


@own_network
def test_a_bridge_that_was_down_for_a_moment_loses_nothing_else() -> None:
    make_network()
    with end_of("client", 0) as client:
        backlog = Backlog("br0", _MAC)
        client.send(_PLAIN + frame(1))
        subprocess.run(["ip", "link", "set", "br0", "down"], check=True)
        subprocess.run(["ip", "link", "set", "br0", "up"], check=True)
        assert backlog.deliver("vif0") == 1


@own_network
def test_no_such_bridge() -> None:
    with pytest.raises(InterfaceNotFound, match="Network device br7 does not exist"):
        Backlog("br7", _MAC)


@own_network
def test_not_an_address() -> None:
    with pytest.raises(ValueError, match="00:16:3e"):
        Backlog("br7", "00:16:3e:00:00")
