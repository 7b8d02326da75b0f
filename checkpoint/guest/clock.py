# SPDX-License-Identifier: Apache-2.0
"""Makes a moved guest's clocks go on, neither jumping nor standing still.

On another host Xen's system time is another one, usually by hours.  Every place that remembers a
system time (see :mod:`checkpoint.guest.clocksource`) is moved by the difference, so that all that
the guest computes from it stays the same.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint.guest.conditions import Condition, is_even, is_zero
from checkpoint.guest.layout import Cpu, LinuxLayout
from checkpoint.guest.memory import PhysicalMemory

_VDSO_PVCLOCK = 2
"""``VDSO_CLOCKMODE_PVCLOCK`` (arch/x86/include/asm/vdso/clocksource.h)."""
_RUNSTATE_UPDATE = 1 << 63
"""Set in ``state_entry_time`` while Xen writes (public/vcpu.h, XEN_RUNSTATE_UPDATE)."""
_RUNSTATE = struct.Struct("<i4xQ4Q")
_TIMES = struct.Struct("<4Q")
_WORD = (1 << 64) - 1
_HALF = (1 << 32) - 1
_PVTI_SIZE = 64


@dataclass(frozen=True, slots=True)
class Write:
    """One change to guest memory: ``data`` at guest physical address ``pa``; ``what`` it is."""

    pa: int
    data: bytes
    what: str


def clock_shifts(memory: PhysicalMemory, layout: LinuxLayout, delta_ns: int) -> list[Write]:
    """What must be written for the guest's clocks to go on under another system time.

    :param memory: the paused guest's memory, at :func:`timekeeping_at_rest`
    :param delta_ns: Xen's system time when and where the guest will go on, minus the system time
        up to which its clocks shall have run; nanoseconds, of either sign.  With the system time
        of the capture the guest's clocks go on as if no time had passed; add what has passed to it
        and they do not fall behind.

    A ``cycle_last`` is moved only where its own timekeeper uses the clocksource "xen", whichever
    was in use when the layout was found.  Sequence counters are moved by two, which makes a reader
    that was interrupted between its reading of the clock and of ``cycle_last`` read again.

    A secondary time area, which processes read, is cleared: Linux then asks the kernel instead
    (arch/x86/xen/time.c, xen_restore_time_memory_area).  Register it after this, not before.
    """
    clock = layout.clock
    writes = [
        Write(clock.last_value, bytes(8), "last_value"),
        _added(memory, clock.sched_clock_offset, delta_ns, "xen_sched_clock_offset"),
    ]
    moved = False
    for base in clock.bases:
        if _u64(memory, base.clock) == clock.xen_va:
            writes.append(_added(memory, base.cycle_last, delta_ns, "cycle_last"))
            moved = True
    if moved:
        writes.append(_turned(memory, clock.sequence, "tk_core.seq"))
        writes += [_turned(memory, latch, "tk_fast.seq") for latch in clock.latches]
    for vdso in clock.vdso:
        if _u32(memory, vdso.mode) == _VDSO_PVCLOCK:
            writes.append(_added(memory, vdso.cycle_last, delta_ns, "vdso cycle_last"))
            writes.append(_turned(memory, vdso.sequence, "vdso seq"))
    if clock.watchdog_reset is not None:
        writes.append(Write(clock.watchdog_reset, struct.pack("<I", 1), "watchdog_reset_pending"))
    if clock.vsyscall_time is not None:
        writes.append(Write(clock.vsyscall_time, bytes(_PVTI_SIZE), "secondary time area"))
    return writes


def shift_clock(memory: PhysicalMemory, layout: LinuxLayout, delta_ns: int) -> list[Write]:
    """Do what :func:`clock_shifts` says, and return it.  Not to be done twice.

    :raise GuestMemoryError: one of the places is not guest RAM; some may have been written
    """
    writes = clock_shifts(memory, layout, delta_ns)
    for write in writes:
        memory.write(write.pa, write.data)
    return writes


def timekeeping_at_rest(memory: PhysicalMemory, layout: LinuxLayout) -> bool:
    """Whether no CPU of the paused guest is within an update of the time.

    Then no kernel register or stack holds a system time that is about to be stored.
    """
    return all(condition.holds(memory) for condition in timekeeping_rests(layout))


def timekeeping_rests(layout: LinuxLayout) -> list[Condition]:
    """What :func:`timekeeping_at_rest` looks at."""
    clock = layout.clock
    counters = [clock.sequence, *(vdso.sequence for vdso in clock.vdso)]
    return [is_zero(clock.lock, 4), is_zero(clock.suspended, 4), *map(is_even, counters)]


def reads_clock(layout: LinuxLayout, rip: int) -> bool:
    """Whether a CPU paused at ``rip`` may hold a system time that it has just read.

    A few of the kernel's readings are not guarded by a sequence counter (the scheduler's clock, the
    deadline of a timer): a move between the reading and its use would make one of them wrong by the
    whole difference between the hosts.  A capture avoids such a pause point.

    Not one is a CPU right at its reading of the TSC, where most are stopped if Xen emulates that
    instruction: pvclock then compares the version of Xen's time in the vcpu_info with the one
    before, finds that the new host has written there, and begins again.
    """
    clock = layout.clock
    return rip not in clock.rereads and any(start <= rip < end for start, end in clock.code)


def detach_runstate(memory: PhysicalMemory, layout: LinuxLayout) -> None:
    """Leave each CPU's runstate as it was captured, for a host that will not update it.

    The guest's stolen time then stands still, and nothing else changes: the state is set to
    running, and a mark of an unfinished update, which would make readers wait for ever
    (drivers/xen/time.c), is removed.
    """
    for cpu in layout.cpus:
        _, entry, *times = _RUNSTATE.unpack(memory.read(cpu.runstate, _RUNSTATE.size))
        data = _RUNSTATE.pack(0, entry & ~_RUNSTATE_UPDATE, *times)
        memory.write(cpu.runstate, data)


def join_runstate(memory: PhysicalMemory, cpu: Cpu, new_times: Sequence[int]) -> None:
    """Make a CPU's stolen time go on under a host that does update its runstate.

    Without this a guest would see the time that the standby's paused shell spent waiting as stolen
    from it.  Linux adds ``old_runstate_time`` to what Xen reports; this adds to it what the old
    host had reported, and takes off what the new one begins with.

    :param memory: the captured memory, before the new host has written to the area
    :param new_times: the four times of the new host's virtual CPU (``VCPUOP_get_runstate_info``),
        nanoseconds
    """
    _, _, *reported = _RUNSTATE.unpack(memory.read(cpu.runstate, _RUNSTATE.size))
    kept = _TIMES.unpack(memory.read(cpu.old_runstate, _TIMES.size))
    triples = zip(kept, reported, new_times, strict=True)
    sums = [(kept_ns + old_ns - new_ns) & _WORD for kept_ns, old_ns, new_ns in triples]
    memory.write(cpu.old_runstate, _TIMES.pack(*sums))


def _u32(memory: PhysicalMemory, pa: int) -> int:
    return int.from_bytes(memory.read(pa, 4), "little")


def _u64(memory: PhysicalMemory, pa: int) -> int:
    return int.from_bytes(memory.read(pa, 8), "little")


def _added(memory: PhysicalMemory, pa: int, delta: int, what: str) -> Write:
    return Write(pa, ((_u64(memory, pa) + delta) & _WORD).to_bytes(8, "little"), what)


def _turned(memory: PhysicalMemory, pa: int, what: str) -> Write:
    return Write(pa, ((_u32(memory, pa) + 2) & _HALF).to_bytes(4, "little"), what)
