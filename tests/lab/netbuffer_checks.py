# SPDX-License-Identifier: Apache-2.0
"""What the output buffer must do on a real kernel; a program for a Dom0, run as root.

    python3 -m tests.lab.netbuffer_checks [CHECK...]

Each check has a process and a network namespace of its own (netbuffer_world.py), so the host
notices nothing.  Prints one line of JSON for each, {"check": NAME, "ok": true|false, ...}, and
exits with 1 if one failed.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from netbuffer import messages
from netbuffer.epochs import State
from netbuffer.errors import EpochError
from netbuffer.netlink import Netlink
from netbuffer.plug import OutputBuffer
from netbuffer.tap import Tap
from tests.lab import netbuffer_faults
from tests.lab.netbuffer_world import (
    KINDS,
    PATIENCE,
    QUIET,
    World,
    await_held,
    buffer,
    frame,
    make_world,
    nothing_left,
    packet_socket,
    run,
    unshare_network,
)

_CHECK_SECONDS = 150  # that a check may take before it is taken for hung


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
        assert poll.poll(PATIENCE * 1000), "the tap did not see a held frame"
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
        time.sleep(QUIET)
        before = made.stats().held_packets
        made.close_epoch()
        made.release_epoch()
        end = time.monotonic() + PATIENCE
        while made.stats().held_packets and time.monotonic() < end:
            time.sleep(0.01)
        assert made.stats().held_packets == 0, made.stats()
        while not world.silence():
            pass
    return {"held_at_the_end": before}


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
            end = time.monotonic() + 6 * PATIENCE
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
        guest.wait(timeout=PATIENCE)


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
        for name, value in (globals() | vars(netbuffer_faults)).items()
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
