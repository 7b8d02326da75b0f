# SPDX-License-Identifier: Apache-2.0
"""What the output buffer must do on a real kernel; a program for a Dom0, run as root.

::

    guest0 ===== vif0 ---- bridge br0 ---- port0 ===== outside0        (===== is a veth pair)

Each check has a process and a network namespace of its own, so the host notices nothing.  "The
guest" sends raw frames by guest0, "the world" looks at outside0.  Each frame carries its number
in its source address, so that even a frame without any content can be recognised.

Prints one line of JSON for each check, {"check": NAME, "ok": true|false, ...}, and exits with 1 if
one failed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from netbuffer import messages, plug
from netbuffer.epochs import State
from netbuffer.errors import BufferLost, EpochError, InterfaceBusy, InterfaceNotFound, Leftover
from netbuffer.netlink import Netlink
from netbuffer.plug import OutputBuffer
from netbuffer.tap import Tap

_CLONE_NEWNET = 0x40000000
_ETH_P_ALL = 3
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_SOL_PACKET = 263
_PACKET_AUXDATA = 8
_PACKET_IGNORE_OUTGOING = 23
_TP_STATUS_VLAN_VALID = 1 << 4
_MARK = b"\x02\x4b\x4d\x49"  # first four bytes of every source address
_PATIENCE = 20.0  # seconds that a frame may take: emulated machines are slow
_CHECK_SECONDS = 150  # that a check may take before it is taken for hung
_QUIET = 0.3  # seconds of silence that show that a frame is held


# ---- The little world ----


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
        end = time.monotonic() + _PATIENCE
        while len(found) < count:
            got = _receive(where or self.outside, max(0.0, end - time.monotonic()))
            if got is None:
                break
            found.append(got)
        return found

    def silence(self, where: socket.socket | None = None) -> bool:
        """Whether nothing comes out for a while."""
        return _receive(where or self.outside, _QUIET) is None


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
    end = time.monotonic() + _PATIENCE
    while made.stats().held_packets < count:
        assert time.monotonic() < end, made.stats()
        time.sleep(0.002)


# ---- Checks ----


def check_every_kind_is_held_and_leaves_unchanged(world: World) -> dict[str, Any]:
    with buffer() as made:
        for number, kind in enumerate(KINDS, 1):
            world.guest.send(frame(number, kind))
        await_held(made, len(KINDS))
        assert world.silence(), "a frame came out before its release"
        assert made.stats().held_packets == len(KINDS), made.stats()
        made.close_epoch()
        assert world.silence(), "a frame came out when its epoch was closed"
        made.release_epoch()
        out = world.await_contents(len(KINDS))
        assert [number for number, _ in out] == list(range(1, len(KINDS) + 1)), out
        for (number, content), kind in zip(out, KINDS, strict=True):
            assert content == frame(number, kind)[12:], (kind, content)
        assert made.stats().held_packets == 0
    return {"kinds": len(KINDS)}


def check_only_the_closed_epoch_is_released(world: World) -> dict[str, Any]:
    with buffer() as made:
        first = world.send(1, 5)
        await_held(made, 5)
        assert made.close_epoch() == 1
        second = world.send(6, 9)
        await_held(made, 9)
        made.release_epoch()
        assert world.await_frames(5) == first
        assert world.silence(), "a frame of the epoch that fills came out"
        assert made.close_epoch() == 2
        third = world.send(10, 12)
        await_held(made, 7)
        try:
            made.close_epoch()
        except EpochError:
            pass
        else:
            raise AssertionError("a second epoch was closed before the first was released")
        made.release_epoch()
        assert world.await_frames(4) == second
        made.close_epoch()
        made.release_epoch()
        assert world.await_frames(3) == third
        made.close_epoch()
        made.release_epoch()
        assert world.silence(), "an empty epoch released something"
    return {}


def check_many_frames_keep_their_order(world: World) -> dict[str, Any]:
    with buffer() as made:
        sent = []
        out: list[int] = []
        for epoch in range(3):
            sent += world.send(1000 * epoch + 1, 1000 * epoch + 800, size=1514)
            await_held(made, 800)
            made.close_epoch()
            made.release_epoch()
            out += world.await_frames(800)
        assert out == sent, (len(out), len(sent))
    return {"frames": len(sent)}


def check_inbound_is_not_delayed(world: World) -> dict[str, Any]:
    with buffer() as made:
        world.send(1, 3)
        await_held(made, 3)
        took = []
        for number in range(100, 150):
            begin = time.perf_counter()
            world.outside.send(frame(number))
            assert world.await_frames(1, world.guest) == [number]
            took.append(time.perf_counter() - begin)
        assert made.stats().held_packets == 3
    return {"inbound_us_p50": round(statistics.median(took) * 1e6)}


def check_tap_sees_each_held_frame_once(world: World) -> dict[str, Any]:
    with Tap("vif0") as tap, packet_socket("vif0") as witness, buffer() as made:
        poll = select.poll()
        poll.register(tap.fileno(), select.POLLIN)
        assert not poll.poll(0)
        assert tap.drain() == 0
        world.send(1, 1)
        assert poll.poll(_PATIENCE * 1000), "the tap did not see a held frame"
        assert tap.drain() == 1
        assert tap.drain() == 0
        assert not poll.poll(0)
        await_held(made, 1)
        world.send(2, 300)
        await_held(made, 300)
        assert 1 <= tap.drain() <= 64, "the tap's buffer is not small"
        while tap.drain():
            pass
        assert world.await_frames(300, witness) == list(range(1, 301))
        made.close_epoch()
        made.release_epoch()
        assert world.await_frames(300) == list(range(1, 301))
        assert tap.drain() == 0, "the tap saw a frame again on its release"
        assert world.silence(witness), "a packet socket saw a frame again on its release"
        world.outside.send(frame(301))
        assert world.await_frames(1, world.guest) == [301]
        assert tap.drain() == 0, "the tap saw a frame to the guest"
    return {}


def check_teardown_releases_in_order_and_leaves_nothing(world: World) -> dict[str, Any]:
    made = OutputBuffer("vif0")
    made.setup()
    sent = world.send(1, 20)
    await_held(made, 20)
    made.close_epoch()
    sent += world.send(21, 40)
    await_held(made, 40)
    begin = time.perf_counter()
    removal = made.teardown()
    took = time.perf_counter() - begin
    sent += world.send(41, 45)
    assert world.await_frames(45) == sent
    assert (removal.found, removal.released_packets, removal.dropped_packets) == (True, 40, 0)
    assert made.state is State.DOWN
    assert not made.teardown().found
    assert not nothing_left(), nothing_left()
    return {"teardown_ms": round(took * 1e3, 1)}


def check_teardown_without_release_drops(world: World) -> dict[str, Any]:
    made = OutputBuffer("vif0")
    made.setup()
    world.send(1, 10)
    await_held(made, 10)
    made.close_epoch()
    removal = made.teardown(release=False)
    assert (removal.released_packets, removal.dropped_packets) == (0, 10), removal
    assert world.silence(), "a dropped frame came out"
    assert not nothing_left(), nothing_left()
    world.send(11, 12)
    assert world.await_frames(2) == [11, 12]
    return {}


def check_release_all_and_hold(world: World) -> dict[str, Any]:
    with buffer() as made:
        sent = world.send(1, 3)
        await_held(made, 3)
        made.close_epoch()
        sent += world.send(4, 6)
        await_held(made, 6)
        made.release_all()
        sent += world.send(7, 9)
        assert world.await_frames(9) == sent
        made.hold()
        assert made.state is State.HOLDING
        assert made.closed_epoch == 1
        world.send(10, 11)
        await_held(made, 2)
        assert world.silence(), "a frame came out after hold()"
        made.close_epoch()
        made.release_epoch()
        assert world.await_frames(2) == [10, 11]
    return {}


_FLOOD = """
import socket, sys
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
sock.setsockopt(socket.SOL_SOCKET, 32, 16 << 20)
sock.bind(("guest0", 0))
frame = bytes.fromhex(sys.argv[1])
print("flooding", flush=True)
while True:
    try:
        sock.send(frame)
    except OSError:
        pass
"""


def check_hold_under_a_flood_strands_nothing(world: World) -> dict[str, Any]:
    with buffer() as made:
        made.release_all()
        flood = subprocess.Popen(
            [sys.executable, "-c", _FLOOD, frame(9).hex()], stdout=subprocess.PIPE
        )
        try:
            assert flood.stdout is not None
            assert flood.stdout.readline()
            for _ in range(5):
                made.hold()
                await_held(made, 1)
                made.close_epoch()
                made.release_epoch()
                made.release_all()
            made.hold()
            await_held(made, 1)
        finally:
            flood.kill()
            flood.wait()
        # Whatever is held now was counted: one epoch takes it all out.
        time.sleep(_QUIET)
        before = made.stats().held_packets
        made.close_epoch()
        made.release_epoch()
        end = time.monotonic() + _PATIENCE
        while made.stats().held_packets and time.monotonic() < end:
            time.sleep(0.01)
        assert made.stats().held_packets == 0, made.stats()
        while not world.silence():
            pass
    return {"held_at_the_end": before}


def check_overflow_is_counted(world: World) -> dict[str, Any]:
    with buffer(limit_bytes=10 * 1000, high_water=5000) as made:
        assert not made.above_high_water(made.stats())
        world.send(1, 15, size=1000)
        end = time.monotonic() + _PATIENCE
        while made.stats().dropped_packets < 5 and time.monotonic() < end:
            time.sleep(0.002)
        stats = made.stats()
        assert (stats.held_packets, stats.held_bytes, stats.dropped_packets) == (10, 10_000, 5)
        assert made.above_high_water(stats)
        made.close_epoch()
        made.release_epoch()
        assert world.await_frames(10) == list(range(1, 11))
        world.send(16, 17)
        await_held(made, 2)
    return {}


def check_others_ingress_is_respected(world: World) -> dict[str, Any]:
    for kind in ("ingress", "clsact"):
        run("tc", "qdisc", "add", "dev", "vif0", kind)
        made = OutputBuffer("vif0")
        made.setup()
        world.send(1, 2)
        await_held(made, 2)
        made.teardown()
        assert world.await_frames(2) == [1, 2]
        assert kind in run("tc", "qdisc", "show", "dev", "vif0"), "somebody's qdisc was removed"
        run("tc", "filter", "add", "dev", "vif0", "ingress", "matchall", "action", "ok")
        try:
            OutputBuffer("vif0").setup()
        except InterfaceBusy:
            pass
        else:
            raise AssertionError("set up beside somebody's filter")
        assert not plug.leftovers()
        assert not plug.reclaim("vif0", release=True).found
        assert "matchall" in run("tc", "filter", "show", "dev", "vif0", "ingress")
        run("tc", "qdisc", "del", "dev", "vif0", kind)
    return {}


def check_errors(world: World) -> dict[str, Any]:
    del world
    try:
        OutputBuffer("vif77.0").setup()
    except InterfaceNotFound:
        pass
    else:
        raise AssertionError("set up for a device that does not exist")
    with buffer() as made:
        try:
            OutputBuffer("vif0").setup()
        except Leftover:
            pass
        else:
            raise AssertionError("set up twice")
        run("tc", "qdisc", "del", "dev", made.ifb, "root")
        try:
            made.close_epoch()
        except BufferLost:
            pass
        else:
            raise AssertionError("did not notice that the plug was removed")
        assert made.state is State.HOLDING, made.state
        run("ip", "link", "del", made.ifb)
        try:
            made.close_epoch()
        except BufferLost:
            pass
        else:
            raise AssertionError("did not notice that the ifb was removed")
    assert not nothing_left(), nothing_left()
    return {}


def fork_holder(phase: str, fatal: int) -> int:
    """Exit status, as of ``os.waitpid``, of a process that sets a buffer up and takes it down.

    :param phase: "hold": dies by SIGKILL in between; "setup", "release", "drop": dies by SIGKILL
        before the request number ``fatal`` of setting up or of taking down with or without
        release, if it makes so many
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        requests = 0
        real = Netlink.request

        def request(netlink: Netlink, message: bytearray, purpose: str) -> None:
            nonlocal requests
            requests += armed
            if requests == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            real(netlink, message, purpose)

        mock.patch.object(Netlink, "request", request).start()
        armed = phase == "setup"
        made = OutputBuffer("vif0")
        made.setup()
        if phase == "hold":
            os.kill(os.getpid(), signal.SIGKILL)
        armed = phase != "setup"
        made.teardown(release=phase != "drop")
        os._exit(0)
    except BaseException:  # noqa: BLE001 - the child of a fork must not return
        traceback.print_exc()
        os._exit(1)


def check_killed_holder_can_be_reclaimed(world: World) -> dict[str, Any]:
    for release in (True, False):
        assert fork_holder("hold", -1) == signal.SIGKILL
        sent = world.send(1, 7)
        assert world.silence(), "a frame came out when the holder was killed"
        (left,) = plug.leftovers()
        assert (left.vif, left.filtered, left.held_packets) == ("vif0", True, 7), left
        removal = plug.reclaim("vif0", release=release)
        assert removal.found
        if release:
            assert world.await_frames(7) == sent
            assert removal.released_packets == 7
        else:
            assert world.silence()
            assert removal.dropped_packets == 7
        assert not nothing_left(), nothing_left()
        assert not plug.reclaim("vif0", release=release).found
    return {}


def check_killed_at_every_step(world: World) -> dict[str, Any]:
    """Setting up and taking down, each killed before its first, second, ... request."""
    steps = {}
    for phase in ("setup", "release", "drop"):
        fatal = 0
        status = signal.SIGKILL.value
        while status != 0:
            fatal += 1
            status = fork_holder(phase, fatal)
            assert status in (0, signal.SIGKILL), status
            found = plug.leftovers()
            removal = plug.reclaim("vif0", release=True)
            assert removal.found == bool(found), (phase, fatal, found)
            assert not nothing_left(), (phase, fatal, nothing_left())
            world.send(1, 1)
            assert world.await_frames(1) == [1], (phase, fatal)
        steps[phase] = fatal - 1
        assert steps[phase] >= 3, steps
    return {"kill_points": steps}


def check_vif_removed_while_held(world: World) -> dict[str, Any]:
    made = OutputBuffer("vif0")
    made.setup()
    world.send(1, 4)
    await_held(made, 4)
    made.close_epoch()
    world.close()
    run("ip", "link", "del", "vif0")
    made.release_epoch()
    made.close_epoch()
    assert made.teardown().found
    assert not plug.leftovers()
    return {}


def check_leftover_of_a_vif_that_is_gone(world: World) -> dict[str, Any]:
    OutputBuffer("vif0").setup()
    world.send(1, 4)
    world.close()
    run("ip", "link", "del", "vif0")
    (left,) = plug.leftovers()
    assert (left.vif, left.filtered) == ("vif0", False), left
    assert plug.reclaim("vif0", release=False).found
    assert not plug.leftovers()
    return {}


_TCP_GUEST = """
import ctypes, os, socket, subprocess, sys, hashlib
assert ctypes.CDLL(None).unshare(0x40000000) == 0
print("ready", flush=True)
sys.stdin.readline()
for words in ("ip link set lo up", "ip link set guest0 up", "ip addr add 192.0.2.10/24 dev guest0"):
    subprocess.run(words.split(), check=True)
with socket.create_server(("192.0.2.10", 7000)) as server:
    print("listening", flush=True)
    peer, _ = server.accept()
data = os.urandom(1 << 20)
peer.sendall(data)
peer.close()
print(hashlib.sha256(data).hexdigest(), flush=True)
"""


def check_tcp_bulk_passes_whole(world: World) -> dict[str, Any]:
    """A real TCP sender behind the buffer: large (GSO) frames, acknowledgements, many epochs."""
    guest = subprocess.Popen(
        [sys.executable, "-c", _TCP_GUEST], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert guest.stdin is not None
    assert guest.stdout is not None
    world.guest.close()
    try:
        assert guest.stdout.readline() == b"ready\n"
        run("ip", "link", "set", "guest0", "netns", str(guest.pid))
        guest.stdin.write(b"go\n")
        guest.stdin.flush()
        run("ip", "addr", "add", "192.0.2.1/24", "dev", "br0")
        assert guest.stdout.readline() == b"listening\n"
        made = OutputBuffer("vif0")
        made.setup()
        received = hashlib.sha256()
        size = 0
        epochs = 0
        largest = 0
        with Tap("vif0") as tap:
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(("192.0.2.10", 7000))
            end = time.monotonic() + 6 * _PATIENCE
            while True:
                assert time.monotonic() < end, (size, epochs, made.stats())
                files = [tap.fileno(), client.fileno()]
                ready = select.select(files, [], [], 1.0)[0]
                if files[0] in ready:
                    tap.drain()
                    stats = made.stats()
                    if stats.held_packets:
                        largest = max(largest, stats.held_bytes // stats.held_packets)
                    made.close_epoch()
                    made.release_epoch()
                    epochs += 1
                if files[1] in ready:
                    data = client.recv(1 << 16)
                    if not data:
                        break
                    received.update(data)
                    size += len(data)
            client.close()
        made.teardown()
        digest = guest.stdout.readline().decode().strip()
        assert (size, received.hexdigest()) == (1 << 20, digest)
        return {"epochs": epochs, "largest_mean_frame": largest}
    finally:
        guest.stdin.close()
        guest.wait(timeout=_PATIENCE)


def check_cost(world: World) -> dict[str, Any]:
    rounds = 300
    close, release, stats, bare = [], [], [], []
    netlink, question = Netlink(), messages.link_get("lo")
    begin = time.perf_counter()
    made = OutputBuffer("vif0")
    made.setup()
    setup = time.perf_counter() - begin
    for number in range(rounds):
        world.send(number, number)
        t0 = time.perf_counter()
        made.close_epoch()
        t1 = time.perf_counter()
        made.release_epoch()
        t2 = time.perf_counter()
        made.stats()
        t3 = time.perf_counter()
        netlink.get(question, "find lo")
        t4 = time.perf_counter()
        close.append(t1 - t0)
        release.append(t2 - t1)
        stats.append(t3 - t2)
        bare.append(t4 - t3)
    begin = time.perf_counter()
    made.teardown()
    teardown = time.perf_counter() - begin

    def figures(values: list[float]) -> list[int]:
        ordered = sorted(values)
        return [round(ordered[int(len(ordered) * q)] * 1e6) for q in (0.5, 0.99)]

    return {
        "close_us_p50_p99": figures(close),
        "release_us_p50_p99": figures(release),
        "stats_us_p50_p99": figures(stats),
        "bare_us_p50_p99": figures(bare),
        "setup_ms": round(setup * 1e3, 1),
        "teardown_ms": round(teardown * 1e3, 1),
    }


# ---- Program ----


def perform(check: Callable[[World], dict[str, Any]]) -> dict[str, Any]:
    """One check, in the calling process and a network of its own."""
    begin = time.monotonic()
    signal.signal(signal.SIGALRM, _overdue)
    signal.alarm(_CHECK_SECONDS)
    try:
        unshare_network()
        make_world()
        world = World()
        try:
            figures = check(world)
        finally:
            world.close()
        result: dict[str, Any] = {"ok": True, **figures}
    except Exception:  # noqa: BLE001 - reported, and the run fails
        result = {"ok": False, "error": traceback.format_exc()}
    result["seconds"] = round(time.monotonic() - begin, 1)
    return result


def _overdue(_signal: int, _stack: object) -> None:
    raise TimeoutError(f"not done after {_CHECK_SECONDS} s")


def main(names: list[str]) -> int:
    checks = {
        name.removeprefix("check_"): value
        for name, value in globals().items()
        if name.startswith("check_")
    }
    failed = False
    for name in names or list(checks):
        child = os.fork()
        if child == 0:
            result = perform(checks[name])
            print(json.dumps({"check": name, **result}), flush=True)
            os._exit(0 if result["ok"] else 1)
        failed |= os.waitpid(child, 0)[1] != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
