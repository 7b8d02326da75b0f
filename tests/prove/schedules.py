# SPDX-License-Identifier: Apache-2.0
"""Any order of administration, faults and time: a state machine for Hypothesis.

Unlike the sweep, faults here meet each other: hosts that restart while the other one does, a stop
that races with a failover, moves to and fro over several generations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar, Final

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from checkpoint.faultpoints import POINTS
from tests.prove import administrator
from tests.prove.machine import GUEST, Machine
from tests.prove.sweep import ACTIONS
from tests.prove.world import HEARTBEAT, Fault, World

_SIDES = st.sampled_from(("a", "b"))
_BY_HAND: Final[dict[str, Callable[[Machine], bool]]] = {
    "end": administrator.end,
    "move": administrator.move,
    "start": administrator.start,
    "start anew": functools.partial(administrator.start, same=False),
}
_WIRES = st.sampled_from((("link",), ("lan",), ("link", "lan")))


class Hosts(RuleBasedStateMachine):
    """Two hosts, and whatever may happen to them.

    :cvar schedules: runs so far in this process
    """

    schedules: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None

    @initialize(
        seed=st.integers(0, 1 << 30),
        protect=st.booleans(),
        disks=st.booleans(),
        reprotect=st.booleans(),
    )
    def begin(self, seed: int, protect: bool, disks: bool, reprotect: bool) -> None:
        """The daemons run; mostly the guest is protected."""
        self.world = World(seed, policy="hold", disks=disks, reprotect=reprotect)
        self.world.__enter__()
        if protect:
            self.world.protect()

    def _machine(self, side: str) -> Machine:
        assert self.world is not None
        return self.world.machines[side]

    def _ask(self, side: str, operation: str, patient: bool) -> None:
        assert self.world is not None
        machine = self._machine(side)
        standby = {"standby": "b" if side == "a" else "a"} if operation == "start" else {}
        answer = machine.ask(operation, domain=GUEST, **standby)
        if patient:
            self.world.run(lambda: answer.done or not machine.alive, 20)

    @rule(side=_SIDES, patient=st.booleans())
    def start(self, side: str, patient: bool) -> None:
        """``kemari start``."""
        self._ask(side, "start", patient)

    @rule(side=_SIDES, patient=st.booleans())
    def stop(self, side: str, patient: bool) -> None:
        """``kemari stop``."""
        self._ask(side, "stop", patient)

    @rule(side=_SIDES, patient=st.booleans())
    def failover(self, side: str, patient: bool) -> None:
        """``kemari failover``."""
        self._ask(side, "failover", patient)

    @rule(count=st.integers(1, 5))
    def talk(self, count: int) -> None:
        """The client gets some answers, or waits in vain."""
        assert self.world is not None
        self.world.answers(count, 3 * HEARTBEAT)

    @rule()
    def talk_on(self) -> None:
        """The client goes on asking while other things happen."""
        assert self.world is not None
        self.world.talk()

    @rule(seconds=st.sampled_from((0.001, 0.01, 0.1, 0.5, 2.0, 8.0, 40.0)))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        assert self.world is not None
        self.world.wait(seconds)

    @rule(side=_SIDES)
    def kill(self, side: str) -> None:
        """A daemon dies, and is started again."""
        self._machine(side).kill()

    @precondition(lambda self: self.world and all(m.powered for m in self.world.machines.values()))
    @rule(side=_SIDES)
    def power_cut(self, side: str) -> None:
        """A host loses power; never both at once, which nothing survives."""
        self._machine(side).power_cut()

    @precondition(
        lambda self: self.world and not all(m.powered for m in self.world.machines.values())
    )
    @rule()
    def power_on(self) -> None:
        """It has power again, after a time that no host takes less than."""
        assert self.world is not None
        self.world.wait(3 * HEARTBEAT)
        for machine in self.world.machines.values():
            machine.power_on()

    @rule(wires=_WIRES)
    def unplug(self, wires: tuple[str, ...]) -> None:
        """Networks carry nothing."""
        assert self.world is not None
        self.world.log(f"unplugged: {', '.join(wires)}")
        self.world.network.unplugged.update(wires)

    @rule()
    def plug(self) -> None:
        """All networks work again."""
        assert self.world is not None
        self.world.log("plugged")
        self.world.network.unplugged.clear()

    @precondition(lambda self: self.world and self.world.disks is None)
    @rule(side=_SIDES, work=st.sampled_from(sorted(_BY_HAND)))
    def by_hand(self, side: str, work: str) -> None:
        """An administrator works with xl, where that is possible."""
        _BY_HAND[work](self._machine(side))

    @precondition(lambda self: self.world and self.world.disks is not None)
    @rule(side=_SIDES, seconds=st.sampled_from((0.0, 0.5, 3.0, 20.0)))
    def harm_disk(self, side: str, seconds: float) -> None:
        """A call to a disk stands still, or what was written to it is lost."""
        machine = self._machine(side)
        machine.stick(seconds) if seconds else machine.break_disk()

    @rule(side=_SIDES, full=st.booleans())
    def room(self, side: str, full: bool) -> None:
        """A ledger's disk is full, or has room again."""
        machine = self._machine(side)
        machine.fill() if full else machine.make_room()

    @rule(side=_SIDES, beats=st.sampled_from((0.5, 0.9, 1.5, 3.0, 10.0)))
    def stall(self, side: str, beats: float) -> None:
        """A daemon stands still between two of its steps."""
        machine = self._machine(side)
        if machine.process is not None and machine.alive:
            machine.world.log(f"{side}: stands still for {beats} heartbeat times")
            machine.world.simulation.stall(machine.process, beats * HEARTBEAT)

    @rule(
        point=st.sampled_from(sorted(POINTS)),
        nth=st.integers(1, 4),
        action=st.sampled_from(sorted(ACTIONS)),
    )
    def arm(self, point: str, nth: int, action: str) -> None:
        """Something will go wrong where it hurts."""
        assert self.world is not None
        both = action in ("power", "peer-power")

        def act(machine: Machine) -> None:
            if both and not all(each.powered for each in machine.world.machines.values()):
                return
            ACTIONS[action](machine)

        self.world.faults.append(Fault(point, nth, act))

    def teardown(self) -> None:
        """Everything is put right, and all must be well."""
        if self.world is None:
            return
        Hosts.schedules += 1
        try:
            self.world.settle()
        finally:
            self.world.__exit__()


def run(examples: int, *, steps: int = 15, derandomize: bool = True, shortest: bool = True) -> int:
    """Run so many schedules; how many were run.

    :param derandomize: the same ones each time
    :param shortest: look for the shortest schedule once one has failed, which may take minutes
    :raise Violation: with the schedule that Hypothesis found
    """
    before = Hosts.schedules
    run_state_machine_as_test(
        Hosts,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=derandomize,
            phases=[Phase.generate, Phase.shrink] if shortest else [Phase.generate],
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return Hosts.schedules - before
