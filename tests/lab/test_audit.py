# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on real Xen, looked at whole: no change of a page is missing in them.

See :mod:`checkpoint.audit`.  The guest answers clients, and writes to its memory and checks it.
"""

from __future__ import annotations

import pytest

from kemari.faultpoints import AUDIT
from tests.lab.faults import ENVIRONMENT, LOG, clients, freshly_protected, start_with
from tests.lab.protection_world import World
from vagrant.demolib.memory import Memory

#: For `make prove`, not for `make check`.
pytestmark = pytest.mark.long

LOOKS = 20
#: Seconds between two looks, of which each takes about one in an emulated host.
INTERVAL = 2
#: Seconds until there were that many.
PATIENCE = 300
#: Written by the guest per second, and in how large an area.
KIB, MIB = 1024, 8


def test_no_change_of_a_page_is_lost(world: World) -> None:
    pair = world.unprotected()
    start_with(world, pair.primary, f"{AUDIT}={INTERVAL}\n")
    ssh = world.lab.ssh
    try:
        freshly_protected(world, pair)
        memory = Memory(world.lab, world.lab.state / "out" / "audit.err", KIB, MIB)
        with memory, clients(world):
            before = memory.look()
            said = ssh(
                pair.primary,
                f"for second in $(seq {PATIENCE}); do"
                f" grep -q 'look {LOOKS} at an epoch' {LOG} && break; sleep 1; done;"
                f" grep -E 'at an epoch|was LOST' {LOG}",
                timeout=2 * PATIENCE,
            ).stdout.splitlines()
            assert memory.look(before.rounds + 1).writes > before.writes
            assert memory.faults == []
        print(*said, sep="\n")
        assert len([line for line in said if "at an epoch" in line]) >= LOOKS
        assert not [line for line in said if "was LOST" in line]
    finally:
        ssh(pair.primary, f"rm -f {ENVIRONMENT}")
        # The next test's daemon does not look.
        world.spoiled = True
