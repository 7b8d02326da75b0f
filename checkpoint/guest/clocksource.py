# SPDX-License-Identifier: Apache-2.0
"""Finds where a Linux kernel keeps its clocks.

A guest's clocks are made of Xen's system time (nanoseconds since the *host* booted) in these places
(arch/x86/xen/time.c, arch/x86/kernel/pvclock.c, kernel/time/timekeeping.c, vsyscall.c):

- the scheduler's clock is system time minus ``xen_sched_clock_offset``, always;
- ``last_value`` is the largest system time ever read, below which none is returned;
- with clocksource "xen", each timekeeper remembers the system time of its last update in
  ``cycle_last``: twice in ``tk_core``, twice in its shadow, four times in the NMI-safe ones, and
  twice in the page that the vDSO reads;
- the clocksource watchdog remembers readings of the clock it compares with, which may be "xen".
"""

from __future__ import annotations

from checkpoint.errors import UnsupportedGuest
from checkpoint.guest.btf import Btf
from checkpoint.guest.kernel import Kernel
from checkpoint.guest.layout import Clock, TimeBase, VdsoBase

_PURPOSE = "its clocks cannot go on after a move"
_VDSO_BASES = 2
_LONGEST_FUNCTION = 4096
READERS = (
    "pvclock_clocksource_read",
    "pvclock_clocksource_read_nowd",
    "xen_clocksource_read",
    "xen_clocksource_get_cycles",
    "xen_sched_clock",
    "xen_vcpuop_set_next_event",
    "sched_clock",
    "sched_clock_noinstr",
    "sched_clock_cpu",
    "local_clock",
    "local_clock_noinstr",
)
"""Functions that read Xen's time outside of a sequence counter; a kernel has some of them."""


def find_clock(kernel: Kernel, types: Btf) -> Clock:
    """The addresses of all that must change, or be looked at, when a guest's clocks are moved.

    :raise UnsupportedGuest: something is missing or not as in the kernels known
    """
    sequence, lock, bases = _find_timekeepers(kernel, types)
    latches = []
    for name in ("tk_fast_mono", "tk_fast_raw"):
        size = types.size("tk_fast")
        fast = kernel.at(name, size, _PURPOSE)
        latches.append(fast + types.offset("tk_fast", "seq"))
        bases += [_base(types, fast + types.offset("tk_fast", "base", i)) for i in (0, 1)]
    area_va = kernel.pointer("xen_clock", _PURPOSE)
    watchdog = kernel.symbols.get("watchdog_reset_pending")
    code = tuple(
        (start, kernel.symbols.after(start))
        for name in READERS
        for start in kernel.symbols.all(name)
    )
    return Clock(
        clocksource=_name(kernel, types, bases[0]),
        xen_va=kernel.va("xen_clocksource", _PURPOSE),
        last_value=kernel.place(_last_value(kernel), 8),
        sched_clock_offset=kernel.at("xen_sched_clock_offset", 8, _PURPOSE),
        sequence=sequence,
        lock=lock,
        suspended=kernel.at("timekeeping_suspended", 4, _PURPOSE),
        latches=tuple(latches),
        bases=tuple(bases),
        vdso=_find_vdso(kernel, types, bool(area_va)),
        watchdog_reset=None if watchdog is None else kernel.place(watchdog, 4),
        vsyscall_time=kernel.place(area_va, 64) if area_va else None,
        vsyscall_time_va=area_va or None,
        code=code,
        rereads=tuple(at for start, end in code for at in _tsc_readings(kernel, start, end)),
    )


def _tsc_readings(kernel: Kernel, start: int, end: int) -> list[int]:
    """Addresses of ``rdtsc`` and ``rdtscp`` in a function, and of what follows each."""
    code = kernel.space.read(start, min(end - start, _LONGEST_FUNCTION))
    found = []
    for instruction in (b"\x0f\x31", b"\x0f\x01\xf9"):
        at = code.find(instruction)
        while at >= 0:
            found += [start + at, start + at + len(instruction)]
            at = code.find(instruction, at + 1)
    return found


def _find_timekeepers(kernel: Kernel, types: Btf) -> tuple[int, int, list[TimeBase]]:
    """(sequence counter, lock, time bases) of ``tk_core`` and its shadow.

    ``tk_core`` is an anonymous struct of a ``seqcount_raw_spinlock_t`` and a timekeeper up to
    Linux 6.12, with the lock and the shadow beside it; since then they are all in ``tk_data``.
    """
    core = kernel.va("tk_core", _PURPOSE)
    if types.has("tk_data"):
        core = kernel.place(core, types.size("tk_data"))
        sequence = core + types.offset("tk_data", "seq")
        lock = core + types.offset("tk_data", "lock")
        keepers = [core + types.offset("tk_data", "timekeeper")]
        keepers.append(core + types.offset("tk_data", "shadow_timekeeper"))
    else:
        size = types.size("timekeeper")
        head = (types.size("seqcount_raw_spinlock_t") + 7) & ~7
        core = kernel.place(core, head + size)
        sequence = core
        lock = kernel.at("timekeeper_lock", 4, _PURPOSE)
        keepers = [core + head, kernel.at("shadow_timekeeper", size, _PURPOSE)]
    bases = [
        _base(types, keeper + types.offset("timekeeper", member))
        for keeper in keepers
        for member in ("tkr_mono", "tkr_raw")
    ]
    return sequence, lock, bases


def _base(types: Btf, pa: int) -> TimeBase:
    return TimeBase(
        clock=pa + types.offset("tk_read_base", "clock"),
        cycle_last=pa + types.offset("tk_read_base", "cycle_last"),
    )


def _name(kernel: Kernel, types: Btf, base: TimeBase) -> str:
    """The name of the clocksource in use, having checked that ``base`` is where one is named."""
    clock = int.from_bytes(kernel.memory.read(base.clock, 8), "little")
    current = kernel.pointer("curr_clocksource", _PURPOSE)
    if clock != current:
        raise UnsupportedGuest(
            f"the guest's timekeeper uses a clocksource at {clock:#x}, but its kernel has chosen "
            f"the one at {current:#x}; expected the same, and so {_PURPOSE}"
        )
    return kernel.space.cstring(kernel.space.u64(clock + types.offset("clocksource", "name")), 64)


def _last_value(kernel: Kernel) -> int:
    """Virtual address of pvclock's ``last_value``.

    Other files may have a static variable of that name: then it is the one that
    ``pvclock_resume``, which does nothing but clear it, refers to (relative to the instruction
    pointer; what follows the distance is a 32-bit constant or the next instruction).
    """
    found = kernel.symbols.all("last_value")
    if len(found) < 2:
        return kernel.va("last_value", _PURPOSE)
    start = kernel.va("pvclock_resume", _PURPOSE)
    code = kernel.space.read(start, min(64, kernel.symbols.after(start) - start))
    for at in range(len(code) - 3):
        distance = int.from_bytes(code[at : at + 4], "little", signed=True)
        for end in (at + 4, at + 8):
            if start + end + distance in found:
                return start + end + distance
    raise UnsupportedGuest(
        f"the guest's kernel has {len(found)} variables 'last_value', and its function "
        f"pvclock_resume clears none of them as is expected, and so {_PURPOSE}"
    )


def _find_vdso(kernel: Kernel, types: Btf, by_xen: bool) -> tuple[VdsoBase, ...]:
    """The time bases that user processes see (include/vdso/datapage.h)."""
    data = kernel.symbols.get("_vdso_data")
    if data is None or not types.has("vdso_data"):
        if by_xen:
            raise UnsupportedGuest(
                "the guest's processes read Xen's clock by themselves (vDSO), and its kernel has "
                f"no '_vdso_data' of type 'vdso_data' as is expected then, and so {_PURPOSE}"
            )
        return ()
    size = types.size("vdso_data")
    start = kernel.place(data, _VDSO_BASES * size)
    sequence, mode, last = (
        types.offset("vdso_data", member) for member in ("seq", "clock_mode", "cycle_last")
    )
    return tuple(
        VdsoBase(start + i * size + sequence, start + i * size + mode, start + i * size + last)
        for i in range(_VDSO_BASES)
    )
