# SPDX-License-Identifier: Apache-2.0
"""The little network in which the output buffer is tried, in a Dom0 or on any Linux with its parts.

::

    guest0 ===== vif0 ---- bridge br0 ---- port0 ===== outside0        (===== is a veth pair)

"The guest" sends raw frames by guest0, "the world" looks at outside0.  Each frame carries its
number in its source address, so that even a frame without any content can be recognised.
"""

from __future__ import annotations

import ctypes
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from netbuffer import plug
from netbuffer.plug import OutputBuffer

_CLONE_NEWNET = 0x40000000
_ETH_P_ALL = 3
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_SOL_PACKET = 263
_PACKET_AUXDATA = 8
_PACKET_IGNORE_OUTGOING = 23
_TP_STATUS_VLAN_VALID = 1 << 4
_MARK = b"\x02\x4b\x4d\x49"  # first four bytes of every source address
PATIENCE = 20.0  # seconds that a frame may take: emulated machines are slow
QUIET = 0.3  # seconds of silence that show that a frame is held


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def unshare_network() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")


def make_world() -> None:
    for scope in ("all", "default"):
        path = Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6")
        if path.exists():
            path.write_text("1")
    run("ip", "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
    for inner, outer in (("vif0", "guest0"), ("port0", "outside0")):
        run("ip", "link", "add", inner, "type", "veth", "peer", "name", outer)
        run("ip", "link", "set", inner, "master", "br0")
    for name in ("lo", "br0", "vif0", "guest0", "port0", "outside0"):
        run("ip", "link", "set", name, "up")


def packet_socket(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 16 << 20)
    # A frame that is held still counts as unsent to the socket that sent it.
    sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 16 << 20)
    sock.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
    sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    sock.bind((name, _ETH_P_ALL))
    return sock


def frame(number: int, kind: str = "ipv4", size: int = 60) -> bytes:
    """A broadcast Ethernet frame that is recognised by its source address."""
    source = _MARK + struct.pack("!H", number)
    payload = {
        "ipv4": b"\x08\x00" + bytes.fromhex("450000200000000040110000c0000201c000020a") + bytes(12),
        "ipv6": b"\x86\xdd" + bytes.fromhex("6000000000083b40") + bytes(40),
        "arp": b"\x08\x06" + bytes.fromhex("0001080006040001") + bytes(20),
        "vlan": b"\x81\x00\x00\x05\x08\x00" + bytes(46),
        "qinq": b"\x88\xa8\x00\x06\x81\x00\x00\x05\x08\x00" + bytes(42),
        "junk": b"\x88\xb5" + b"?" * 46,
        "llc": b"\x00\x03\x42\x42\x03" + bytes(43),
        "empty": b"\x88\xb6",
    }[kind]
    whole = b"\xff" * 6 + source + payload
    return whole if kind == "empty" else whole.ljust(size, b"\0")


KINDS = ("ipv4", "ipv6", "arp", "vlan", "qinq", "junk", "llc", "empty")


class World:
    """Both ends, and what came out."""

    def __init__(self) -> None:
        self.guest = packet_socket("guest0")
        self.outside = packet_socket("outside0")

    def close(self) -> None:
        self.guest.close()
        self.outside.close()

    def send(self, first: int, last: int, kind: str = "ipv4", size: int = 60) -> list[int]:
        for number in range(first, last + 1):
            self.guest.send(frame(number, kind, size))
        return list(range(first, last + 1))

    def await_frames(self, count: int, where: socket.socket | None = None) -> list[int]:
        """Numbers of the next ``count`` frames."""
        return [number for number, _content in self.await_contents(count, where)]

    def await_contents(
        self, count: int, where: socket.socket | None = None
    ) -> list[tuple[int, bytes]]:
        """(number, type and payload) of the next ``count`` frames, as they were on the wire."""
        found: list[tuple[int, bytes]] = []
        end = time.monotonic() + PATIENCE
        while len(found) < count:
            got = _receive(where or self.outside, max(0.0, end - time.monotonic()))
            if got is None:
                break
            found.append(got)
        return found

    def silence(self, where: socket.socket | None = None) -> bool:
        """Whether nothing comes out for a while."""
        return _receive(where or self.outside, QUIET) is None


def _receive(sock: socket.socket, seconds: float) -> tuple[int, bytes] | None:
    end = time.monotonic() + seconds
    while select.select([sock], [], [], max(0.0, end - time.monotonic()))[0]:
        data, control, _flags, _address = sock.recvmsg(65536, 256)
        if data[6:10] != _MARK:
            continue
        content = data[12:]
        for level, kind, value in control:
            if level == _SOL_PACKET and kind == _PACKET_AUXDATA:
                status, _l, _s, _m, _n, tci, tpid = struct.unpack_from("=IIIHHHH", value)
                if status & _TP_STATUS_VLAN_VALID:
                    content = struct.pack("!HH", tpid, tci) + content
        return struct.unpack("!H", data[10:12])[0], content
    return None


@contextmanager
def buffer(**options: Any) -> Iterator[OutputBuffer]:
    made = OutputBuffer("vif0", **options)
    made.setup()
    try:
        yield made
    finally:
        made.teardown(release=False)


def nothing_left() -> list[str]:
    """What the kernel still has of any buffer, asked of ``ip`` and ``tc``; [] when nothing."""
    found = [f"{r}" for r in plug.leftovers()]
    for line in run("ip", "-o", "link").splitlines():
        if " kmi" in line:
            found.append(line)
    found += [line for line in run("tc", "qdisc").splitlines() if "ingress" in line]
    found += run("tc", "filter", "show", "dev", "vif0", "ingress").splitlines()
    return found


def await_held(made: OutputBuffer, count: int) -> None:
    end = time.monotonic() + PATIENCE
    while made.stats().held_packets < count:
        assert time.monotonic() < end, made.stats()
        time.sleep(0.002)
