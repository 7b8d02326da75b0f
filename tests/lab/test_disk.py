# SPDX-License-Identifier: Apache-2.0
"""A guest with a disk and two databases on real Xen: what was acknowledged is there ever after.

``KEMARI_LAB_DISK_CUTS`` is the number of power cuts in a row under writing clients (2: the second
one is of a host whose disk had to be brought up to date after the first).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab.protection_world import World
from vagrant.demolib import databases
from vagrant.demolib.stage import end_and_check_disks
from vagrant.lablib.guest import GuestOptions
from vagrant.lablib.lab import Lab

CUTS = int(os.environ.get("KEMARI_LAB_DISK_CUTS", "2"))
#: Acknowledged appends on each connection that show that it works.
SOME = 10
#: Greatest pause of a connection between two writes: a saturated guest leaves the emulated hosts no
#: time to boot in.
PAUSE_MS = 400
DISK_MIB = 32


@pytest.fixture(scope="module")
def shared_world(lab: Lab) -> Iterator[World]:
    world = World(lab, GuestOptions(disk_mib=DISK_MIB), reprotect=True)
    yield world
    # The next module's guest has no disk.
    world.close()
    lab.reset()


@pytest.fixture
def world(shared_world: World, request: pytest.FixtureRequest) -> Iterator[World]:
    """The world as the last test has left it; new after one that failed."""
    yield from shared_world.for_test(request)


def test_power_cuts_under_databases(world: World) -> None:
    """After the first protection no administrator does anything but give hosts their power back."""
    world.protected()
    out = world.lab.state / "out"
    with databases.clients(world.lab, out, pause_ms=PAUSE_MS) as clients:
        for _ in range(CUTS):
            pair = world.protected()
            clients.wait_done(SOME)
            there = world.events(pair.standby)
            mark = there.seen
            world.cut(pair.primary)
            there.wait("takeover", since=mark)
            clients.wait_done(SOME)
            world.moves += 1
            world.only_on(pair.standby)
            assert clients.noticed() == []
        assert clients.stop() == []

    pair = world.protected()
    assert end_and_check_disks(world.lab, pair.primary, pair.standby) == []
