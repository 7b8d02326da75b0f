# SPDX-License-Identifier: Apache-2.0
"""A guest's life on another host: what a revival does, and what it leaves when it fails."""

from __future__ import annotations

import copy
import errno
import os
import struct
from collections.abc import Callable, Iterable

import pytest

from checkpoint.driver import PAGE_SIZE, Description, Disk
from checkpoint.errors import ReviveError
from checkpoint.guest.memory import RamView
from checkpoint.xen import borrowed, revive, shell, toolstack
from checkpoint.xen.context import Context
from checkpoint.xen.control import Domain
from checkpoint.xen.host import XenHost
from checkpoint.xen.plan import Plan, make_plan
from checkpoint.xen.shell import XenShell
from checkpoint.xen.state import MachineState
from tests.unit.xen_guest import CONSOLE_GFN, DOMID, STORE_GFN, VBD, VIF
from tests.unit.xen_machine import Port
from tests.unit.xen_world import NEW_TIME, OLD_TIME, STUB, World


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


DISK_BACKEND = "/local/domain/0/backend/vbd/3/51712"


# ---- Section: revival ----


def prepared(world: World) -> XenShell:
    """A shell that holds the guest's last epoch."""
    _description, made = world.protect()
    world.capture()
    world.apply(made)
    return made


def test_a_guest_comes_to_life(world: World) -> None:
    made = prepared(world)
    made.revive(world.state, elapsed_ns=7_000_000)
    twin = world.standby.domains[DOMID]
    assert twin.pauses == 0
    # every port has its number, its kind and its vCPU
    assert world.machine.ports == {
        1: Port("unbound", 0),
        2: Port("unbound", 0),
        3: Port("virq", 0, 0),
        4: Port("ipi", 0, 1),
    }
    # xenstored knows the guest's watches, and the ring is as the guest left it
    assert world.ring is not None
    assert [path for path, _token in world.ring.watches] == list(world.rig.kernel.options.watches)
    assert bytes(twin.page(STORE_GFN)) == bytes(world.rig.guest.page(STORE_GFN))
    # the stub left nothing behind
    for gfn in range(STUB, STUB + 5):
        assert bytes(twin.page(gfn)) == world.pages[gfn]
    # vCPUs are the captured ones, later by what has passed
    old, new = Context(world.rig.guest.context), Context(twin.context)
    assert new.vcpus() == [0, 1]
    assert new.vcpu(1).rip == old.vcpu(1).rip
    passed = new.vcpu(1).tsc - old.vcpu(1).tsc
    assert 7_000_000 <= passed < 60 * 10**9
    assert twin.params[0] == 2 << 56 | 0xF3
    # Xen's own pages are where the guest has them
    info = world.rig.layout.shared_info // PAGE_SIZE
    assert twin.placed[info] == (0, 0)
    assert twin.placed[world.rig.layout.grants.gfns[0]] == (1, 0)
    assert int.from_bytes(twin.page(info)[2048:2560], "little") == 0b11110
    # backends were told to attach, and by whom
    assert world.store.nodes[f"{VIF}/state"] == "4"
    assert world.store.nodes[f"{VIF}/tx-ring-ref"] == "8"
    assert world.store.nodes["data/note"] == "caf\xe9"
    assert "memory/target" not in world.store.written
    assert f"{VIF}/backend" not in world.store.written
    assert world.store.written[-1] == "kemari"
    made.settle()
    assert world.renamed == [(DOMID, "web")]
    assert not world.standby.mapped
    assert not world.standby.resources


def test_a_shell_makes_a_call_before_it_is_of_any_use(world: World) -> None:
    _description, made = world.protect()
    assert [command for _number, command, _argument in world.machine.made] == [5]
    assert world.standby.domains[DOMID].pauses == 1
    made.destroy()


def test_a_shell_that_makes_no_call_is_none(world: World) -> None:
    world.machine.refusing[5] = errno.EINVAL
    with pytest.raises(ReviveError, match="status of port 1: the hypervisor answered -22"):
        world.protect()
    assert world.rig.destroyed == [DOMID]
    assert not world.standby.mapped


def test_what_was_foreseen_is_not_found_out_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared(world)
    before = bytes(made.memory)
    ports = dict(world.machine.ports)
    state = world.state
    made.foresee(state)
    assert bytes(made.memory) == before
    assert world.machine.ports == ports
    assert world.standby.domains[DOMID].pauses == 1
    # No backend attaches, and what one will read is there.
    assert f"{VIF}/state" not in world.store.written
    assert world.store.nodes[f"{VIF}/tx-ring-ref"] == "8"

    def again(*_: object) -> None:
        raise AssertionError("this was found out already")

    monkeypatch.setattr(shell, "make_plan", again)
    made.revive(state, elapsed_ns=0)
    assert world.ring is not None
    assert [path for path, _token in world.ring.watches] == list(world.rig.kernel.options.watches)


def test_what_was_foreseen_of_another_epoch_is_not_used(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared(world)
    made.foresee(world.state)
    found: list[bytes] = []

    def again(domain: Domain, description: Description, state: bytes, memory: RamView) -> Plan:
        found.append(state)
        return make_plan(domain, description, state, memory)

    monkeypatch.setattr(shell, "make_plan", again)
    later = bytes(bytearray(world.state))  # as equal as can be, and of another epoch all the same
    made.revive(later, elapsed_ns=0)
    assert found == [later]


def test_a_look_ahead_that_comes_too_late_touches_nothing(world: World) -> None:
    made = prepared(world)
    state = MachineState.from_bytes(world.state)
    state.store["data/note"] = "of an earlier epoch"
    earlier = state.to_bytes()
    made.revive(world.state, elapsed_ns=0)
    world.store.written.clear()
    made.foresee(earlier)
    made.settle()
    made.foresee(earlier)
    assert world.store.written == []
    assert world.store.nodes["data/note"] == "caf\xe9"


def test_a_look_ahead_that_fails_spoils_nothing(world: World) -> None:
    made = prepared(world)
    state = MachineState.from_bytes(world.state)
    state.pages.pop(STORE_GFN)
    with pytest.raises(ReviveError, match="no page 0xfeffc"):
        made.foresee(state.to_bytes())
    made.revive(world.state, elapsed_ns=0)
    made.settle()
    assert not world.standby.mapped


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda state: state.pages.pop(STORE_GFN), "no page 0xfeffc"),
        (lambda state: state.params.clear(), "no HVM parameter 0"),
        (lambda state: state.events.clear(), r"made event channels \[1, 2\]"),
        (lambda state: state.grants.extend([bytes(PAGE_SIZE)] * 1000), "grant frames .expected"),
    ],
)
def test_a_state_that_cannot_be_run_is_known_before(
    world: World, damage: Callable[[MachineState], object], reason: str
) -> None:
    made = prepared(world)
    made.examine(world.state)
    state = MachineState.from_bytes(world.state)
    damage(state)
    with pytest.raises(ReviveError, match=reason):
        made.examine(state.to_bytes())
    with pytest.raises(ReviveError, match=reason):
        made.revive(state.to_bytes(), 0)
    assert world.standby.domains[DOMID].pauses == 1


@pytest.mark.parametrize("word", ["", "shared:"])
def test_a_disk_attaches_to_its_ring(world: World, word: str) -> None:
    target = f"{word}/disk"
    world.config["disks"] = [{"vdev": "xvda", "script": "block-kemari", "pdev_path": target}]
    world.rig.add_disk()
    world.store.nodes |= {f"{VBD}/backend": DISK_BACKEND, f"{VBD}/virtual-device": "51712"}
    world.store.others |= {
        f"{DISK_BACKEND}/dev": "xvda",
        f"{DISK_BACKEND}/params": target,
        f"{DISK_BACKEND}/mode": "w",
    }
    made = prepared(world)
    disk = Disk(51712, "xvda", "/disk", writable=True, shared=bool(word))
    assert made.disks == world.source.disks == [disk]
    world.store.nodes[f"{VBD}/backend"] = DISK_BACKEND
    made.revive(world.state, elapsed_ns=0)
    assert world.store.nodes[f"{VBD}/ring-ref"] == "11"
    assert world.store.nodes[f"{VBD}/state"] == "4"
    assert world.store.others[f"{DISK_BACKEND}/state"] == "4"  # it was waited for
    assert not {f"{VBD}/backend", f"{VBD}/virtual-device"} & set(world.store.written)


def test_grants_are_restored_unused_but_for_the_toolstacks(world: World) -> None:
    made_entries = {5: (1 | 0x18, 0x310), 300: (1 | 0x10 | 4, 0x311)}
    for reference, (flags, gfn) in made_entries.items():
        world.rig.guest.grant(reference, gfn, flags)
    world.rig.guest.grant(0, 0x99)
    made = prepared(world)
    twin = world.standby.domains[DOMID]
    twin.grant(0, CONSOLE_GFN)
    twin.grant(1, STORE_GFN)
    made.revive(world.state, 0)
    entries = list(struct.iter_unpack("<HHI", twin.grants[:PAGE_SIZE]))
    assert entries[0] == (1, 0, CONSOLE_GFN)
    assert entries[1] == (1, 0, STORE_GFN)
    assert entries[5] == (1, 0, 0x310)
    assert entries[300] == (1 | 4, 0, 0x311)
    assert entries[8] == (1, 0, 0x300)


def test_the_guests_clock_goes_on(world: World) -> None:
    made = prepared(world)
    clock = world.rig.layout.clock

    def offset() -> int:
        return int.from_bytes(made.memory[clock.sched_clock_offset :][:8], "little")

    before = offset()
    made.revive(world.state, elapsed_ns=5_000_000_000)
    # at the capture OLD_TIME + 1 ms; now NEW_TIME and the ticks since the stub's time was written
    moved = (offset() - before + (1 << 63)) % (1 << 64) - (1 << 63)
    expected = NEW_TIME - (OLD_TIME + 1_000_000 + 5_000_000_000)
    assert abs(moved - expected) < 60 * 10**9
    assert moved < 0


def test_every_vcpu_gets_its_events_raised(world: World) -> None:
    made = prepared(world)
    made.revive(world.state, 0)
    for cpu in world.rig.layout.cpus:
        info = bytes(made.memory[cpu.vcpu_info : cpu.vcpu_info + 64])
        assert info[0] == 1
        assert info[8:16] == b"\xff" * 8


def test_per_vcpu_vectors_are_registered_and_requested(world: World) -> None:
    world.rig.guest.params[0] = 1
    made = prepared(world)
    made.revive(world.state, 0)
    vectors = [argument for number, _, argument in world.machine.made if number == 34]
    assert vectors == [struct.pack("<IB3x", vcpu, 0xF3) for vcpu in (0, 1)]
    context = world.standby.domains[DOMID].context
    requested = Context(world.rig.guest.context)
    for vcpu in (0, 1):
        requested.request_interrupt(vcpu, 0xF3)
    at = context.rindex(struct.pack("<HHI", 6, 0, 1024))
    assert context[at:] == requested.to_bytes()[at:]


def test_a_guest_with_more_ports_than_one_run_of_the_stub_can_make(world: World) -> None:
    world.rig.guest.ports |= {port: (5, port % 2, 0, 0) for port in range(5, 400)}
    del world.rig.guest.ports[128]
    made = prepared(world)
    made.revive(world.state, 0)
    assert sorted(world.machine.ports) == sorted(world.rig.guest.ports)
    assert world.stub_runs >= 2


def refused(world: World, made: XenShell, reason: str) -> None:
    """Revival fails, and leaves the shell paused."""
    with pytest.raises(ReviveError, match=reason):
        made.revive(world.state, 0)
    assert world.standby.domains[DOMID].pauses == 1


def test_a_port_that_cannot_be_made(world: World) -> None:
    made = prepared(world)
    world.machine.ports[3] = Port("unbound", 0)
    refused(world, made, "made port 4")


def test_a_stub_that_does_not_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepared(world)
    del world.standby.before["xc_domain_unpause"]
    monkeypatch.setattr(borrowed, "_BOUND", 0.01)
    refused(world, made, "stub did not end within 0.01 s")


def end_in_the_stub(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell's vCPU will do something for which Xen ends the domain."""
    del world.standby.before["xc_domain_unpause"]
    monkeypatch.setattr(os, "sched_yield", lambda: world.standby.domains.pop(DOMID, None))
    monkeypatch.setattr(borrowed, "_LOOK", 0.0)


def test_a_shell_that_ends_in_the_stub(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepared(world)
    end_in_the_stub(world, monkeypatch)
    with pytest.raises(ReviveError, match="the shell did not survive the revive stub"):
        made.revive(world.state, 0)


def test_a_shell_that_ends_in_its_rehearsal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def restore(stream: Iterable[bytes]) -> None:
        world.restore(stream)
        end_in_the_stub(world, monkeypatch)

    monkeypatch.setattr(toolstack, "restore_paused", restore)
    # Whoever asks for the protection reads this, and not that there is nothing to destroy.
    with pytest.raises(ReviveError, match="the shell did not survive the revive stub"):
        world.protect()
    assert world.rig.destroyed == []
    assert not world.standby.mapped


def test_a_xenstored_that_does_not_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepared(world)
    monkeypatch.setattr(os, "sched_yield", lambda: None)
    monkeypatch.setattr(revive, "_STORE_BOUND", 0.01)
    refused(world, made, "xenstored has not answered the guest's watches")


def test_a_backend_that_does_not_connect(world: World) -> None:
    made = prepared(world)
    world.store.connects = False
    refused(world, made, "is in state 2 .expected 4")


def test_vifs_that_were_not_connected_are_left_alone(world: World) -> None:
    world.rig.store.nodes[f"{VIF}/state"] = "6"
    made = prepared(world)
    world.store.connects = False
    made.revive(world.state, 0)
    assert f"{VIF}/state" not in world.store.written


def test_a_port_of_the_toolstack_that_the_guest_has_not(world: World) -> None:
    del world.rig.guest.ports[2]
    made = prepared(world)
    refused(world, made, r"toolstack made event channels \[1, 2\]")


def test_a_revived_guest_counts_as_the_guest_before_it_has_its_name(world: World) -> None:
    made = prepared(world)
    assert not XenHost().domain_exists("web")
    made.revive(world.state, 0)
    assert XenHost().domain_exists("web")
    assert not XenHost().destroy_shell("web")


def test_the_description_is_not_changed(world: World) -> None:
    description, _made = world.protect()
    kept = copy.deepcopy(description)
    world.capture()
    assert description == kept
    assert shell.SUFFIX not in str(description.detail["config"])
