# SPDX-License-Identifier: Apache-2.0
"""What a booted guest's layout says, its way to the standby, and guests that are refused."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

import pytest

from checkpoint.errors import ProtocolError, UnsupportedGuest
from checkpoint.guest.layout import LinuxLayout
from checkpoint.guest.linux import Registers, read_kernel, read_layout
from tests.unit.guest_kernel import DIRECT, IMAGE_PA, RELEASE, GuestKernel, Options, build


def layout(kernel: GuestKernel) -> LinuxLayout:
    return read_layout(kernel.memory, kernel.registers)


@pytest.mark.parametrize("order", ["6.1-first", "6.1", "6.4"])
@pytest.mark.parametrize("absolute_percpu", [True, False])
def test_a_fifo_guest(order: str, absolute_percpu: bool) -> None:
    kernel = build(Options(order=order, absolute_percpu=absolute_percpu, cpus=4))
    found = layout(kernel)
    assert found.release == RELEASE
    assert found.page_table == kernel.pa(kernel.symbol("init_top_pgt"))
    assert found.possible_cpus == 4
    assert [cpu.vcpu for cpu in found.cpus] == [0, 1, 2, 3]
    for cpu in found.cpus:
        assert cpu.registered
        assert cpu.vcpu_info == kernel.percpu("xen_vcpu_info", cpu.cpu)
        assert cpu.runstate == kernel.percpu("xen_runstate", cpu.cpu) == cpu.runstate_va - DIRECT
        assert cpu.old_runstate == kernel.percpu("old_runstate_time", cpu.cpu)
        assert cpu.control_block == 0x50000 + cpu.cpu * 4096
        assert cpu.queue == kernel.percpu("cpu_queue", cpu.cpu)
    assert found.shared_info == 0x30000
    assert found.grants.gfns == (0x7FFF, 0x7FFE, 0x7FFD, 0x7FFC)
    assert found.grants.version == 1
    assert found.fifo is not None
    assert found.fifo.array == kernel.pa(kernel.symbol("event_array"))
    assert found.clock.clocksource == "xen"


def test_a_two_level_guest() -> None:
    found = layout(build(Options(fifo=False, clocksource="tsc")))
    assert found.fifo is None
    assert {(cpu.control_block, cpu.queue) for cpu in found.cpus} == {(None, None)}
    assert found.clock.clocksource == "tsc"


def test_cpus_that_were_never_started_are_left_out() -> None:
    kernel = build(Options(cpus=5))
    kernel.poke(kernel.percpu("xen_vcpu", 2), 0)
    kernel.poke(kernel.percpu("xen_vcpu", 1), DIRECT + 0x30000 + 64)
    kernel.poke(kernel.percpu("xen_vcpu", 4), DIRECT + 0x30000)
    kernel.poke(kernel.percpu("xen_vcpu_id", 4), 0xFFFF_FFFF, size=4)
    found = layout(kernel)
    assert [cpu.cpu for cpu in found.cpus] == [0, 1, 3]
    assert found.possible_cpus == 5
    assert not found.cpus[1].registered
    assert found.cpus[1].vcpu_info == 0x30040


def test_five_levels_and_page_table_isolation() -> None:
    kernel = build(Options(la57=True, isolated=True))
    expected = layout(kernel)
    user = [Registers(0, 0, 0), Registers(kernel.user_cr3, 1 << 12, kernel.lstar)]
    assert read_layout(kernel.memory, user) == expected
    assert expected.la57


def test_it_travels_as_json() -> None:
    for options in (Options(), Options(fifo=False, vsyscall=True)):
        found = layout(build(options))
        assert LinuxLayout.from_json(json.loads(json.dumps(found.to_json()))) == found


def _change(value: Any, path: tuple[Any, ...], new: object) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = new
    return value


@pytest.mark.parametrize(
    ("path", "new", "said"),
    [
        (("release",), 5, "layout's release is not what is expected there"),
        (("release",), "x" * 5000, "layout's release is not what is expected there"),
        (("la57",), 1, "la57 is not what is expected there"),
        (("page_table",), True, "page_table is not what is expected there"),
        (("page_table",), -1, "page_table is not what is expected there"),
        (("page_table",), 1 << 64, "page_table is not what is expected there"),
        (("more",), 1, "layout does not have exactly the members release"),
        (("grants",), None, "layout's grants does not have exactly the members gfns"),
        (("grants", "gfns"), "abc", "grants's gfns is not a list"),
        (("cpus", 0, "vcpu"), 1.5, "cpus's vcpu is not what is expected there"),
        (("cpus",), [None], "cpus does not have exactly the members"),
        (("clock", "code", 0), [1, 2, 3], "code does not have 2 items"),
        (("fifo", "array"), None, "fifo's array is not what is expected there"),
        (("clock", "bases"), [{}] * 200_000, "bases is not a list of at most"),
    ],
)
def test_a_layout_from_the_network_is_checked(
    path: tuple[Any, ...], new: object, said: str
) -> None:
    value = layout(build()).to_json()
    with pytest.raises(ProtocolError, match=said):
        LinuxLayout.from_json(_change(json.loads(json.dumps(value)), path, new))
    with pytest.raises(ProtocolError, match="does not have exactly the members"):
        LinuxLayout.from_json([value])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("xen_domain_type", "it cannot be seen whether it runs on Xen"),
        ("xen_vcpu_info", "what Xen shares with each virtual CPU cannot be found"),
        ("cpu_queue", "its FIFO event channels cannot be moved"),
        ("evtchn_ops", "its event channels cannot be moved"),
        ("nr_grant_frames", "its grant table cannot be found"),
        ("xs_state_users", "it cannot be seen whether its xenstore connection is at rest"),
        ("watches", "its xenstore watches cannot be set again"),
        ("shadow_timekeeper", "its clocks cannot go on after a move"),
        ("linux_banner", "its version cannot be told"),
    ],
)
def test_a_missing_symbol_is_named_with_what_it_is_for(name: str, said: str) -> None:
    kernel = build(Options(without=(name,)))
    with pytest.raises(UnsupportedGuest, match=f"no symbol '{name}'; expected one, and so {said}"):
        layout(kernel)


@pytest.mark.parametrize(
    ("where", "values", "said"),
    [
        ("xen_domain_type", [0], "does not use Xen's interfaces"),
        ("nr_cpu_ids", [9000], "counts 9000 CPUs; expected 1 to 8192"),
        ("__cpu_possible_mask", [0], "has 0 CPUs set up for Xen"),
        ("evtchn_ops", [0], "neither the two-level nor the FIFO"),
        ("gnttab_interface", [0], "not set up its grant table"),
        ("xen_auto_xlat_grant_frames", [0, 1 << 20], "counts 1048576 grant frames"),
        ("xen_auto_xlat_grant_frames", [DIRECT + 0x60080, 2], "holds no frame numbers"),
        ("HYPERVISOR_shared_info", [DIRECT + 8], "physical address 0x8; expected a whole"),
        ("HYPERVISOR_shared_info", [0], "no page at virtual address 0x0"),
        ("curr_clocksource", [0], "has chosen the one at 0x0; expected the same"),
        ("linux_banner", [0x30], "calls itself '0'"),
    ],
)
def test_a_guest_that_is_not_as_expected_is_refused(
    where: str, values: list[int], said: str
) -> None:
    kernel = build()
    kernel.poke(where, *values)
    with pytest.raises(UnsupportedGuest, match=said):
        layout(kernel)


def test_two_cpus_of_one_number_are_refused() -> None:
    kernel = build()
    kernel.poke(kernel.percpu("xen_vcpu_id", 1), 0, size=4)
    with pytest.raises(UnsupportedGuest, match=r"numbered \[0, 0\]"):
        layout(kernel)


def test_a_guest_that_has_not_booted_is_refused() -> None:
    kernel = build()
    with pytest.raises(UnsupportedGuest, match="LSTAR is 0"):
        read_layout(kernel.memory, [Registers(kernel.cr3, 0, 0)])
    with pytest.raises(UnsupportedGuest, match="system call entry"):
        read_layout(kernel.memory, [Registers(kernel.cr3, 0, 1), Registers(1, 0, 2)])


def test_a_page_table_of_another_kernel_is_refused() -> None:
    kernel = build()
    top = kernel.pa(kernel.symbol("init_top_pgt"))
    kernel.ram[0x20000:0x21000] = kernel.ram[top : top + 4096]
    kernel.ram[top : top + 4096] = bytes(4096)
    with pytest.raises(UnsupportedGuest, match="no page at virtual address"):
        read_layout(kernel.memory, [Registers(0x20000, 0, kernel.lstar)])


def test_data_that_is_not_in_one_piece_is_refused() -> None:
    guest = build()
    kernel = read_kernel(guest.memory, guest.registers)
    va = guest.options.image_va + 0x130000
    assert kernel.place(va + 8, 8192) == IMAGE_PA + 0x130008
    entry = guest.ram.index(struct.pack("<Q", IMAGE_PA + 0x131000 | 3 | 1 << 63))
    guest.poke(entry, IMAGE_PA + 0x140000 | 3)
    assert kernel.place(va + 8, 4088) == IMAGE_PA + 0x130008
    with pytest.raises(UnsupportedGuest, match="not in one piece"):
        kernel.place(va + 8, 4089)
    with pytest.raises(UnsupportedGuest, match="expected at most 1048576"):
        kernel.place(va, (1 << 20) + 1)
