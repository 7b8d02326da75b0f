# SPDX-License-Identifier: Apache-2.0
"""Announcements: their bytes, and what a bridge makes of them."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import struct
import subprocess
import time
from ipaddress import IPv4Address, IPv6Address

import pytest

from netbuffer.announce import (
    SCHEDULE,
    announce,
    arp_announcement,
    frames,
    learn,
    neighbour_advertisement,
    parse_mac,
    rarp,
)
from netbuffer.errors import AnnounceError, InterfaceNotFound
from tests.unit.netbuffer_netns import add_link, own_network

_MAC = "00:16:3e:00:00:10"
_RAW = bytes.fromhex("00163e000010")
_PATIENCE = 20.0


def test_rarp() -> None:
    assert rarp(_RAW) == bytes.fromhex(
        "ffffffffffff 00163e000010 8035 0001 0800 06 04 0003"
        "00163e000010 00000000 00163e000010 00000000"
    ).ljust(60, b"\0")


def test_arp_announcement() -> None:
    assert arp_announcement(_RAW, IPv4Address("10.77.0.10")) == bytes.fromhex(
        "ffffffffffff 00163e000010 0806 0001 0800 06 04 0001"
        "00163e000010 0a4d000a 000000000000 0a4d000a"
    ).ljust(60, b"\0")


def test_neighbour_advertisement() -> None:
    address = IPv6Address("fd00::10")
    frame = neighbour_advertisement(_RAW, address)
    assert frame[:14] == bytes.fromhex("333300000001 00163e000010 86dd")
    first, length, after, hops = struct.unpack_from("!IHBB", frame, 14)
    assert (first, length, after, hops) == (6 << 28, 32, 58, 255)
    source, destination, icmp = frame[22:38], frame[38:54], frame[54:]
    assert source == address.packed
    assert destination == IPv6Address("ff02::1").packed
    assert icmp[:2] == b"\x88\0"
    # Override, neither solicited nor from a router; target; its link-layer address.
    assert icmp[4:] == bytes.fromhex("20000000") + address.packed + b"\x02\x01" + _RAW
    words = struct.unpack("!36H", source + destination + bytes([0, 0, 0, 32, 0, 0, 0, 58]) + icmp)
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert total == 0xFFFF, "wrong checksum"


def test_one_round() -> None:
    made = frames(_MAC, ["10.77.0.10", "fd00::10"])
    assert made == [
        rarp(_RAW),
        arp_announcement(_RAW, IPv4Address("10.77.0.10")),
        neighbour_advertisement(_RAW, IPv6Address("fd00::10")),
    ]
    assert frames(_MAC) == [rarp(_RAW)]


@pytest.mark.parametrize(
    "mac",
    ["", "00:16:3e:00:00", "00:16:3e:00:00:1", "00:16:3e:00:00:zz", "01:00:5e:00:00:01",
     "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "00-16-3e-00-00-10", "0:016:3e:00:00:10"],
)  # fmt: skip
def test_what_is_no_unicast_address(mac: str) -> None:
    with pytest.raises(ValueError, match="is not a unicast MAC address"):
        parse_mac(mac)


def test_what_is_no_ip_address() -> None:
    with pytest.raises(ValueError, match=r"10\.77\.0"):
        frames(_MAC, ["10.77.0"])


def receive(sock: socket.socket, count: int) -> list[bytes]:
    """The next frames from the guest's address; the host's own devices send some, too."""
    found: list[bytes] = []
    end = time.monotonic() + _PATIENCE
    while len(found) < count and select.select([sock], [], [], max(0, end - time.monotonic()))[0]:
        frame = sock.recv(2048)
        if frame[6:12] == _RAW:
            found.append(frame)
    return found


def listener(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.bind((name, 3))
    return sock


def bridge_entry(mac: str) -> str:
    """Port behind which the bridge believes an address to be; "" when it does not know."""
    listed = subprocess.run(
        ["bridge", "-json", "fdb", "show", "br", "br0"], check=True, capture_output=True
    )
    for entry in json.loads(listed.stdout):
        if entry["mac"] == mac and "permanent" not in entry.get("state", ""):
            port: str = entry["ifname"]
            return port
    return ""


def await_forwarding(*ports: str) -> None:
    """Wait until a bridge carries frames from and to its ports: it drops what comes before."""
    end = time.monotonic() + _PATIENCE
    forwarding: set[str] = set()
    while not set(ports) <= forwarding:
        assert time.monotonic() < end, f"only {forwarding} forward within {_PATIENCE} s"
        listed = subprocess.run(["bridge", "-json", "link"], check=True, capture_output=True)
        forwarding = {
            port["ifname"] for port in json.loads(listed.stdout) if port["state"] == "forwarding"
        }


@own_network
def test_a_switch_outside_gets_every_round() -> None:
    add_link("br0", "bridge")
    add_link("port0", "veth", peer="outside0", master="br0")
    await_forwarding("port0")
    with listener("outside0") as outside:
        before = time.monotonic()
        sent = asyncio.run(announce("br0", _MAC, addresses=["10.77.0.10", "fd00::10"]))
        took = time.monotonic() - before
        assert sent == 15
        assert receive(outside, 15) == frames(_MAC, ["10.77.0.10", "fd00::10"]) * 5
    assert took >= sum(SCHEDULE)


@own_network
def test_the_first_round_waits_for_nothing() -> None:
    add_link("br0", "bridge")
    add_link("port0", "veth", peer="outside0", master="br0")
    await_forwarding("port0")

    async def first_round() -> list[bytes]:
        task = asyncio.create_task(announce("br0", _MAC, schedule=(0.0, 1000.0)))
        await asyncio.sleep(0)
        got = receive(outside, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return got

    with listener("outside0") as outside:
        assert asyncio.run(first_round()) == [rarp(_RAW)]


@own_network
def test_the_own_bridge_learns_where_the_guest_is() -> None:
    add_link("br0", "bridge")
    add_link("port0", "veth", peer="outside0", master="br0")
    add_link("vif0", "veth", peer="guest0", master="br0")
    await_forwarding("port0", "vif0")
    with listener("outside0") as outside, listener("guest0") as guest:
        outside.send(rarp(_RAW))  # the guest was seen outside, on its old host
        assert receive(guest, 1) == [rarp(_RAW)]
        assert bridge_entry(_MAC) == "port0"
        asyncio.run(announce("br0", _MAC, port="vif0", schedule=(0.0,)))
        assert bridge_entry(_MAC) == "vif0"
        # And it is no fixed entry: the guest can move on.
        outside.send(rarp(_RAW))
        end = time.monotonic() + _PATIENCE
        while bridge_entry(_MAC) != "port0" and time.monotonic() < end:
            time.sleep(0.01)
        assert bridge_entry(_MAC) == "port0"


@own_network
def test_errors_are_one_sentence() -> None:
    with pytest.raises(InterfaceNotFound, match="Network device br0 does not exist"):
        asyncio.run(announce("br0", _MAC))
    with pytest.raises(InterfaceNotFound, match="Network device vif0 does not exist"):
        learn("vif0", _MAC)
    add_link("vif0", "veth", peer="guest0")
    with pytest.raises(AnnounceError, match=f"The bridge of vif0 did not learn {_MAC}: "):
        learn("vif0", _MAC)
    subprocess.run(["ip", "link", "set", "vif0", "down"], check=True)
    with pytest.raises(AnnounceError, match=f"An announcement of {_MAC} could not be sent by vif0"):
        asyncio.run(announce("vif0", _MAC))
