# SPDX-License-Identifier: Apache-2.0
"""The sweep: every fault at every point of every scenario, one at a time, simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from checkpoint.errors import ReviveError
from kemari.recovery import PATIENT_PACE
from tests.prove import administrator
from tests.prove.disks import CLEAN
from tests.prove.machine import GUEST, Answer, Machine
from tests.prove.simulation import Stuck
from tests.prove.world import HEARTBEAT, Fault, Violation, World

#: Points that are not swept: no simulated guest has a disk that both hosts share.
#: The session's own tests send and take these frames.
UNSWEPT: Final = frozenset({"put-issued", "got-issued"})

# ---- Scenarios: what the administrator, the client and fate do --------------------------------


def _ask(world: World, machine: Machine, operation: str, limit: float = 60.0) -> Answer:
    answer = machine.ask(operation, domain=GUEST)
    world.run(lambda: answer.done or not machine.alive, limit)
    return answer


def _stall(machine: Machine, beats: float) -> None:
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
    _stall(world.a, 12.0)
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
_ENDS_ON: Final = ENDS_ON | BY_HAND_END_ON | DISKS_END_ON
SCENARIOS: Final = {each.__name__: each for each in (*ENDS_ON, *BY_HAND_END_ON)}
DISK_SCENARIOS: Final = {each.__name__: each for each in (*DISKS_END_ON, *ENDS_ON)}
_COURSES: Final = SCENARIOS | DISK_SCENARIOS
#: (scenario, whether the guest has a disk) of all runs.
WORLDS: Final = (
    *((scenario, False) for scenario in SCENARIOS),
    *((scenario, True) for scenario in DISK_SCENARIOS),
)

# ---- Faults -----------------------------------------------------------------------------------


def _reset(machine: Machine) -> None:
    if machine.process is not None:
        machine.world.log(f"{machine.name}: its connections are torn off")
        machine.world.network.reset(machine.process)


def _unplug(machine: Machine, *wires: str) -> None:
    network = machine.world.network
    machine.world.log(f"unplugged: {', '.join(wires)}")
    network.unplugged.update(wires)
    machine.world.simulation.later(4 * HEARTBEAT, network.unplugged.difference_update, wires)


def _knock(machine: Machine) -> None:
    """A request comes just now; power fails once an epoch is acknowledged after it."""
    machine.world.log("the client's next request comes")
    machine.world.knock()
    nth = machine.world.simulation.random.choice((1, 1, 2))
    machine.world.faults.append(Fault("released", nth, Machine.power_cut))


def _full_and_stall(machine: Machine) -> None:
    """What the other host does meanwhile cannot be recorded there."""
    machine.world.other(machine).fill(_SCARCE)
    _stall(machine, 12.0)


#: Virtual seconds for which there is no room.
_SCARCE: Final = 20 * HEARTBEAT
#: Name -> what happens; given the machine whose daemon has reached the point.
ACTIONS: Final[dict[str, Callable[[Machine], None]]] = {
    "kill": Machine.kill,
    "power": Machine.power_cut,
    "stall-short": lambda machine: _stall(machine, 0.8),
    "stall": lambda machine: _stall(machine, 2.5),
    "stall-long": lambda machine: _stall(machine, 12.0),
    "cut": _reset,
    "unplug": lambda machine: _unplug(machine, "link"),
    "partition": lambda machine: _unplug(machine, "link", "lan"),
    "peer-kill": lambda machine: machine.world.other(machine).kill(),
    "knock": _knock,
    "peer-power": lambda machine: machine.world.other(machine).power_cut(),
    "full": lambda machine: machine.fill(_SCARCE),
    "peer-full-stall": _full_and_stall,
    "stuck": lambda machine: machine.stick(10 * HEARTBEAT),
    "broken": Machine.break_disk,
}

#: In short form every second point meets one of these, by turns, and each one all the others.
_RARE: Final = ("full", "peer-full-stall")
#: As above, with a disk, and with one only.
_DISK_RARE: Final = ("stuck", "broken")
_COMMON: Final = tuple(action for action in ACTIONS if action not in (*_RARE, *_DISK_RARE))
#: What happens in short form at points that only a guest with a disk reaches.
_DISK_ACTIONS: Final = ("kill", "power", "stall", "cut", "peer-kill", "peer-power")


@dataclass(frozen=True, slots=True)
class Case:
    """One run: what happens, and what goes wrong where."""

    scenario: str
    point: str
    nth: int
    action: str
    policy: str = "hold"
    seed: int = 0
    disks: bool = False

    def __str__(self) -> str:
        return (
            f"{self.scenario}/{self.point}:{self.action}:{self.nth}/{self.policy}/seed {self.seed}"
            + "/disk" * self.disks
        )


@dataclass(slots=True)
class Outcome:
    """What became of one run.

    :ivar fired: the fault happened
    :ivar violation: what must not have happened; "" if nothing
    """

    fired: bool = False
    violation: str = ""
    reached: dict[str, int] = field(default_factory=dict)


def run(case: Case) -> Outcome:
    """Run one case."""
    outcome = Outcome()
    with World(case.seed, policy=case.policy, disks=case.disks) as world:
        world.faults.append(Fault(case.point, case.nth, ACTIONS[case.action]))
        try:
            _COURSES[case.scenario](world)
            world.settle()
        except (AssertionError, Stuck, Violation) as error:
            outcome.violation = str(error) or repr(error)
        outcome.fired = bool(world.fired)
        outcome.reached = dict(world.reached)
    return outcome


def baseline(scenario: str, policy: str = "hold", seed: int = 0, *, disks: bool = False) -> Outcome:
    """Run a scenario in which nothing more goes wrong; then it must take its expected course."""
    outcome = Outcome()
    with World(seed, policy=policy, disks=disks) as world:
        try:
            course = _COURSES[scenario]
            course(world)
            world.settle()
            _check_course(world, _ENDS_ON[course])
        except (AssertionError, Stuck, Violation) as error:
            outcome.violation = str(error) or repr(error)
        outcome.reached = dict(world.reached)
    return outcome


def _check_course(world: World, owner: str) -> None:
    machine = world.machines[owner]
    if machine.guest is None:
        raise Violation(f"the guest does not run on {owner} in the end")
    # That a record could not be written has to be told.
    lines = [line for line in world.logs() if "cannot be written" not in line]
    troubles = [line for line in lines if '"trouble"' in line or '"fault"' in line]
    if troubles:
        raise Violation(f"trouble where there should be none: {troubles[0]}")
    if world.reached.get("released", 0) < 3:
        raise Violation("hardly any epoch was acknowledged")
    if world.moves and not world.switch.announced:
        raise Violation("the guest moved, and nobody told the network")


def cases(
    *, brief: bool = False, policies: tuple[str, ...] = ("hold", "release")
) -> Iterator[Case]:
    """All runs of the sweep.

    :param brief: each point and action once, in the scenario that reaches the point first; of the
        rarer actions one for every second point
    """
    done: set[str] = set()
    for scenario, disks in WORLDS:
        counts = baseline(scenario, disks=disks).reached
        for point, count in counts.items():
            if brief and point in done:
                continue
            done.add(point)
            times = {(1 + count) // 2} if brief else {1, 2, (1 + count) // 2, count - 1, count}
            for nth in sorted(times & set(range(1, count + 1))):
                for action in _some(disks, len(done)) if brief else _every(disks):
                    for policy in policies[:1] if brief else policies:
                        if policy == "hold" or _decidable(scenario, action):
                            yield Case(scenario, point, nth, action, policy, disks=disks)


def _every(disks: bool) -> Iterable[str]:
    return (action for action in ACTIONS if disks or action not in _DISK_RARE)


def _some(disks: bool, turn: int) -> Iterable[str]:
    """What happens at a point in short form."""
    common, rare = (_DISK_ACTIONS, _DISK_RARE) if disks else (_COMMON, _RARE)
    return common if turn % 2 else (*common, rare[turn // 2 % len(rare)])


def _decidable(scenario: str, action: str) -> bool:
    """Whether two hosts could know of each other: docs/failure-model.md tells what is else."""
    return scenario not in ("cut_off", "left_buffer", "old_copy") and action != "partition"
