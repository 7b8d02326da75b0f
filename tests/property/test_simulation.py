# SPDX-License-Identifier: Apache-2.0
"""Whole daemons in the simulated world; ``make prove`` runs far more of the same."""

from __future__ import annotations

import asyncio
import random

import pytest

from checkpoint.faultpoints import POINTS
from checkpoint.memory import MemorySource
from kemari.ledger import Role
from tests.prove import administrator, schedules, sweep
from tests.prove.disks import CHUNK, HostDisk
from tests.prove.machine import GUEST, Machine
from tests.prove.mutants import SHOWN_BY
from tests.prove.scenarios import SCENARIOS, WORLDS
from tests.prove.simulation import Process, Simulation
from tests.prove.sweep import ACTIONS, UNSWEPT, Case, baseline, cases
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
    # The daemon's own fault, not the end of the connection, was what ended a copy of disks.
    Case("primary_killed", "put-pages", 9, "stall", "release", 7, disks=True),
    # A restart in front of a full disk left a takeover unrecorded for good.
    Case("unrecorded", "takeover-recorded", 1, "kill"),
    # A restarted primary went by its policy although it had handed its guest over.
    Case("carried_over", "ledger-written", 10, "stall-long", "release"),
    # What was held of an old copy that was gone was taken for a new guest's.
    Case("brought_back", "abandon-destroyed", 1, "kill", "release", 546704033),
    # A host said from memory that it ran a guest that had been moved away since.
    Case("carried_over", "put-heartbeat", 1, "unplug", "hold", 4),
    # A standby's debt that a full disk left unrecorded was forgotten, and its copy grew old.
    Case("talk_and_stop", "apply-batch", 2, "peer-full-stall", "release", 242153294),
)


@pytest.mark.parametrize("case", FOUND, ids=str)
def test_what_was_found_stays_cured(case: Case) -> None:
    outcome = sweep.run(case)
    assert outcome.fired
    assert not outcome.violation, outcome.violation


@pytest.mark.parametrize("name", sorted(set(SHOWN_BY.values())))
def test_what_shows_a_mutant_is_no_violation_otherwise(name: str) -> None:
    outcome = sweep.run(Case.parse(name))
    assert outcome.fired
    assert not outcome.violation, outcome.violation


@pytest.mark.parametrize(("scenario", "disks"), WORLDS)
def test_scenarios_end_well(scenario: str, disks: bool) -> None:
    outcome = baseline(scenario, disks=disks)
    assert not outcome.violation, outcome.violation


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenarios_end_well_where_processors_are_short(
    scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemorySource, "stolen", lambda self: 0.5)
    outcome = baseline(scenario)
    assert not outcome.violation, outcome.violation


def test_every_fault_point_is_reached() -> None:
    runs = [baseline(scenario) for scenario in SCENARIOS]
    runs.append(baseline("there_and_back", disks=True))
    assert {point for run in runs for point in run.reached} == set(POINTS) - UNSWEPT


@pytest.mark.parametrize("disks", [False, True])
@pytest.mark.parametrize("moment", [0.004, 0.012, 0.03])
def test_who_stops_a_beginning_protection_twice_gets_two_answers(
    disks: bool, moment: float
) -> None:
    with World(3, disks=disks) as world:
        world.a.ask("start", domain=GUEST, standby="b")
        world.wait(moment)
        first = world.a.ask("stop", domain=GUEST)
        world.wait(0.0005)
        second = world.a.ask("stop", domain=GUEST)
        assert world.run(lambda: first.done and second.done, 30)
        world.settle()


@pytest.mark.parametrize("action", ACTIONS)
def test_some_of_the_sweep(action: str) -> None:
    every = [case for case in cases(brief=True) if case.action == action]
    for case in random.Random(action).sample(every, min(12, len(every))):
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


def test_a_ledger_that_does_not_say_who_runs_the_guest_is_noticed() -> None:
    with World(0) as world:
        world.protect()
        assert world.a.daemon is not None
        world.a.daemon.host.ledger.update(world.uuid, role=Role.STANDBY)
        with pytest.raises(Violation, match="in whose ledger it is standby"):
            world.settle()


def test_the_end_of_a_guest_that_runs_nowhere_else_is_noticed() -> None:
    with World(0) as world:
        assert administrator.end(world.a)
        assert administrator.start(world.b)
        assert world.answers(2)
        with pytest.raises(Violation, match="which runs nowhere else"):
            world.b.hypervisor.destroy_domain("web")


def test_a_guest_that_is_moved_by_hand_remembers_all() -> None:
    with World(0) as world:
        assert world.answers(3)
        assert administrator.move(world.a)
        assert not administrator.start(world.a), "it runs on b"
        assert world.answers(3)
        assert world.answered >= 6


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


def test_a_thread_that_stands_still_holds_nobody_up() -> None:
    simulation = Simulation(0)
    process = Process(simulation, "one")
    done: list[str] = []

    async def work(seconds: float) -> None:
        await asyncio.to_thread(simulation.hang, seconds)
        done.append(f"{seconds:g} s, {simulation.now - 1000:.0f}")

    for seconds in (5.0, 2.0):
        process.create_task(work(seconds))
    assert not simulation.run(lambda: False, 20.0)
    assert done == ["2 s, 2", "5 s, 5"]
    simulation.end()
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


# ---- The guest's disk: it must notice ----


def _disks(world: World) -> tuple[HostDisk, HostDisk]:
    assert world.a.disk is not None
    assert world.b.disk is not None
    return world.a.disk, world.b.disk


def test_after_a_failover_both_copies_are_brought_together_and_marks_are_cleared() -> None:
    with World(1, disks=True) as world:
        one, other = _disks(world)
        world.protect()
        world.answers(5)
        world.busy(5)
        world.a.power_cut(back_after=2.0)
        world.answers(5)
        world.wait(2.5)
        assert world.disks is not None
        assert world.disks.revivals == 1
        assert one.known.marked, "what a had written on is marked"
        world.protect("b")
        world.answers(5)
        world.wait(6.0)
        assert not one.known.marked | other.known.marked
        assert one.target.now == other.target.now
        assert one.target.stable == other.target.stable


def test_a_change_under_the_guest_is_noticed() -> None:
    with World(0, disks=True) as world:
        _disks(world)[0].target.write(9 * CHUNK, b"somebody else's")
        with pytest.raises(Violation, match="has changed under the guest"):
            world.answers(2)


def test_a_flush_that_hides_a_failure_is_noticed() -> None:
    with World(0, disks=True) as world:
        one, _ = _disks(world)
        world.busy(2)
        one.target.break_writing_back()
        assert one.server is not None
        assert not one.server.flush(), "it is told once"
        with pytest.raises(Violation, match="not all is on the disk"):
            world.answers(2)


def test_a_difference_that_is_not_marked_is_noticed() -> None:
    with World(0, disks=True) as world:
        world.protect()
        world.answers(3)
        world.wait(6.0)
        with pytest.raises(Violation, match="may differ on the two hosts, and is not marked"):
            _disks(world)[1].target.write(9 * CHUNK, b"a stray write")


@pytest.mark.parametrize("late", [False, True])
def test_a_disk_of_another_epoch_is_noticed(late: bool) -> None:
    with World(0, disks=True) as world:
        world.protect()
        world.answers(3)
        one, other = _disks(world)
        if late:
            world.busy(1)
            other.target.now[:] = one.target.now
        else:
            other.target.now[:] = bytes(len(other.target.now))
        world.a.power_cut()
        match = "holds a change of a later epoch" if late else "a change is missing"
        with pytest.raises(Violation, match=match):
            world.answers(3)


def test_a_copy_that_no_guest_could_have_seen_is_noticed() -> None:
    with World(0, disks=True) as world:
        world.protect()
        world.answers(5)
        other = _disks(world)[1]
        world.wait(0.5)
        other.target.stable[CHUNK : CHUNK + 512] = bytes(512)
        with pytest.raises(Violation, match=r"lacks request 0, of 5, after a power cut|may differ"):
            world.b.power_cut()
