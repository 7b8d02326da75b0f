# SPDX-License-Identifier: Apache-2.0
"""The sweep: every fault at every point of every scenario, one at a time, simulated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from checkpoint.faultpoints import POINTS
from tests.prove.machine import Machine
from tests.prove.scenarios import COURSES, EVERY_END_ON, WORLDS, stall
from tests.prove.simulation import Stuck
from tests.prove.world import HEARTBEAT, Fault, Violation, World

#: Points that are not swept: no simulated guest has a disk that both hosts share.
#: The session's own tests send and take these frames.
UNSWEPT: Final = frozenset({"put-issued", "got-issued"})

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
    stall(machine, 12.0)


#: Virtual seconds for which there is no room.
_SCARCE: Final = 20 * HEARTBEAT
#: Name -> what happens; given the machine whose daemon has reached the point.
ACTIONS: Final[dict[str, Callable[[Machine], None]]] = {
    "kill": Machine.kill,
    "power": Machine.power_cut,
    "stall-short": lambda machine: stall(machine, 0.8),
    "stall": lambda machine: stall(machine, 2.5),
    "stall-long": lambda machine: stall(machine, 12.0),
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


_SHAPE: Final = "SCENARIO/POINT:ACTION:NTH/POLICY/seed N, and /disk for a guest with one"
_NAME: Final = re.compile(
    r"(\w+)/([a-z-]+):([a-z-]+):(\d{1,6})/(hold|release)/seed (\d{1,12})(/disk)?", re.ASCII
)


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

    @classmethod
    def parse(cls, name: str) -> Case:
        """The case that is printed as this.

        :raise ValueError: none is
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} names no case; expected {_SHAPE}")
        scenario, point, action, nth, policy, seed, disks = match.groups()
        if scenario not in COURSES:
            raise ValueError(f"{name!r} has no scenario; expected one of {', '.join(COURSES)}")
        if point not in POINTS:
            raise ValueError(f"{name!r} has no fault point; expected one of {', '.join(POINTS)}")
        if action not in ACTIONS:
            raise ValueError(f"{name!r} has no action; expected one of {', '.join(ACTIONS)}")
        return cls(scenario, point, int(nth), action, policy, int(seed), bool(disks))


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
            COURSES[case.scenario](world)
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
            course = COURSES[scenario]
            course(world)
            world.settle()
            _check_course(world, EVERY_END_ON[course])
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
