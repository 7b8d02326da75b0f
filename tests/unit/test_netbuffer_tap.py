# SPDX-License-Identifier: Apache-2.0
"""The tap on a veth pair: guest0 is the guest's end, vif0 is Dom0's."""

from __future__ import annotations

import asyncio
import errno
import select
import socket
import subprocess

import pytest

from netbuffer.errors import InterfaceNotFound, TapError
from netbuffer.tap import Tap
from tests.unit.netbuffer_netns import add_link, own_network

_PATIENCE_MS = 20_000
_KINDS = {
    "ipv4": "0800",
    "ipv6": "86dd",
    "arp": "0806",
    "vlan": "810000050800",
    "junk": "88b5",
    "llc": "000342",
}


def frame(kind: str = "0800", size: int = 60) -> bytes:
    return (b"\xff" * 6 + b"\x02\0\0\0\0\x01" + bytes.fromhex(kind)).ljust(size, b"\0")


def sender(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.bind((name, 0))
    return sock


def readable(tap: Tap, milliseconds: int = 0) -> bool:
    poll = select.poll()
    poll.register(tap.fileno(), select.POLLIN)
    return bool(poll.poll(milliseconds))


@own_network
def test_every_kind_of_frame_from_the_guest_is_an_event() -> None:
    add_link("vif0", "veth", peer="guest0")
    with Tap("vif0") as tap, sender("guest0") as guest:
        assert not readable(tap)
        assert tap.drain() == 0
        for name, kind in _KINDS.items():
            guest.send(frame(kind))
            assert readable(tap, _PATIENCE_MS), name
            assert tap.drain() == 1, name
            assert not readable(tap), name


@own_network
def test_frames_to_the_guest_are_no_events() -> None:
    add_link("vif0", "veth", peer="guest0")
    with Tap("vif0") as tap, sender("vif0") as host, sender("guest0") as guest:
        host.send(frame())
        guest.send(frame())
        assert readable(tap, _PATIENCE_MS)
        assert tap.drain() == 1, "also saw the frame that went to the guest"


@own_network
def test_frames_of_other_devices_are_no_events() -> None:
    add_link("vif0", "veth", peer="guest0")
    add_link("vif1", "veth", peer="guest1")
    with Tap("vif0") as tap, sender("guest1") as other, sender("guest0") as guest:
        other.send(frame())
        guest.send(frame())
        assert readable(tap, _PATIENCE_MS)
        assert tap.drain() == 1, "also saw a frame of another device"


@own_network
def test_a_flood_does_not_fill_memory_and_is_drained_in_one_call() -> None:
    add_link("vif0", "veth", peer="guest0")
    with Tap("vif0") as tap, sender("guest0") as guest:
        for _ in range(2000):
            guest.send(frame(size=1514))
        assert readable(tap, _PATIENCE_MS)
        assert 1 <= tap.drain() <= 16, "the receive buffer is not as small as can be"
        assert tap.drain() == 0
        guest.send(frame())
        assert readable(tap, _PATIENCE_MS), "blind after a flood"


@own_network
def test_an_event_loop_is_woken() -> None:
    add_link("vif0", "veth", peer="guest0")

    async def wait_for_frame(tap: Tap, guest: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        seen: asyncio.Future[int] = loop.create_future()

        def on_frame() -> None:
            loop.remove_reader(tap.fileno())
            seen.set_result(tap.drain())

        loop.add_reader(tap.fileno(), on_frame)
        guest.send(frame())
        return await asyncio.wait_for(seen, _PATIENCE_MS / 1000)

    with Tap("vif0") as tap, sender("guest0") as guest:
        assert asyncio.run(wait_for_frame(tap, guest)) == 1


@own_network
def test_a_device_that_goes_away_is_an_error_and_not_silence() -> None:
    add_link("vif0", "veth", peer="guest0")
    with Tap("vif0") as tap:
        subprocess.run(["ip", "link", "del", "vif0"], check=True)
        assert readable(tap, _PATIENCE_MS)
        with pytest.raises(TapError, match="Frames on vif0 are no longer seen: Network is down"):
            tap.drain()


@own_network
def test_no_such_device() -> None:
    with pytest.raises(InterfaceNotFound, match="Network device vif0 does not exist"):
        Tap("vif0")


@own_network
def test_close_is_idempotent() -> None:
    add_link("vif0", "veth", peer="guest0")
    tap = Tap("vif0")
    tap.close()
    tap.close()
    assert tap.fileno() == -1


def test_without_privileges_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> socket.socket:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(TapError, match="A packet socket on vif0 needs CAP_NET_RAW"):
        Tap("vif0")
