# SPDX-License-Identifier: Apache-2.0
"""Every fault point that a protection meets, on real Xen: the daemon is killed there, once.

Its supervisor starts it again.  Where a restart brings the protection about by itself the points
make a chain: each restart takes the next one, under clients that talk all the while.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import pytest

from tests.lab.faults import armed, clients, freshly_protected, unwritable, well_again
from tests.lab.protection_world import Pair, World
from vagrant.lablib.guest import NAME as GUEST
from vagrant.lablib.lab import Lab

#: For `make prove`, not for `make check`.
pytestmark = pytest.mark.long

#: Which time of a point that each epoch has: well after the first copy.
EPOCHS = 40

#: A restarted daemon in a host that is emulated and busy may take more than a second to greet.
HEARTBEAT_MS = 4000

# What the daemon of each side goes through when it comes back and protects again ...
PRIMARY_COMES_BACK = (
    *("recover-ask", "put-hello", "got-hello-ack", "put-stand-down", "got-stood-down"),
    *("recover-keep", "recover-released", "ledger-write", "ledger-synced", "ledger-renamed"),
    *("ledger-written", "put-inquire", "got-owner", "put-prepare", "got-prepared"),
    *("owner-record", "owner-recorded", "base-sent", "output-held"),
)
STANDBY_COMES_BACK = (
    *("recover-stand-down", "recover-stood-down", "got-hello", "put-hello-ack", "got-stand-down"),
    *("put-stood-down", "got-inquire", "put-owner", "got-prepare", "ledger-write"),
    *("ledger-synced", "ledger-renamed", "ledger-written", "standby-recorded", "shell-built"),
    "put-prepared",
)
# ... and with each epoch.
PRIMARY_EPOCH = (
    *("capture", "pause", "paused", "output-close", "output-closed", "rings-copied", "log-read"),
    *("pages-copied", "unpaused", "captured", "put-pages", "put-state", "put-commit"),
    *("commit-sent", "got-ack", "release", "released"),
)
STANDBY_EPOCH = (
    *("got-pages", "got-state", "got-commit", "epoch-complete", "put-ack", "ack-sent"),
    *("apply-batch", "applied"),
)
# Side and point, of a protection that is stopped ...
STOP = (
    *(("primary", point) for point in ("ask", "put-stop", "stop-sent", "got-stopped", "let-go")),
    *(("primary", f"let-go-{step}") for step in ("recorded", "released", "done")),
    *(("standby", point) for point in ("got-stop", "promise", "promised", "put-stopped")),
    ("standby", "shell-removed"),
)
# ... and of a guest that is moved.
MOVE = (
    *(("primary", point) for point in ("put-handover", "handover-sent", "got-running", "abandon")),
    *(("primary", f"abandon-{step}") for step in ("recorded", "destroyed", "done")),
    *(("standby", point) for point in ("got-handover", "claim", "claimed")),
    *(("standby", f"revive-{step}") for step in ("stub", "memory", "vcpus", "backends", "unpause")),
    *(("standby", point) for point in ("revived", "takeover-recorded", "put-running")),
    *(("standby", point) for point in ("announce", "announced")),
)

# ... and of one that cannot be.
DECLINE = (("standby", "put-declined"), ("primary", "got-declined"))

CHAINS = {
    "primary-comes-back": ("primary", PRIMARY_COMES_BACK, 1),
    "standby-comes-back": ("standby", STANDBY_COMES_BACK, 1),
    "primary-epoch": ("primary", PRIMARY_EPOCH, EPOCHS),
    "standby-epoch": ("standby", STANDBY_EPOCH, EPOCHS),
}


@pytest.fixture(scope="module")
def shared_world(lab: Lab) -> Iterator[World]:
    """As in conftest.py, of hosts that are slow."""
    world = World(lab, heartbeat_ms=HEARTBEAT_MS)
    yield world
    world.close()


@pytest.mark.parametrize(("side", "points", "nth"), CHAINS.values(), ids=CHAINS)
def test_deaths_one_after_the_other(
    world: World, side: str, points: tuple[str, ...], nth: int
) -> None:
    pair = world.protected()
    with clients(world), armed(world, host(pair, side), *kills(points, nth)) as faults:
        for _ in points:
            faults.wait()
        # Of the time after the last death.
        told = world.events(pair.primary)
        told.wait("protected", since=told.seen)
        well_again(world, pair)


@pytest.mark.parametrize(("side", "point"), STOP)
def test_a_death_while_a_protection_is_stopped(world: World, side: str, point: str) -> None:
    pair = world.unprotected()
    with armed(world, host(pair, side), *kills([point], 1)) as faults:
        freshly_protected(world, pair)
        with clients(world):
            began = time.time()
            world.kemari(pair.primary, "stop", GUEST, check=False)
            faults.wait()
            world.awake(host(pair, side), began)
            well_again(world, pair)


@pytest.mark.parametrize(("side", "point"), MOVE)
def test_a_death_while_the_guest_is_moved(world: World, side: str, point: str) -> None:
    pair = world.unprotected()
    with armed(world, host(pair, side), *kills([point], 1)) as faults:
        freshly_protected(world, pair)
        with clients(world):
            began = time.time()
            world.kemari(pair.primary, "failover", GUEST, check=False)
            faults.wait()
            world.awake(host(pair, side), began)
            well_again(world, pair)


@pytest.mark.parametrize(("side", "point"), DECLINE)
def test_a_death_while_a_move_is_declined(world: World, side: str, point: str) -> None:
    """The host that is to have the guest cannot write down that it has."""
    pair = world.unprotected()
    with armed(world, host(pair, side), *kills([point], 1)) as faults:
        freshly_protected(world, pair)
        with clients(world):
            with unwritable(world, pair.standby):
                reply = world.kemari(pair.primary, "failover", GUEST, check=False)
                assert reply.status != 0
                died = faults.wait()
            world.awake(host(pair, side), died)
            world.only_on(pair.primary)
            well_again(world, pair)


def test_deaths_of_a_daemon_that_comes_back_where_its_guest_is_no_more(world: World) -> None:
    """Its host lost power, the standby has taken over."""
    pair = world.unprotected()
    # The first one is of the daemon that ends with its host.
    points = ("recover-give-up", "recover-give-up", "recover-destroyed")
    with armed(world, pair.primary, *kills(points, 1)) as faults:
        freshly_protected(world, pair)
        with clients(world):
            # The log tells how many faults have happened, and what is not synced may be lost.
            world.lab.ssh(pair.primary, "sync")
            there = world.events(pair.standby)
            mark = there.seen
            world.cut(pair.primary)
            there.wait("takeover", since=mark)
            world.moves += 1
            faults.skip()
            world.lab.boot(pair.primary)
            died = [faults.wait() for _ in points[1:]]
            world.awake(pair.primary, died[-1])
            well_again(world, world.protected())


def host(pair: Pair, side: str) -> str:
    """The host on that side."""
    return pair.primary if side == "primary" else pair.standby


def kills(points: Iterable[str], nth: int) -> list[str]:
    """What KEMARI_FAULT says of them."""
    return [f"{point}:kill:{nth}" for point in points]
