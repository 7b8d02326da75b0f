# SPDX-License-Identifier: Apache-2.0
"""Whole daemons in the simulated world; ``make prove`` runs far more of the same."""

from __future__ import annotations

import asyncio
import random

import pytest

from checkpoint.faultpoints import POINTS
from checkpoint.memory import MemorySource
from tests.prove import schedules, sweep
from tests.prove.machine import Machine
from tests.prove.simulation import Process, Simulation
from tests.prove.sweep import ACTIONS, SCENARIOS, UNSWEPT, Case, baseline, cases
from tests.prove.world import Fault, Violation, World

# ---- The product ----

#: Each once lost a guest, ran it twice, or left it mute.
FOUND = (
    # A stale copy was let go: its record already had the generation in which the peer runs it.
    Case("planned", "abandon-recorded", 1, "kill"),
    Case("planned", "got-stand-down", 1, "peer-kill"),
    # The shell outlived a promise whose giver died before it had removed it, or recorded it.
    Case("talk_and_stop", "promised", 1, "kill"),
    Case("talk_and_stop", "shell-built", 1, "kill"),
    # A guest stayed paused whose daemon died while it let go.
    Case("declined", "let-go-recorded", 1, "kill", seed=9),
    # Output of an old epoch was seen after the standby had taken over.
    Case("talk_and_stop", "got-pages", 6, "partition"),
    Case("talk_and_stop", "got-ack", 6, "stall"),
    # A standby that had stood still kept a copy that grew old.
    Case("talk_and_stop", "got-state", 10, "stall-long", "release", 7),
    # The time-outs of a primary that stood still passed for the standby's silence.
    Case("primary_killed", "put-stand-down", 1, "stall-long", "release", 7),
)


@pytest.mark.parametrize("case", FOUND, ids=str)
def test_what_was_found_stays_cured(case: Case) -> None:
    outcome = sweep.run(case)
    assert outcome.fired
    assert not outcome.violation, outcome.violation


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenarios_end_well(scenario: str) -> None:
    outcome = baseline(scenario)
    assert not outcome.violation, outcome.violation


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenarios_end_well_where_processors_are_short(
    scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemorySource, "stolen", lambda self: 0.5)
    outcome = baseline(scenario)
    assert not outcome.violation, outcome.violation


def test_every_fault_point_is_reached() -> None:
    reached = {point for scenario in SCENARIOS for point in baseline(scenario).reached}
    assert reached == set(POINTS) - UNSWEPT


@pytest.mark.parametrize("action", ACTIONS)
def test_some_of_the_sweep(action: str) -> None:
    every = [case for case in cases(brief=True) if case.action == action]
    for case in random.Random(action).sample(every, 12):
        outcome = sweep.run(case)
        assert not outcome.violation, f"{case}: {outcome.violation}"


def test_some_schedules() -> None:
    assert schedules.run(40) >= 40


# ---- The simulation itself: it must notice ----


def test_the_same_seed_gives_the_same_run() -> None:
    case = Case("power_cut", "commit-sent", 3, "stall", seed=5)
    one, other = sweep.run(case), sweep.run(case)
    assert one == other
    assert one.reached != sweep.run(Case("power_cut", "commit-sent", 3, "kill", seed=5)).reached


def test_an_answer_too_early_is_noticed() -> None:
    with World(0) as world:
        world.protect()
        world.answers(2)
        device = next(iter(world.a.network.buffers))
        world.a.network.buffers[device].transmit = world.a.network.leave  # type: ignore[method-assign]
        world.answers(2)
        world.a.power_cut()
        with pytest.raises(Violation, match="is of a guest that forgot what it had answered"):
            world.answers(20)


def test_a_guest_that_is_gone_is_noticed() -> None:
    with World(0) as world:
        world.protect()
        world.b.kill()
        world.b.supervised = False
        world.a.hypervisor.destroy_domain("web")
        with pytest.raises(Violation, match="the guest runs nowhere"):
            world.settle()


def test_a_second_copy_is_noticed() -> None:
    with World(0) as world:
        guest = world.a.guest
        assert guest is not None
        world.b.hypervisor.guests["web"] = type(guest)(
            guest.description, world.b.hypervisor.transmit
        )
        with pytest.raises(Violation, match="two copies have visible output"):
            world.wait(0.1)


def test_a_paused_guest_is_noticed() -> None:
    with World(0) as world:
        assert world.a.guest is not None
        world.a.guest.paused = True
        with pytest.raises(Violation, match="the guest is paused"):
            world.settle()


def test_a_fault_of_the_program_is_noticed() -> None:
    with World(0) as world:
        world.protect()
        assert world.a.process is not None

        async def fail() -> None:
            raise ZeroDivisionError

        assert world.a.daemon is not None
        host = world.a.daemon.host
        world.a.process.call_soon(lambda: host.spawn(fail(), "a test") and None)
        with pytest.raises(Violation, match="ZeroDivisionError"):
            world.wait(0.1)


def test_a_killed_process_does_nothing_more_and_a_stalled_one_goes_on() -> None:
    simulation = Simulation(0)
    dead, slow, well = (Process(simulation, name) for name in ("dead", "slow", "well"))
    done: list[str] = []

    async def work(process: Process) -> None:
        try:
            if process is dead:
                simulation.kill(process)
            if process is slow:
                simulation.stall(process, 5.0)
            done.append(f"{process.name} {simulation.now - 1000:.0f}")
            await asyncio.sleep(1.0)
            done.append(f"{process.name} {simulation.now - 1000:.0f}")
        finally:
            done.append(f"{process.name} ends")

    for process in (dead, slow, well):
        process.create_task(work(process))
    assert not simulation.run(lambda: False, 20.0)
    assert done == ["well 0", "well 1", "well ends", "slow 5", "slow 6", "slow ends"]
    simulation.end()
    for process in (dead, slow, well):
        simulation.bury(process)


def test_a_fault_happens_at_its_time_only() -> None:
    with World(0) as world:
        seen: list[str] = []

        def act(machine: Machine) -> None:
            seen.append(f"{machine.name} after {world.reached['commit-sent']}")

        world.faults.append(Fault("commit-sent", 3, act))
        world.protect()
        world.answers(5)
        assert seen == ["a after 3"]
