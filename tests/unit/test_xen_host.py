# SPDX-License-Identifier: Apache-2.0
"""What a host finds out about a guest, and the shells that it builds."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from checkpoint.driver import PAGE_SIZE, Description
from checkpoint.errors import CheckpointError, HypervisorError, LogTaken, UnsupportedGuest
from checkpoint.xen import toolstack
from checkpoint.xen.context import Context
from checkpoint.xen.host import XenHost
from checkpoint.xen.mapping import end_of_ram
from tests.unit.xen_guest import CONSOLE_GFN, DATA, DOMID, HOLE, STORE_GFN, VIF, with_hole
from tests.unit.xen_world import ACPI_GFN, KHZ, World


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


# ---- Section: looking at a guest ----


def test_what_is_described_of_a_guest(world: World) -> None:
    found = XenHost().open_source("web")
    description = found.description
    assert (description.name, description.domid, description.vcpus) == ("web", DOMID, 2)
    assert description.pages == world.rig.pages
    detail = json.loads(json.dumps(description.detail))
    assert detail["static"] == {str(ACPI_GFN): bytes(world.rig.guest.page(ACPI_GFN)).hex()}
    assert detail["special"] == [STORE_GFN, CONSOLE_GFN]
    assert detail["ports"] == [1, 2]
    assert detail["params"] == {"1": STORE_GFN, "17": CONSOLE_GFN, "36": 8}
    assert detail["holes"] == []
    assert [(nic.devid, nic.vif, nic.mac, nic.bridge) for nic in found.nics] == [
        (0, "vif3.0", "aa:bb:cc:dd:ee:ff", "xenbr0")
    ]
    assert world.rig.guest.pauses == 0
    assert not world.primary.mapped
    assert not world.primary.buffers
    assert not world.rig.guest.logging


def test_a_guest_with_memory_beyond_4_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    with_hole(monkeypatch)
    world = World(monkeypatch)
    ram = world.rig.pages - len(HOLE)
    world.config["b_info"] = {"max_memkb": ram * 4, "target_memkb": ram * 4}
    description = XenHost().open_source("web").description
    assert description.pages == world.rig.pages
    assert description.detail["holes"] == []

    world.xen = world.standby
    made = XenHost().create_shell(description)
    (stream,) = world.streams
    frames = [gfn for batch in stream.batches for gfn in batch]
    assert frames == [
        *range(HOLE.start),
        *sorted([ACPI_GFN, STORE_GFN, CONSOLE_GFN]),
        *range(HOLE.stop, world.rig.pages),
    ]
    assert len(made.memory) == world.rig.pages * PAGE_SIZE
    made.memory[HOLE.start * PAGE_SIZE] = 1  # a primary that lies; nobody is harmed
    made.destroy()


@pytest.mark.parametrize(("pages", "end"), [(0xFC000, 0xFC000), (0xFC001, 0x100001)])
def test_ram_goes_on_behind_what_is_none(pages: int, end: int) -> None:
    assert end_of_ram(pages) == end


def test_a_guest_whose_memory_lies_where_it_is_not_expected(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpoint.xen.host._BUILDER_PAGES", 0)
    with pytest.raises(UnsupportedGuest, match="has 1 pages from frame 0xfc000 on"):
        XenHost().open_source("web")
    assert not world.primary.mapped


def test_a_guest_that_was_revived_has_its_own_name_before_it_is_renamed(world: World) -> None:
    world.store.nodes |= {"name": "web--kemari", "kemari": "revived"}
    for domain in ("web", str(DOMID)):
        assert XenHost().open_source(domain).description.name == "web"
    assert XenHost().domains() == [(DOMID, "web")]


def test_a_guest_is_found_by_its_number_too(world: World) -> None:
    assert XenHost().open_source(str(DOMID)).description.name == "web"
    with pytest.raises(UnsupportedGuest, match="no domain 'db' on this host"):
        XenHost().open_source("db")


@pytest.mark.parametrize(
    ("section", "changes", "reason"),
    [
        ("c_info", {"type": "pv"}, "is a PV guest .* no dirty log"),
        ("c_info", {"type": "hvm"}, "is a HVM guest .* emulated devices"),
        ("b_info", {"target_memkb": 4096}, "has 4096 KiB of memory and could have 8192 KiB"),
        ("", {"disks": [{"vdev": "xvda"}]}, "disk xvda .* is not replicated .*block-kemari"),
        ("", {"disks": [{"vdev": "xvdb", "script": "block"}]}, "disk xvdb .* is not replicated"),
        ("", {"pcidevs": [{}]}, "has a passed-through PCI device"),
    ],
)
def test_guests_that_cannot_be_protected(
    world: World, section: str, changes: dict[str, Any], reason: str
) -> None:
    (world.config[section] if section else world.config).update(changes)
    with pytest.raises(UnsupportedGuest, match=reason):
        XenHost().open_source("web")
    assert world.rig.guest.pauses == 0
    assert not world.rig.guest.logging


@pytest.mark.parametrize(("flags", "reason"), [(0x106, "is not running"), (2, "without hardware")])
def test_guests_in_a_state_that_will_not_do(world: World, flags: int, reason: str) -> None:
    world.rig.guest.flags = flags
    with pytest.raises(UnsupportedGuest, match=reason):
        XenHost().open_source("web")


def test_a_backend_elsewhere(world: World) -> None:
    world.store.nodes[f"{VIF}/backend"] = "/local/domain/7/backend/vif/3/0"
    with pytest.raises(UnsupportedGuest, match="backend in another domain"):
        XenHost().open_source("web")


@pytest.mark.parametrize(
    "call",
    ["xc_domain_hvm_getcontext", "xenforeignmemory_map2", "xc_hvm_param_get",
     "xc_cpu_policy_get_size", "xc_domain_get_tsc_info"],
)  # fmt: skip
def test_looking_that_fails_leaves_the_guest_as_it_was(world: World, call: str) -> None:
    world.primary.failing[call] = (0, 1)
    with pytest.raises(HypervisorError, match=call):
        XenHost().open_source("web")
    assert world.rig.guest.pauses == 0
    assert not world.primary.mapped
    assert not world.primary.buffers


def test_a_guest_that_is_protected_is_not_looked_at_again(world: World) -> None:
    here = XenHost()
    protected = here.open_source("web")
    protected.track()
    with pytest.raises(CheckpointError, match="domain 'web' is protected"):
        here.open_source("web")
    assert world.rig.guest.logging
    protected.untrack()
    here.open_source("web").untrack()


def test_what_a_killed_daemon_left_is_set_right(world: World) -> None:
    guest = world.rig.guest
    guest.logging, guest.pauses = True, 1
    XenHost().recover("db")
    assert (guest.logging, guest.pauses) == (True, 1)
    for _ in range(2):
        XenHost().recover("web")
        assert (guest.logging, guest.pauses) == (False, 0)


def test_a_log_is_set_right_only_if_it_is_ours(world: World) -> None:
    guest = world.rig.guest
    here = XenHost()
    here.open_source("web").track()
    XenHost().recover("web")
    assert not guest.logging, "that of a killed daemon, which left the guest running"
    guest.logging = True
    XenHost().recover("web")
    with pytest.raises(LogTaken):
        XenHost().open_source("web")
    assert guest.logging, "that of another program"


def test_the_domains_of_a_host(world: World) -> None:
    assert XenHost().domains() == [(DOMID, "web")]
    assert XenHost().domain_exists("web")
    assert not XenHost().destroy_shell("web")
    world.store.nodes["name"] = "web--kemari"
    assert not XenHost().domain_exists("web")
    assert XenHost().destroy_shell("web")
    assert world.rig.destroyed == [DOMID]


def test_no_two_domains_are_the_same_incarnation(world: World) -> None:
    world.store.nodes["vm"] = "/vm/8b0cd9ff"
    assert XenHost().incarnation("web") == "", "xenstore says nothing of it"
    world.store.others["/vm/8b0cd9ff/start_time"] = "1700000000.01"
    first = XenHost().incarnation("web")
    assert first == XenHost().incarnation("web") != ""
    world.store.others["/vm/8b0cd9ff/start_time"] = "1700000060.01"
    assert XenHost().incarnation("web") not in (first, "")
    assert XenHost().incarnation("db") == ""
    assert world.store.open == 0


def test_a_revived_guest_is_given_its_name(world: World) -> None:
    assert not XenHost().settle("web")
    world.store.nodes["name"] = "web--kemari"
    assert not XenHost().settle("web"), "that of a shell"
    world.store.nodes["kemari"] = "revived"
    assert not XenHost().settle("db")
    assert XenHost().settle("web")
    assert world.renamed == [(DOMID, "web")]
    assert world.store.open == 0


def test_the_uuid_of_a_domain(world: World) -> None:
    uuid = "8b0cd9ff-04ba-4ef2-9d10-b15b3ef0eac1"
    world.store.nodes["vm"] = f"/vm/{uuid}"
    assert XenHost().domain_uuid("web") == uuid
    assert XenHost().domain_uuid("db") == ""
    world.store.nodes["name"] = "web--kemari"
    assert XenHost().domain_uuid("web") == "", "that of a shell"
    assert world.store.open == 0


# ---- Section: shells ----


def test_a_shell_is_the_guest_without_its_memory(world: World) -> None:
    description, made = world.protect()
    (stream,) = world.streams
    assert stream.config["c_info"] == world.config["c_info"] | {"name": "web--kemari"}
    assert [gfn for batch in stream.batches for gfn in batch] == [
        *range(world.rig.pages), ACPI_GFN, STORE_GFN, CONSOLE_GFN,
    ]  # fmt: skip
    assert stream.params == {1: STORE_GFN, 17: CONSOLE_GFN, 36: 8}
    assert Context(stream.bodies[9]).vcpus() == [0]
    assert 8 not in stream.bodies  # both hosts count alike
    twin = world.standby.domains[DOMID]
    assert bytes(twin.page(ACPI_GFN)) == bytes(world.rig.guest.page(ACPI_GFN))
    assert not any(any(twin.page(gfn)) for gfn in (0, DATA, STORE_GFN))
    made.memory[DATA * PAGE_SIZE : DATA * PAGE_SIZE + 4] = b"here"
    assert bytes(twin.page(DATA)[:4]) == b"here"
    assert [nic.vif for nic in made.nics] == ["vif3.0"]
    assert description.domid == made.domid
    made.destroy()
    made.destroy()
    assert world.rig.destroyed == [DOMID]
    assert not world.standby.mapped


def test_a_host_that_counts_otherwise_emulates_the_guests_clock(world: World) -> None:
    world.standby.khz = 2 * KHZ
    world.protect()
    assert struct.unpack("<IIQII", world.streams[0].bodies[8]) == (2, KHZ, 123, 1, 0)


def test_a_number_that_is_taken(world: World) -> None:
    world.standby.add(DOMID, 1)
    world.rig.store.nodes["name"] = "web"
    with pytest.raises(CheckpointError, match=r"'web' exists|number 3 is in use"):
        world.protect()
    assert world.streams == []


def test_too_little_memory(world: World) -> None:
    world.standby.free_pages = 2048
    with pytest.raises(CheckpointError, match=r"has 8 MiB of free memory \(expected 16 MiB\)"):
        world.protect()


def test_other_ports_than_the_guests_are_refused_at_once(world: World) -> None:
    world.toolstack_params = {2: 2, 18: 1}
    with pytest.raises(CheckpointError, match=r"event channels \[2, 1\] .*expected \[1, 2\]"):
        world.protect()
    assert world.rig.destroyed == [DOMID]
    assert not world.standby.mapped


@pytest.mark.parametrize("works", [0, 1])
def test_a_shell_that_cannot_be_mapped_is_removed(world: World, works: int) -> None:
    world.primary.before["xc_domain_get_tsc_info"] = lambda *_: None
    world.standby.failing["xenforeignmemory_map2"] = (works, 12)
    with pytest.raises(HypervisorError):
        world.protect()
    assert world.rig.destroyed == [DOMID]
    assert not world.standby.mapped


@pytest.mark.parametrize(
    ("theirs", "ours", "accepted"),
    [
        ("4.17", "4.17", True),
        ("4.17", "4.20", True),
        ("4.20", "4.17", False),
        ("4.9", "4.20", False),
    ],
)
def test_guests_of_a_newer_xen_are_refused(
    world: World, theirs: str, ours: str, accepted: bool
) -> None:
    world.primary.release.name, world.standby.release.name = theirs, ours
    if accepted:
        world.protect()
        assert world.streams[0].xen == tuple(map(int, theirs.split(".")))
    else:
        with pytest.raises(CheckpointError, match=rf"runs Xen {theirs} \(expected {ours} or"):
            world.protect()
        assert world.streams == []


def test_a_guest_of_another_driver(world: World) -> None:
    other = Description("web", "u", 1, 1, 1, "memory")
    with pytest.raises(CheckpointError, match="the driver 'memory'"):
        XenHost().create_shell(other)


def test_a_shell_that_could_not_be_destroyed_can_be_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    _description, made = world.protect()

    def broken(_domid: int) -> None:
        raise CheckpointError("xl destroy failed")

    with monkeypatch.context() as patch:
        patch.setattr(toolstack, "destroy", broken)
        with pytest.raises(CheckpointError, match="xl destroy failed"):
            made.destroy()
    made.destroy()
    assert world.rig.destroyed == [DOMID]
