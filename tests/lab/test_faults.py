# SPDX-License-Identifier: Apache-2.0
"""Faults of the daemons at chosen points, on real Xen: what ``tests/prove`` does in simulation.

The clients outside talk on connections that last through everything: every request is answered
once, in order, and what the registers' clients were told could have come from one machine that
never died.
"""

from __future__ import annotations

import pytest

from tests.lab.faults import armed, clients, freshly_protected, move_in_vain, well_again
from tests.lab.protection_world import World

#: For `make prove`, not for `make check`.
pytestmark = pytest.mark.long

#: Whose daemon, which fault, and whether the guest is protected anew after it.  A daemon that only
#: stands still has a pacemaker that goes on: its host lives, and nothing is taken over.
FAULTS = (
    ("primary", "pages-copied:kill:60", True),
    ("primary", "commit-sent:kill:60", True),
    ("primary", "release:kill:60", True),
    ("primary", "got-ack:cut:60", True),
    ("primary", "got-ack:stall:5:60", False),
    ("standby", "epoch-complete:kill:60", True),
    ("standby", "ack-sent:kill:60", True),
    ("standby", "epoch-complete:stall:5:60", False),
)


@pytest.mark.parametrize(("side", "fault", "anew"), FAULTS)
def test_a_fault_under_talking_clients(world: World, side: str, fault: str, anew: bool) -> None:
    pair = world.unprotected()
    host = getattr(pair, side)
    with armed(world, host, fault) as faults:
        freshly_protected(world, pair)
        told = world.events(pair.primary)
        mark = told.seen
        with clients(world):
            faults.wait()
            if anew:
                told.wait("protected", since=mark)
            well_again(world, pair)
        assert anew or told.since(mark) == []


@pytest.mark.parametrize("point", ["claimed", "revive-backends"])
def test_a_standby_that_dies_while_the_guest_is_handed_over(world: World, point: str) -> None:
    """The claim is undone at its restart, and the guest goes on where it was."""
    pair = world.unprotected()
    with armed(world, pair.standby, f"{point}:kill") as faults:
        freshly_protected(world, pair)
        with clients(world):
            move_in_vain(world, pair, faults)
            well_again(world, pair)
