# SPDX-License-Identifier: Apache-2.0
"""The scenarios that are simulated: what the administrator, the client and fate do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from checkpoint.errors import ReviveError
from kemari.recovery import PATIENT_PACE
from tests.prove import administrator
from tests.prove.disks import CLEAN
from tests.prove.machine import GUEST, Answer, Machine
from tests.prove.world import HEARTBEAT, World


def _ask(world: World, machine: Machine, operation: str, limit: float = 60.0) -> Answer:
    answer = machine.ask(operation, domain=GUEST)
    world.run(lambda: answer.done or not machine.alive, limit)
    return answer


def stall(machine: Machine, beats: float) -> None:
    """A machine's daemon stands still for so many heartbeat times."""
    if machine.process is not None:
        machine.world.log(f"{machine.name}: stands still for {beats} heartbeat times")
        machine.world.simulation.stall(machine.process, beats * HEARTBEAT)


def talk_and_stop(world: World) -> None:
    """A guest is protected, talks, and is protected no more."""
    world.protect()
    world.answers(5)
    world.wait(0.5)
    world.answers(2)
    _ask(world, world.a, "stop")
    world.answers(2)


def stopped(world: World) -> None:
    """A protection that was stopped stays so when the daemon is started again."""
    world.protect()
    world.answers(2)
    _ask(world, world.a, "stop")
    world.a.kill()
    world.wait(1.0)
    world.answers(2)


def planned(world: World) -> None:
    """A guest is moved, and moved back."""
    world.protect()
    world.answers(3)
    _ask(world, world.a, "failover")
    world.answers(3)
    world.protect("b")
    world.answers(3)
    _ask(world, world.b, "failover")
    world.answers(3)


def power_cut(world: World) -> None:
    """The primary loses power; the survivor is protected to it when it is back."""
    world.protect()
    world.answers(3)
    world.a.power_cut(back_after=2.0)
    world.answers(3)
    world.wait(2.5)
    world.protect("b")
    world.answers(3)


def primary_killed(world: World) -> None:
    """The primary's daemon dies and is started again."""
    world.protect()
    world.answers(3)
    world.a.kill()
    world.wait(1.0)
    world.answers(3, 90)


def standby_killed(world: World) -> None:
    """The standby's daemon dies and is started again."""
    world.protect()
    world.answers(3)
    world.b.kill()
    world.answers(3, 90)


def link_unplugged(world: World) -> None:
    """The replication link is silent; the hosts see each other on another path."""
    world.protect()
    world.answers(3)
    world.say_alive(world.a)
    world.network.unplugged.add("link")
    world.wait(4 * HEARTBEAT)
    world.answers(3, 90)
    world.network.unplugged.discard("link")
    world.wait(8.0)
    world.answers(3, 90)


def cut_off(world: World) -> None:
    """Nothing passes between the hosts, both live; then everything does again."""
    world.protect()
    world.answers(3)
    world.network.unplugged.update(("link", "lan"))
    world.wait(6 * HEARTBEAT)
    world.network.unplugged.clear()
    world.wait(2.0)
    world.answers(3, 90)


def left_buffer(world: World) -> None:
    """The primary's daemon dies while it is cut off, and finds that the guest has moved."""
    world.protect()
    world.answers(3)
    world.a.supervised = False
    world.network.unplugged.update(("link", "lan"))
    world.a.kill()
    world.wait(4 * HEARTBEAT)
    world.network.unplugged.clear()
    world.a.supervised = True
    world.a.start()
    world.wait(1.0)
    world.answers(3, 90)


def unrecorded(world: World) -> None:
    """A takeover cannot be recorded, and the primary was not dead but stood still."""
    world.protect()
    world.answers(3)
    world.b.fill()
    stall(world.a, 12.0)
    world.wait(14 * HEARTBEAT)
    world.answers(3, 90)
    world.b.make_room()
    world.wait(PATIENT_PACE + 1.0)
    world.answers(3, 90)


def declined(world: World) -> None:
    """A guest is to be moved, but cannot be run on the other host."""
    world.protect()
    world.answers(3)

    def refuse(point: str) -> None:
        if point == "revive":
            raise ReviveError("there is no memory for it")

    world.b.hypervisor.reached = refuse
    _ask(world, world.a, "failover")
    world.b.hypervisor.reached = lambda point: None
    world.answers(3)


def refused(world: World) -> None:
    """The standby has no room at first; then it has."""
    world.b.hypervisor.memory_pages = 1
    world.protect()
    world.answers(2)
    world.b.hypervisor.memory_pages = 1 << 20
    world.protect()
    world.answers(3)


def there_and_back(world: World) -> None:
    """Each host loses power once, the second one when it is alone no more and all is copied."""
    world.protect()
    world.answers(4)
    world.busy(5)
    world.a.power_cut(back_after=2.0)
    world.answers(4)
    world.wait(2.5)
    world.protect("b")
    world.answers(4)
    world.wait(3.0)
    world.answers(2)
    world.busy(5)
    world.b.power_cut(back_after=2.0)
    world.answers(4)


def protected_again(world: World) -> None:
    """What both hosts have is marked no more; a protection ends, and only the rest is copied."""
    world.protect()
    world.answers(60)
    world.wait(2.0)
    _ask(world, world.a, "stop")
    world.answers(3)
    world.protect()
    world.answers(3)
    world.a.power_cut()
    world.answers(3)


def brought_back(world: World) -> None:
    """A guest is moved, ended there, and started again by hand where it was."""
    world.protect()
    world.answers(3)
    _ask(world, world.a, "failover")
    world.answers(3)
    administrator.end(world.b)
    administrator.start(world.a)
    world.answers(2)
    world.a.kill()
    world.wait(2.0)
    world.answers(2, 90)
    world.protect()
    world.answers(3, 90)


def carried_over(world: World) -> None:
    """A guest is moved to and fro, now with the daemons' help and now by hand."""
    world.protect()
    world.answers(2)
    _ask(world, world.a, "stop")
    world.run(lambda: administrator.move(world.a), 2.0)
    world.answers(2)
    world.protect("b")
    world.answers(2)
    _ask(world, world.b, "failover")
    world.answers(2)
    administrator.move(world.a)
    world.b.kill()
    world.wait(2.0)
    world.answers(3, 90)


def old_copy(world: World) -> None:
    """The primary is cut off; the guest ends where it went, and is started again by hand."""
    world.protect()
    world.answers(3)
    world.a.supervised = False
    world.network.unplugged.update(("link", "lan"))
    world.wait(4 * HEARTBEAT)
    world.answers(2)
    administrator.end(world.b)
    world.a.kill()
    world.network.unplugged.clear()
    world.a.supervised = True
    world.a.start()
    world.wait(2.0)
    administrator.start(world.a, same=False)
    world.answers(3, 90)


def stuck_disk(world: World) -> None:
    """A call to the replica's disk stands still, while a protection ends and the next begins."""
    world.protect()
    world.answers(3)
    world.wait(1.0)
    world.b.stick(3.0)
    world.busy(3)
    world.answers(5)
    _ask(world, world.a, "stop")
    world.answers(3)
    world.protect()
    world.answers(3)
    world.wait(3.0)
    world.a.power_cut()
    world.answers(3)


def lost_writes(world: World) -> None:
    """The primary's disk refuses what the guest has written, before and after marks are cleared."""
    world.protect()
    world.answers(3)
    for _ in range(4):
        world.busy(3)
        world.a.break_disk()
        world.wait(4 * CLEAN)
        world.answers(2)
    world.busy(3)
    world.a.break_disk()
    world.a.power_cut(back_after=2.0)
    world.answers(3)
    world.wait(2.5)
    world.protect("b")
    world.answers(3)


#: Scenario -> the host that runs the guest in the end, if nothing more goes wrong.
ENDS_ON: Final[dict[Callable[[World], None], str]] = {
    talk_and_stop: "a",
    stopped: "a",
    planned: "a",
    power_cut: "b",
    primary_killed: "a",
    standby_killed: "a",
    link_unplugged: "a",
    cut_off: "b",
    left_buffer: "b",
    declined: "a",
    refused: "a",
    unrecorded: "b",
}
#: As above, of those with an administrator who works by hand, on a guest without disks.
BY_HAND_END_ON: Final[dict[Callable[[World], None], str]] = {
    brought_back: "a",
    carried_over: "b",
    old_copy: "a",
}
#: As above, of those that are about the guest's disk; the others are also run with one.
DISKS_END_ON: Final[dict[Callable[[World], None], str]] = {
    there_and_back: "a",
    protected_again: "b",
    stuck_disk: "b",
    lost_writes: "b",
}
#: All of these.
EVERY_END_ON: Final = ENDS_ON | BY_HAND_END_ON | DISKS_END_ON
SCENARIOS: Final = {each.__name__: each for each in (*ENDS_ON, *BY_HAND_END_ON)}
DISK_SCENARIOS: Final = {each.__name__: each for each in (*DISKS_END_ON, *ENDS_ON)}
#: All of both.
COURSES: Final = SCENARIOS | DISK_SCENARIOS
#: (scenario, whether the guest has a disk) of all runs.
WORLDS: Final = (
    *((scenario, False) for scenario in SCENARIOS),
    *((scenario, True) for scenario in DISK_SCENARIOS),
)
