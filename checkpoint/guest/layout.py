# SPDX-License-Identifier: Apache-2.0
"""Where a Linux guest keeps what the engine must read, copy or change.

Found once, on the primary, by :mod:`checkpoint.guest.linux`; travels to the standby as JSON inside
the guest's description.  Addresses are guest physical unless their name ends in ``_va``.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from checkpoint.errors import ProtocolError

_MOST_ITEMS = 1 << 17
_LONGEST_TEXT = 4096
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Cpu:
    """One CPU that the guest has set up.

    :ivar cpu: Linux's number for it
    :ivar vcpu: Xen's number for it (``xen_vcpu_id``)
    :ivar vcpu_info: its ``struct vcpu_info``
    :ivar registered: False where that is still the one inside of shared_info, which needs no
        ``VCPUOP_register_vcpu_info``
    :ivar runstate: its ``struct vcpu_runstate_info``, registered by ``runstate_va``
    :ivar runstate_va: kernel virtual address of the same
    :ivar old_runstate: four u64, which Linux adds to the times in ``runstate``
    :ivar control_block: its FIFO control block's page; None with the two-level ABI
    :ivar queue: with FIFO, its own 16 queue heads (u32); None with the two-level ABI
    """

    cpu: int
    vcpu: int
    vcpu_info: int
    registered: bool
    runstate: int
    runstate_va: int
    old_runstate: int
    control_block: int | None
    queue: int | None


@dataclass(frozen=True, slots=True)
class Grants:
    """The grant table.

    :ivar gfns: guest frames that the table's frames are, or can be, mapped at, in order
    :ivar used: address of the u32 that counts those in use (``nr_grant_frames``)
    :ivar version: of the grant-table ABI, 1 or 2
    """

    gfns: tuple[int, ...]
    used: int
    version: int


@dataclass(frozen=True, slots=True)
class Fifo:
    """The FIFO event-channel ABI.

    :ivar array: array of kernel pointers to the pages of event words (``event_array``)
    :ivar pages: the u32 that counts those in use (``event_array_pages``)
    """

    array: int
    pages: int


@dataclass(frozen=True, slots=True)
class TimeBase:
    """One ``struct tk_read_base``: addresses of its ``clock`` pointer and its ``cycle_last``."""

    clock: int
    cycle_last: int


@dataclass(frozen=True, slots=True)
class VdsoBase:
    """One ``struct vdso_data``: addresses of ``seq``, ``clock_mode`` and ``cycle_last``."""

    sequence: int
    mode: int
    cycle_last: int


@dataclass(frozen=True, slots=True)
class Clock:
    """The guest's clocks.

    :ivar clocksource: name of the one in use when the layout was found
    :ivar xen_va: kernel virtual address of ``xen_clocksource``
    :ivar last_value: u64, pvclock's guard against going back
    :ivar sched_clock_offset: u64, Xen's system time at which the scheduler's clock was zero
    :ivar sequence: u32, odd while the timekeeper changes (``tk_core.seq``)
    :ivar lock: u32, not 0 while someone prepares such a change (``timekeeper_lock``)
    :ivar suspended: u32, not 0 while timekeeping is suspended
    :ivar latches: u32 each, sequence counters of the NMI-safe timekeepers
    :ivar bases: every copy of ``cycle_last`` in the kernel
    :ivar vdso: every copy in the page that user processes see
    :ivar watchdog_reset: u32, not 0 makes the clocksource watchdog begin anew; None if there is
        no such watchdog
    :ivar vsyscall_time: ``struct pvclock_vsyscall_time_info`` registered with
        ``VCPUOP_register_vcpu_time_memory_area``; None if there is none
    :ivar vsyscall_time_va: kernel virtual address of the same
    :ivar code: (first, end) virtual addresses of the functions that turn Xen's time into a number
    :ivar rereads: addresses in them just before and after an instruction that reads the TSC, whose
        result is dropped if Xen has written a new time meanwhile
    """

    clocksource: str
    xen_va: int
    last_value: int
    sched_clock_offset: int
    sequence: int
    lock: int
    suspended: int
    latches: tuple[int, ...]
    bases: tuple[TimeBase, ...]
    vdso: tuple[VdsoBase, ...]
    watchdog_reset: int | None
    vsyscall_time: int | None
    vsyscall_time_va: int | None
    code: tuple[tuple[int, int], ...]
    rereads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Xenbus:
    """The guest's side of its xenstore connection.

    :ivar lists: (address, kernel virtual address) of the heads of the lists of requests
    :ivar reading: u64, the owner word of the mutex held while a message is being read
    :ivar users: u32, requests and transactions under way (``xs_state_users``)
    :ivar watches_va: kernel virtual address of the head of the list of watches
    """

    lists: tuple[tuple[int, int], ...]
    reading: int
    users: int
    watches_va: int


@dataclass(frozen=True, slots=True)
class LinuxLayout:
    """All that the engine wants to know of one running Linux kernel.

    :ivar release: as ``uname -r`` prints it
    :ivar page_table: the kernel's own top page table (``init_top_pgt``)
    :ivar la57: whether it has five levels
    :ivar possible_cpus: CPUs that the kernel has room for
    :ivar cpus: those that it has set up, by ascending ``cpu``
    :ivar shared_info: the ``struct shared_info`` page
    :ivar fifo: None with the two-level event-channel ABI
    """

    release: str
    page_table: int
    la57: bool
    possible_cpus: int
    cpus: tuple[Cpu, ...]
    shared_info: int
    grants: Grants
    fifo: Fifo | None
    clock: Clock
    xenbus: Xenbus

    def to_json(self) -> dict[str, Any]:
        """The layout as JSON values; :meth:`from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, untrusted_value: object) -> LinuxLayout:
        """The layout that :meth:`to_json` wrote.

        :raise ProtocolError: it is not one; addresses are only checked to be 64-bit numbers
        """
        return _record(cls, untrusted_value, "kernel layout")


def _record(cls: type[_T], untrusted_value: object, where: str) -> _T:
    hints = typing.get_type_hints(cls)
    if not isinstance(untrusted_value, dict) or untrusted_value.keys() != hints.keys():
        raise ProtocolError(f"the {where} does not have exactly the members {', '.join(hints)}")
    return cls(**{
        name: _value(hint, untrusted_value[name], f"{where}'s {name}")
        for name, hint in hints.items()
    })  # fmt: skip


def _value(hint: Any, untrusted_value: object, where: str) -> object:
    origin = typing.get_origin(hint)
    if origin is types.UnionType:
        if untrusted_value is None:
            return None
        return _value(typing.get_args(hint)[0], untrusted_value, where)
    if origin is tuple:
        return _row(typing.get_args(hint), untrusted_value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _record(hint, untrusted_value, where)
    if type(untrusted_value) is hint:
        if isinstance(untrusted_value, bool):
            return untrusted_value
        if isinstance(untrusted_value, int) and 0 <= untrusted_value < 1 << 64:
            return untrusted_value
        if isinstance(untrusted_value, str) and len(untrusted_value) <= _LONGEST_TEXT:
            return untrusted_value
    raise ProtocolError(f"the {where} is not what is expected there ({hint.__name__})")


def _row(hints: tuple[Any, ...], untrusted_value: object, where: str) -> tuple[object, ...]:
    if not isinstance(untrusted_value, list | tuple) or len(untrusted_value) > _MOST_ITEMS:
        raise ProtocolError(f"the {where} is not a list of at most {_MOST_ITEMS} items")
    if hints[-1] is Ellipsis:
        return tuple(_value(hints[0], item, where) for item in untrusted_value)
    if len(untrusted_value) != len(hints):
        raise ProtocolError(f"the {where} does not have {len(hints)} items")
    pairs = zip(hints, untrusted_value, strict=True)
    return tuple(_value(hint, item, where) for hint, item in pairs)
