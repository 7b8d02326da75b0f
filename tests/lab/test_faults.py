# SPDX-License-Identifier: Apache-2.0
"""Faults of the daemons at chosen points, on real Xen: what ``tests/prove`` does in simulation.

The clients outside talk on connections that last through everything: every request is answered
once, in order, and what the registers' clients were told could have come from one machine that
never died.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kemari.faultpoints import MARKER, VARIABLE
from tests.lab.protection_world import Pair, World
from tests.prove.histories import judge as judge_history
from vagrant.demolib.program import Program
from vagrant.demolib.verdict import judge
from vagrant.lablib.guest import NAME as GUEST
from vagrant.lablib.lab import Lab

#: For `make prove`, not for `make check`.
pytestmark = pytest.mark.long

#: Answers on each connection that show that it works.
SOME = 50
#: Seconds from the moment at which a fault may happen until it has.
PATIENCE = 120.0
#: Read by the supervisor's script before it starts kemarid.
ENVIRONMENT = "/etc/kemari/environment"
SPENT = "/run/kemari/fault-spent"

#: Whose daemon, which fault, and what then happens on which host before all is well again.
FAULTS = (
    ("primary", "pages-copied:kill:60", "primary", "protected"),
    ("primary", "commit-sent:kill:60", "primary", "protected"),
    ("primary", "release:kill:60", "primary", "protected"),
    ("primary", "got-ack:cut:60", "primary", "protected"),
    ("primary", "got-ack:stall:5:60", "primary", "moved"),
    ("standby", "epoch-complete:kill:60", "primary", "protected"),
    ("standby", "ack-sent:kill:60", "primary", "protected"),
)


@pytest.fixture(scope="module")
def shared_world(lab: Lab) -> Iterator[World]:
    world = World(lab)
    yield world
    world.close()


@pytest.fixture
def world(shared_world: World, request: pytest.FixtureRequest) -> Iterator[World]:
    """The world as the last test has left it; new after one that failed."""
    yield from shared_world.for_test(request)


@contextmanager
def armed(world: World, host: str, fault: str) -> Iterator[None]:
    """A kemarid on ``host``, started anew, to which this will happen."""
    mark = world.events(host).seen
    world.lab.ssh(
        host,
        f"rm -f {SPENT}; touch {MARKER}; chmod 644 {MARKER}; "
        f"echo {VARIABLE}={fault} >{ENVIRONMENT}",
    )
    # Nothing is protected; and one that is ended in good order is not started again at once.
    world.kill_daemon(host)
    try:
        world.events(host).wait("daemon", since=mark)
        yield
    finally:
        world.lab.ssh(host, f"rm -f {MARKER} {ENVIRONMENT}")


def await_fault(world: World, host: str) -> None:
    """Wait until the fault has happened on ``host``."""
    seconds = f"seq {PATIENCE:.0f}"
    world.lab.ssh(
        host,
        f"for second in $({seconds}); do test -e {SPENT} && exit 0; sleep 1; done; exit 1",
        timeout=2 * PATIENCE,
    )


@contextmanager
def clients(world: World) -> Iterator[None]:
    """Clients that talk meanwhile, and must not have noticed anything but silence."""
    errors = world.lab.state / "out" / "registers.err"
    with (
        world.talk("faults") as talk,
        Program(world.lab, "registers' client", ["vagrant.demolib.registers"], errors) as registers,
    ):
        talk.wait_answers(SOME)
        yield
        talk.wait_answers(SOME)
        registers.finish()
        verdict = judge(talk.stop(), [])
        print(verdict)
        assert verdict.failures == ()
        done = registers.events("done")
        (end,) = registers.events("end")
        assert end["broken"] == {}
        assert len(done) > SOME
        for judgement in judge_history([*done, end]):
            print(judgement)
            assert judgement.linearizable, judgement.sentences()


def freshly_protected(world: World, pair: Pair) -> None:
    """The guest, which was not, is protected, and the events tell of it: what comes is later."""
    told = world.events(pair.primary)
    mark = told.seen
    assert world.protected() == pair
    told.wait("protected", since=mark)


def well_again(world: World, before: Pair) -> None:
    """The guest is protected, on one host only."""
    pair = world.protected()
    if pair != before:
        world.moves += 1
    world.only_on(pair.primary)


@pytest.mark.parametrize(("side", "fault", "where", "event"), FAULTS, ids=lambda value: str(value))
def test_a_fault_under_talking_clients(
    world: World, side: str, fault: str, where: str, event: str
) -> None:
    pair = world.unprotected()
    host = getattr(pair, side)
    with armed(world, host, fault):
        freshly_protected(world, pair)
        told = world.events(getattr(pair, where))
        mark = told.seen
        with clients(world):
            await_fault(world, host)
            told.wait(event, since=mark)
            well_again(world, pair)


@pytest.mark.parametrize("point", ["claimed", "revive-backends"])
def test_a_standby_that_dies_while_the_guest_is_handed_over(world: World, point: str) -> None:
    """The claim is undone at its restart, and the guest goes on where it was."""
    pair = world.unprotected()
    with armed(world, pair.standby, f"{point}:kill"):
        freshly_protected(world, pair)
        told = world.events(pair.primary)
        with clients(world):
            mark = told.seen
            reply = world.kemari(pair.primary, "failover", GUEST, check=False)
            assert reply.status != 0
            await_fault(world, pair.standby)
            told.wait("protected", since=mark)
            world.only_on(pair.primary)
            well_again(world, pair)
