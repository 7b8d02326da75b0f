# SPDX-License-Identifier: Apache-2.0
"""The fault points that only a guest with a disk meets, on real Xen, under writing databases.

As in ``test_fault_points.py``: the daemon is killed at each once, and its supervisor starts it
again.  What the databases have acknowledged is there ever after, on both hosts at the end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from tests.lab.faults import armed, move_in_vain
from tests.lab.protection_world import World
from tests.lab.test_disk import DISK_MIB, PAUSE_MS, SOME
from tests.lab.test_fault_points import HEARTBEAT_MS, host, kills
from vagrant.demolib import databases
from vagrant.demolib.stage import end_and_check_disks
from vagrant.lablib.guest import DATA, GuestOptions
from vagrant.lablib.guest import NAME as GUEST
from vagrant.lablib.lab import Lab

#: For `make prove`, not for `make check`.
pytestmark = pytest.mark.long

#: Which time of a point that comes again and again.
OFTEN: Final = 10

#: Where two disks become a pair; each attempt comes one point further.
PAIR = ("disk-marked", "disk-recorded", "disk-merged", "disk-streaming")
# What the daemon of each side goes through with each epoch, and now and then ...
PRIMARY_GOES_ON = (
    *("disks-closed", "put-writes", "got-applied", "disks-tell", "disks-told"),
    *("put-heartbeat", "got-heartbeat"),
)
STANDBY_GOES_ON = (
    *("got-writes", "put-applied", "replica-apply", "replica-written", "replica-flushed"),
    *("put-heartbeat", "got-heartbeat"),
)
# ... and when it comes back and its copy is brought up to date.
STANDBY_COMES_BACK = (
    *("replica-recorded", "replica-apply", "replica-written", "replica-flushed"),
    *("replica-consistent", "replica-unmarked"),
)
CHAINS: Final = {
    "primary-goes-on": ("primary", PRIMARY_GOES_ON, OFTEN),
    "standby-comes-back": ("standby", STANDBY_COMES_BACK, 1),
    "standby-goes-on": ("standby", STANDBY_GOES_ON, OFTEN),
}
#: Of the standby to which the guest is moved.
MOVE = (
    *("disks-settle", "disks-settled", "replica-marked", "replica-disk"),
    *("disks-taken", "disks-activated"),
)


@pytest.fixture(scope="module")
def shared_world(lab: Lab) -> Iterator[World]:
    """As in conftest.py, of hosts that are slow, with a guest that has a disk."""
    world = World(lab, GuestOptions(disk_mib=DISK_MIB), reprotect=True, heartbeat_ms=HEARTBEAT_MS)
    yield world
    world.close()
    lab.reset()


@contextmanager
def writing(world: World) -> Iterator[databases.Databases]:
    """Both databases have clients meanwhile, who must not have noticed anything but silence."""
    with databases.clients(world.lab, world.lab.state / "out", pause_ms=PAUSE_MS) as clients:
        clients.wait_done(SOME)
        yield clients
        clients.wait_done(SOME)
        assert clients.stop() == []


def test_deaths_while_two_disks_become_a_pair(world: World) -> None:
    """Nothing is recorded of a start that fails, so each is an administrator's."""
    pair = world.unprotected()
    world.kemari(pair.standby, "forget", GUEST, "--force", check=False)
    with writing(world), armed(world, pair.primary, *kills(PAIR, 1)) as faults:
        for _ in PAIR:
            began = time.time()
            reply = world.kemari(pair.primary, "start", GUEST, pair.standby, check=False)
            assert reply.status != 0
            faults.wait()
            world.awake(pair.primary, began)
        assert world.protected() == pair
        world.only_on(pair.primary)


@pytest.mark.parametrize(("side", "points", "nth"), CHAINS.values(), ids=CHAINS)
def test_deaths_one_after_the_other(
    world: World, side: str, points: tuple[str, ...], nth: int
) -> None:
    pair = world.protected()
    with writing(world), armed(world, host(pair, side), *kills(points, nth)) as faults:
        for _ in points:
            faults.wait()
        told = world.events(pair.primary)
        told.wait("protected", since=told.seen)
        world.only_on(pair.primary)


def test_deaths_of_the_host_that_the_guest_is_moved_to(world: World) -> None:
    """Each time the guest goes on where it was, on its disk, and is protected again."""
    pair = world.protected()
    told = world.events(pair.primary)
    with writing(world) as clients, armed(world, pair.standby, *kills(MOVE, 1)) as faults:
        told.wait("protected", since=told.seen)
        for _ in MOVE:
            move_in_vain(world, pair, faults)
            clients.wait_done(SOME)
            assert clients.noticed() == []


@pytest.mark.parametrize(("side", "point"), [("standby", "put-error"), ("primary", "got-error")])
def test_a_death_on_a_refusal(world: World, side: str, point: str) -> None:
    """The standby's disk is away."""
    pair = world.unprotected()
    lab, dead = world.lab, host(pair, side)
    with writing(world), armed(world, dead, *kills([point], 1)) as faults:
        lab.ssh(pair.standby, f"mv {DATA} {DATA}.away")
        began = time.time()
        try:
            reply = world.kemari(pair.primary, "start", GUEST, pair.standby, check=False)
        finally:
            lab.ssh(pair.standby, f"mv {DATA}.away {DATA}")
        assert reply.status != 0
        faults.wait()
        world.awake(dead, began)
        assert world.protected() == pair
        world.only_on(pair.primary)


def test_file_systems_and_databases_are_clean_in_the_end(world: World) -> None:
    pair = world.protected()
    assert end_and_check_disks(world.lab, pair.primary, pair.standby) == []
    world.spoiled = True
