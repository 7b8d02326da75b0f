# SPDX-License-Identifier: Apache-2.0
"""What the output buffer must do when something is wrong; netbuffer_checks.py runs it."""

from __future__ import annotations

import os
import signal
import time
import traceback
from typing import Any
from unittest import mock

from netbuffer import plug, remains
from netbuffer.epochs import State
from netbuffer.errors import BufferLost, InterfaceBusy, InterfaceNotFound, Leftover
from netbuffer.netlink import Netlink
from netbuffer.plug import OutputBuffer
from tests.lab.netbuffer_world import (
    PATIENCE,
    World,
    await_held,
    buffer,
    nothing_left,
    run,
)


def check_overflow_is_counted(world: World) -> dict[str, Any]:
    with buffer(limit_bytes=10 * 1000, high_water=5000) as made:
        assert not made.above_high_water(made.stats())
        world.send(1, 15, size=1000)
        end = time.monotonic() + PATIENCE
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


def check_vif_removed_while_taken_down(world: World) -> dict[str, Any]:
    """As one is whose guest ends just then; the kernel itself says which answers that gives."""

    class Vanishing(Netlink):
        """Loses the vif right before the last thing on it is removed."""

        def request(self, message: bytearray, purpose: str) -> None:
            if purpose == "remove ingress of vif0":
                run("ip", "link", "del", "vif0")
            super().request(message, purpose)

    made = OutputBuffer("vif0")
    with mock.patch.object(plug, "Netlink", Vanishing):
        made.setup()
    vif = remains.require_link(Netlink(), "vif0")
    world.close()
    assert made.teardown().found
    assert remains.find_link(Netlink(), "vif0") is None, "the vif was never removed"
    assert remains.filters(Netlink(), vif.index) == (False, []), "expected an empty list"
    assert plug.leftovers() == []
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
