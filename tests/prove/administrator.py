# SPDX-License-Identifier: Apache-2.0
"""Who works with xl beside the daemons: ends a guest, starts it, moves it, and tells nobody.

An administrator who looks first: a guest is started where ``xl list`` shows neither it nor a shell
of it on any host that has power, and moved where nothing protects it.  A guest that is started has
an empty memory: the client begins with its first request again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from checkpoint.memory import MemoryGuest, MemoryHypervisor

if TYPE_CHECKING:
    from tests.prove.machine import Machine
    from tests.prove.world import World

_GUEST: Final = "web"


class JudgedHypervisor(MemoryHypervisor):
    """Tells when a daemon destroys a guest.

    :param judge: called before
    """

    def __init__(self, transmit: Callable[[str, bytes], None], judge: Callable[[], None]) -> None:
        super().__init__(transmit)
        self._judge = judge

    def destroy_domain(self, name: str) -> None:
        """See :class:`MemoryHypervisor`."""
        if name in self.guests:
            self._judge()
        super().destroy_domain(name)


def judge_destruction(machine: Machine) -> None:
    """A guest that was started here by hand, and runs nowhere else, must not be destroyed.

    One whose output is held was protected since, and may be old.
    """
    world = machine.world
    if not machine.powered or machine.held or not world.other(machine).powered:
        return
    living = world.living()
    if len(living) == 1 and living[0].by_hand and living[0].guest is machine.guest:
        world.fail(f"the daemon on {machine.name} destroys the guest, which runs nowhere else")


def end(machine: Machine) -> bool:
    """``xl destroy``; whether there was something to end."""
    world, guest = machine.world, machine.guest
    if guest is None or not machine.powered or _unwritable(world):
        return False
    world.log(f"{machine.name}: the administrator ends the guest")
    _remove(machine, guest)
    world.lost_allowed = True
    return True


def start(machine: Machine, *, same: bool = True) -> bool:
    """``xl create``; whether it was possible.

    :param same: the configuration has the UUID that the guest had before
    """
    world = machine.world
    if not machine.powered or world.disks is not None:
        return False
    if any(each.guest or each.hypervisor.shells for each in world.machines.values()):
        return False
    world.log(f"{machine.name}: the administrator starts the guest" + " anew" * (not same))
    guest = machine.hypervisor.boot(_GUEST)
    if same:
        guest.description = replace(guest.description, uuid=world.uuid)
    world.begin_anew(machine, guest)
    return True


def move(machine: Machine) -> bool:
    """``xl migrate`` to the other host; whether it was possible."""
    world, guest, target = machine.world, machine.guest, machine.world.other(machine)
    if guest is None or guest.paused or world.disks is not None or _unwritable(world):
        return False
    if not (machine.powered and target.powered) or target.guest or target.hypervisor.shells:
        return False
    if machine.protection is not None and not machine.protection.machine.over:
        return False
    world.log(f"{machine.name}: the administrator moves the guest to {target.name}")
    moved = target.hypervisor.boot(_GUEST)
    moved.description = replace(guest.description, domid=moved.description.domid)
    moved.memory[:] = guest.memory
    moved.clock_offset_ns = guest.clock_offset_ns
    _remove(machine, guest)
    world.carry_on(target, moved)
    return True


def _unwritable(world: World) -> bool:
    """A guest that ends before its takeover could be recorded is beyond what is claimed."""
    return any(machine.full for machine in world.machines.values())


def _remove(machine: Machine, guest: MemoryGuest) -> None:
    """The domain is no more.

    What holds its output is a device by itself, which stays; the frames have nowhere to go.
    """
    MemoryHypervisor.destroy_domain(machine.hypervisor, _GUEST)
    for nic in guest.nics:
        output = machine.network.buffers.get(nic.vif)
        for epoch in output._epochs if output is not None else ():
            epoch.clear()
