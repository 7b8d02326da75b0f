# SPDX-License-Identifier: Apache-2.0
"""A moved guest's clocks: computed as Linux does, before and after the shift."""

from __future__ import annotations

import struct

import pytest

from checkpoint.errors import UnsupportedGuest
from checkpoint.guest.clock import (
    clock_shifts,
    detach_runstate,
    join_runstate,
    reads_clock,
    shift_clock,
    timekeeping_at_rest,
)
from checkpoint.guest.layout import LinuxLayout
from checkpoint.guest.linux import read_layout
from tests.unit.guest_kernel import GuestKernel, Options, build

SECOND = 1_000_000_000
WORD = (1 << 64) - 1


def layout(kernel: GuestKernel) -> LinuxLayout:
    return read_layout(kernel.memory, kernel.registers)


def pvclock(kernel: GuestKernel, system_time: int) -> int:
    """arch/x86/kernel/pvclock.c: never below what was returned before."""
    value = max(system_time, kernel.peek("last_value"))
    kernel.poke("last_value", value)
    return value


def sched_clock(kernel: GuestKernel, system_time: int) -> int:
    return (pvclock(kernel, system_time) - kernel.peek("xen_sched_clock_offset")) & WORD


def elapsed(kernel: GuestKernel, system_time: int) -> list[int]:
    """Nanoseconds since the last update by each timekeeper that follows Xen's time."""
    now = pvclock(kernel, system_time)
    core = kernel.pa(kernel.symbol("tk_core"))
    shadow = core + 288 if kernel.options.tk_data else kernel.pa(kernel.symbol("shadow_timekeeper"))
    bases = [core + 8, core + 64, shadow, shadow + 56]
    for fast in ("tk_fast_mono", "tk_fast_raw"):
        bases += [kernel.pa(kernel.symbol(fast)) + at for at in (8, 64)]
    xen = kernel.symbol("xen_clocksource")
    found = [(now - kernel.peek(base + 16)) & WORD for base in bases if kernel.peek(base) == xen]
    vdso = kernel.pa(kernel.symbol("_vdso_data"))
    return found + [
        (now - kernel.peek(at + 8)) & WORD
        for at in (vdso, vdso + 248)
        if kernel.peek(at + 4, 4) == 2
    ]


@pytest.mark.parametrize("delta", [-4 * SECOND, 7200 * SECOND, 0, -5 * SECOND - 1])
@pytest.mark.parametrize("tk_data", [False, True])
@pytest.mark.parametrize("vsyscall", [False, True])
def test_clocks_go_on_under_another_system_time(delta: int, tk_data: bool, vsyscall: bool) -> None:
    kernel = build(Options(tk_data=tk_data, vsyscall=vsyscall))
    found = layout(kernel)
    old = 12 * SECOND
    before = sched_clock(kernel, old), elapsed(kernel, old)
    assert len(before[1]) == (10 if vsyscall else 8)
    assert set(before[1]) == {7 * SECOND}
    shift_clock(kernel.memory, found, delta)
    new = old + delta
    assert (sched_clock(kernel, new), elapsed(kernel, new)) == before
    later = sched_clock(kernel, new + 5), elapsed(kernel, new + 5)
    assert later == (before[0] + 5, [value + 5 for value in before[1]])


def test_without_the_shift_time_would_stand_still() -> None:
    kernel = build()
    before = sched_clock(kernel, 12 * SECOND)
    assert sched_clock(kernel, 3 * SECOND) == sched_clock(kernel, 9 * SECOND) == before


def test_only_timekeepers_that_follow_xen_are_moved() -> None:
    kernel = build(Options(clocksource="tsc"))
    found = layout(kernel)
    writes = clock_shifts(kernel.memory, found, SECOND)
    assert [write.what for write in writes] == [
        "last_value",
        "xen_sched_clock_offset",
        "watchdog_reset_pending",
    ]
    core = kernel.pa(kernel.symbol("tk_core"))
    kernel.poke(core + 8, kernel.symbol("xen_clocksource"))
    names = [write.what for write in clock_shifts(kernel.memory, found, SECOND)]
    assert names.count("cycle_last") == 1
    assert "tk_core.seq" in names


def test_readers_that_were_interrupted_read_again() -> None:
    kernel = build(Options(vsyscall=True))
    found = layout(kernel)
    kernel.poke(found.clock.sequence, 0xFFFF_FFFE, size=4)
    shift_clock(kernel.memory, found, SECOND)
    assert kernel.peek("tk_core", 4) == 0
    assert kernel.peek("tk_fast_mono", 4) == kernel.peek("tk_fast_raw", 4) == 9
    assert kernel.peek("_vdso_data", 4) == 42
    assert kernel.peek("watchdog_reset_pending", 4) == 1


def test_the_page_that_processes_read_is_cleared() -> None:
    kernel = build(Options(vsyscall=True))
    found = layout(kernel)
    assert found.clock.vsyscall_time == 0x70000
    shift_clock(kernel.memory, found, SECOND)
    assert not any(kernel.ram[0x70000:0x70040])


def test_nothing_but_the_listed_places_is_written() -> None:
    kernel = build(Options(vsyscall=True))
    found = layout(kernel)
    before = bytes(kernel.ram)
    writes = shift_clock(kernel.memory, found, 1)
    after = bytearray(kernel.ram)
    for write in writes:
        after[write.pa : write.pa + len(write.data)] = before[write.pa : write.pa + len(write.data)]
    assert bytes(after) == before


@pytest.mark.parametrize(
    ("where", "value", "at_rest"),
    [
        ("tk_core", 1234, True),
        ("tk_core", 1235, False),
        ("timekeeper_lock", 1, False),
        ("timekeeping_suspended", 1, False),
        ("_vdso_data", 41, False),
        ("tk_fast_mono", 8, True),
    ],
)
def test_an_update_of_the_time_is_seen(where: str, value: int, at_rest: bool) -> None:
    kernel = build()
    found = layout(kernel)
    assert timekeeping_at_rest(kernel.memory, found)
    kernel.poke(where, value, size=4)
    assert timekeeping_at_rest(kernel.memory, found) is at_rest


def test_code_that_reads_the_clock_is_known() -> None:
    kernel = build()
    found = layout(kernel)
    start = kernel.symbol("pvclock_clocksource_read")
    end = kernel.symbol("pvclock_resume")
    assert [reads_clock(found, rip) for rip in (start - 1, start, end - 1, end)] == [
        False,
        True,
        True,
        False,
    ]


def test_a_reading_that_is_repeated_is_no_hindrance() -> None:
    kernel = build()
    start = kernel.symbol("pvclock_clocksource_read")
    code = b"\x0f\xae\xe8\x0f\x31\x48\xc1\xe2\x20\x0f\x01\xf9\xc3"
    kernel.ram[kernel.pa(start) : kernel.pa(start) + len(code)] = code
    found = layout(kernel)
    free = [at for at in range(len(code)) if not reads_clock(found, start + at)]
    assert free == [3, 5, 9, 12]


def steal(kernel: GuestKernel, cpu: int) -> list[int]:
    """drivers/xen/time.c: what Linux takes for the times of its CPU."""
    area = kernel.percpu("xen_runstate", cpu) + 16
    kept = kernel.percpu("old_runstate_time", cpu)
    return [(kernel.peek(area + at) + kernel.peek(kept + at)) & WORD for at in range(0, 32, 8)]


def test_stolen_time_goes_on_under_another_host() -> None:
    kernel = build()
    found = layout(kernel)
    cpu = found.cpus[1]
    kernel.poke(cpu.runstate, 1, 99 | 1 << 63, 50, 40, 30, 20)
    before = steal(kernel, 1)
    new = [1, 2, 3600 * SECOND, 4]
    join_runstate(kernel.memory, cpu, new)
    kernel.poke(cpu.runstate + 16, *new)
    assert steal(kernel, 1) == before
    kernel.poke(cpu.runstate + 16, 1, 2 + 7, new[2], 4)
    assert steal(kernel, 1) == [before[0], before[1] + 7, *before[2:]]


def test_a_runstate_left_alone_is_one_that_can_be_read() -> None:
    kernel = build()
    found = layout(kernel)
    for cpu in found.cpus:
        kernel.poke(cpu.runstate, 3, 99 | 1 << 63, 50, 40, 30, 20)
    detach_runstate(kernel.memory, found)
    for cpu in found.cpus:
        data = kernel.memory.read(cpu.runstate, 48)
        assert struct.unpack("<i4x5Q", data) == (0, 99, 50, 40, 30, 20)


def test_last_value_of_pvclock_is_told_from_others() -> None:
    kernel = build(Options(twice=("last_value",)))
    with pytest.raises(UnsupportedGuest, match="2 variables 'last_value'"):
        layout(kernel)
    right = kernel.pa(kernel.symbol("last_value"))
    wrong = kernel.image_pa(0x30000)
    code = kernel.pa(kernel.symbol("pvclock_resume"))
    for target in (right, wrong):
        clear = b"\x48\xc7\x05" + struct.pack("<ii", target - code - 4 - 11, 0)
        kernel.ram[code + 4 : code + 15] = clear
        assert layout(kernel).clock.last_value == target
    store = b"\x31\xc0\x48\x89\x05" + struct.pack("<i", right - code - 9)
    kernel.ram[code : code + 16] = store.ljust(16, b"\xc3")
    assert layout(kernel).clock.last_value == right


def test_a_vdso_that_reads_xens_clock_must_be_known() -> None:
    assert layout(build(Options(vdso=False))).clock.vdso == ()
    with pytest.raises(UnsupportedGuest, match="no '_vdso_data' of type 'vdso_data'"):
        layout(build(Options(vdso=False, vsyscall=True)))
    with pytest.raises(UnsupportedGuest, match="no '_vdso_data' of type 'vdso_data'"):
        layout(build(Options(without=("_vdso_data",), vsyscall=True)))
