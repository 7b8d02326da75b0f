# SPDX-License-Identifier: Apache-2.0
"""A guest whose disk is a storage that both hosts reach: nothing acknowledged is lost, and a host
that lost the guest writes nothing any more.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.lab.faults import armed, freshly_protected, well_again
from tests.lab.storage import DEVICE, SharedWorld, Storage
from vagrant.demolib.hosts import domains
from vagrant.demolib.ledger import Writers
from vagrant.lablib.lab import Lab

pytestmark = pytest.mark.long

#: Acknowledged appends on each connection that show that it works.
SOME = 25
DISK_MIB = 32
CUTS = 2
#: Which time of a fault point that comes again and again.
OFTEN = 10


@pytest.fixture(scope="module")
def shared_world(lab: Lab) -> Iterator[SharedWorld]:
    with Storage(lab, DISK_MIB) as storage:
        world = SharedWorld(lab, storage, DISK_MIB)
        yield world
        # The next module's guest has no disk.
        world.close()
        lab.reset()
        for host in lab.hosts:
            storage.detach(host)


@pytest.fixture
def world(shared_world: SharedWorld, request: pytest.FixtureRequest) -> Iterator[SharedWorld]:
    """The world as the last test has left it; new after one that failed."""
    for world in shared_world.for_test(request):
        assert isinstance(world, SharedWorld)
        yield world


def writers(world: SharedWorld, name: str) -> Writers:
    """Clients of the guest's database."""
    return Writers(world.lab, world.lab.state / "out" / f"{name}.err")


def shut_down_and_check(world: SharedWorld) -> None:
    """The guest ends in good order, and so does its file system."""
    pair = world.protected()
    here, there = world.events(pair.primary), world.events(pair.standby)
    mark, mark_there = here.seen, there.seen
    world.lab.guest_stop(pair.primary)
    here.wait("ended", since=mark)
    there.wait("stood-down", since=mark_there)
    assert domains(world.lab, pair.primary) == {}
    for host in (pair.primary, pair.standby):
        world.lab.ssh(host, f"blockdev --flushbufs {DEVICE} && e2fsck -fn {DEVICE}")
    world.spoiled = True  # the standby's host would not serve the disk as it stands


def test_power_cuts_under_a_database(world: SharedWorld) -> None:
    world.protected()
    with writers(world, "shared-database") as clients:
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
        pair = world.protected()
        world.kemari(pair.primary, "failover", "demo")
        world.moves += 1
        clients.wait_done(SOME)
        assert clients.stop() == []
    shut_down_and_check(world)


@pytest.mark.parametrize(("side", "point"), [("primary", "put-issued"), ("standby", "got-issued")])
def test_a_death_while_it_is_told_what_the_storage_has(
    world: SharedWorld, side: str, point: str
) -> None:
    pair = world.unprotected()
    dead = getattr(pair, side)
    with (
        writers(world, "issued") as clients,
        armed(world, dead, f"{point}:kill:{OFTEN}") as faults,
    ):
        freshly_protected(world, pair)
        began = time.time()
        clients.wait_done(SOME)
        faults.wait()
        world.awake(dead, began)
        well_again(world, pair)
        clients.wait_done(SOME)
        assert clients.stop() == []
    shut_down_and_check(world)


def test_a_primary_that_was_frozen_issues_nothing_after_the_takeover(world: SharedWorld) -> None:
    pair = world.protected()
    here, there = world.events(pair.primary), world.events(pair.standby)
    mark, mark_there = here.seen, there.seen
    pid = world.lab.hosts[pair.primary].pid
    assert pid is not None
    with writers(world, "frozen-database") as clients:
        clients.wait_done(SOME)
        os.kill(pid, signal.SIGSTOP)
        try:
            there.wait("takeover", since=mark_there)
            clients.wait_done(SOME)
        finally:
            os.kill(pid, signal.SIGCONT)
        here.wait("moved", since=mark)
        world.only_on(pair.standby)
        clients.wait_done(SOME)
        assert clients.stop() == []
    world.moves += 1
    shut_down_and_check(world)
