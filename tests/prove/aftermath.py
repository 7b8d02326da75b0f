# SPDX-License-Identifier: Apache-2.0
"""What must be true of two hosts once every fault is over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kemari.ledger import Role

if TYPE_CHECKING:
    from tests.prove.machine import Machine
    from tests.prove.world import Copy, World


@dataclass(frozen=True, slots=True)
class Granted:
    """What an administrator was told is done.

    :ivar copy: of the guest, for which he was told
    :ivar protected: whether that is to be protected
    """

    copy: Copy
    protected: bool


class Wish:
    """What an administrator has asked for and been told is done: it lasts until he asks again.

    Nothing is wished while a question is open.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._granted: Granted | None = None

    def asked(self, operation: str = "") -> Granted | None:
        """Something is asked for, by a command or by hand; what was wished before."""
        before = self._granted
        if operation in ("start", "stop", ""):
            self._granted = None
        return before

    def granted(self, operation: str, host: str) -> None:
        """It is done."""
        here = [copy for copy in self._world.living() if copy.host == host]
        if operation in ("start", "stop") and here:
            self._granted = Granted(here[-1], operation == "start")

    def refused(self, operation: str, before: Granted | None) -> None:
        """It is not, and what was wished before still is; a stop is one, even if it fails."""
        if operation == "start":
            self._granted = before

    def denied(self, copy: Copy, *, protected: bool) -> str:
        """What of it has not come true, of the guest as it runs in the end; "" if it has."""
        granted, moved_by_itself = self._granted, self._world.reprotect and not copy.by_hand
        if granted is None or (copy is not granted.copy and not moved_by_itself):
            return ""
        if granted.protected and not protected:
            return "the guest is not protected, and nobody has said that it should not be"
        if protected and not granted.protected:
            return "the guest is protected, whose protection was stopped"
        return ""


def ill(world: World) -> str:
    """What is not as it should be in the end; "" if all is well."""
    copies = world.living()
    if not copies:
        return "the guest runs nowhere"
    if len(copies) > 1:
        return "" if world.forked else "the guest runs twice"
    (copy,) = copies
    machine = world.machines[copy.host]
    other = world.other(machine)
    protected = machine.protection is not None and machine.protection.machine.protected
    return (
        _of_the_guest(copy, machine, other)
        or _of_the_rest(machine, other)
        or world.wish.denied(copy, protected=protected)
    )


def _of_the_guest(copy: Copy, machine: Machine, other: Machine) -> str:
    if copy.guest.paused:
        return "the guest is paused"
    for each in (machine, other):
        if not each.alive or each.daemon is None:
            return f"no daemon runs on {each.name}"
        if each.daemon.recoveries:
            return f"{each.name} does not know who owns the guest"
    assert machine.daemon is not None
    record = machine.daemon.host.ledger.get(copy.guest.description.uuid)
    owning = (Role.OWNER, Role.PRIMARY)
    if record is not None and record.role not in owning and not copy.by_hand:
        return f"the guest runs on {machine.name}, in whose ledger it is {record.role}"
    return ""


def _of_the_rest(machine: Machine, other: Machine) -> str:
    """What is left of a protection that is over, or missing of one that is not."""
    protection = machine.protection
    protected = protection is not None and not protection.machine.over
    if machine.held and not protected:
        return f"output is held on {machine.name} for nobody"
    if other.held:
        return f"output is held on {other.name}, where no guest is"
    if protected and protection is not None and not protection.machine.protected:
        return f"a protection has come no further than {protection.state}"
    if other.hypervisor.shells and not protected:
        return f"a shell is left on {other.name}"
    if machine.hypervisor.shells:
        return f"a shell is left on {machine.name}, where the guest runs"
    return ""
