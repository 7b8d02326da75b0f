# SPDX-License-Identifier: Apache-2.0
"""Finds a running Linux kernel's :class:`~checkpoint.guest.layout.LinuxLayout`.

Works on a guest that runs or is paused: what is read here stays where it is once the guest has
booted.  Written against Linux 6.1 and 6.12; each lookup names the kernel file it relies on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint.errors import UnsupportedGuest
from checkpoint.guest.btf import Btf
from checkpoint.guest.clocksource import find_clock
from checkpoint.guest.kallsyms import Symbols
from checkpoint.guest.kernel import Kernel
from checkpoint.guest.layout import Cpu, Fifo, Grants, LinuxLayout, Xenbus
from checkpoint.guest.memory import PAGE_MASK, PhysicalMemory
from checkpoint.guest.paging import CR4_LA57

_HVM_DOMAIN = 2
_NO_VCPU = 0xFFFF_FFFF
"""``XEN_VCPU_ID_INVALID`` (include/xen/xen-ops.h)."""
_MOST_CPUS = 8192
_MOST_GRANT_FRAMES = 1 << 16
_MOST_GFN = 1 << 40


@dataclass(frozen=True, slots=True)
class Registers:
    """Of one virtual CPU, what is needed to read the kernel it runs.

    :ivar cr3: control register 3; of the kernel or of a user process
    :ivar cr4: control register 4
    :ivar lstar: MSR 0xC0000082; 0 on a CPU that was never started
    """

    cr3: int
    cr4: int
    lstar: int


def read_layout(memory: PhysicalMemory, registers: Sequence[Registers]) -> LinuxLayout:
    """Find the layout of the kernel that a guest runs; takes some 0.3 s of processor time.

    :param registers: of the guest's virtual CPUs; one that runs is enough
    :raise UnsupportedGuest: the guest cannot be read, or lacks something; one sentence
    """
    kernel = read_kernel(memory, registers)
    domain = kernel.word("xen_domain_type", "it cannot be seen whether it runs on Xen")
    if domain != _HVM_DOMAIN:
        raise UnsupportedGuest(
            f"the guest's kernel does not use Xen's interfaces (its xen_domain_type is {domain}); "
            f"expected {_HVM_DOMAIN}, a kernel with CONFIG_XEN_PVH or CONFIG_XEN_PVHVM"
        )
    fifo = _find_fifo(kernel)
    types = Btf.read(kernel.symbols)
    return LinuxLayout(
        release=release(kernel),
        page_table=kernel.space.root,
        la57=kernel.space.la57,
        possible_cpus=len(_possible_cpus(kernel)),
        cpus=_find_cpus(kernel, fifo is not None),
        shared_info=_find_shared_info(kernel),
        grants=_find_grants(kernel),
        fifo=fifo,
        clock=find_clock(kernel, types),
        xenbus=_find_xenbus(kernel, types),
    )


def read_kernel(memory: PhysicalMemory, registers: Sequence[Registers]) -> Kernel:
    """The kernel itself, by the first of the virtual CPUs that leads to it.

    :raise UnsupportedGuest: none does; the first one's reason
    """
    problem = UnsupportedGuest(
        "none of the guest's virtual CPUs has a system call entry (LSTAR is 0); a 64-bit Linux "
        "kernel that has booted is expected"
    )
    tried = False
    for one in registers:
        if not one.lstar:
            continue
        try:
            la57 = bool(one.cr4 & CR4_LA57)
            return Kernel(Symbols.read(memory, one.cr3, one.lstar, la57=la57), memory, la57=la57)
        except UnsupportedGuest as error:
            problem = problem if tried else error
            tried = True
    raise problem


def release(kernel: Kernel) -> str:
    """What ``uname -r`` prints in the guest (``linux_banner``, init/version-timestamp.c).

    :raise UnsupportedGuest: that string is not as expected
    """
    va = kernel.va("linux_banner", "its version cannot be told")
    words = kernel.space.cstring(va, 1024).split()
    if words[:2] != ["Linux", "version"] or len(words) < 3:
        raise UnsupportedGuest(
            f"the guest's kernel calls itself '{' '.join(words[:3])}'; expected 'Linux version ...'"
        )
    return words[2]


def _possible_cpus(kernel: Kernel) -> list[int]:
    """Numbers of the CPUs that there is room for (kernel/cpu.c)."""
    purpose = "its CPUs cannot be counted"
    count = kernel.word("nr_cpu_ids", purpose)
    if not 0 < count <= _MOST_CPUS:
        raise UnsupportedGuest(
            f"the guest's kernel counts {count} CPUs; expected 1 to {_MOST_CPUS}"
        )
    mask = kernel.space.read(kernel.va("__cpu_possible_mask", purpose), (count + 63) // 64 * 8)
    bits = int.from_bytes(mask, "little")
    return [cpu for cpu in range(count) if bits >> cpu & 1]


def _find_cpus(kernel: Kernel, fifo: bool) -> tuple[Cpu, ...]:
    """The CPUs that the guest has set up (arch/x86/xen/enlighten.c, drivers/xen/time.c).

    Before a CPU is first brought up, its ``xen_vcpu_id`` is invalid (arch/x86/xen/smp_hvm.c), and
    its ``xen_vcpu`` may be a copy of the first CPU's.
    """
    purpose = "what Xen shares with each virtual CPU cannot be found"
    cpus = []
    for cpu in _possible_cpus(kernel):
        vcpu = kernel.space.u32(kernel.percpu("xen_vcpu_id", cpu, purpose))
        info_va = kernel.space.u64(kernel.percpu("xen_vcpu", cpu, purpose))
        if vcpu == _NO_VCPU or not info_va:
            continue
        runstate_va = kernel.percpu("xen_runstate", cpu, purpose)
        block = queue = None
        if fifo:
            purpose_fifo = "its FIFO event channels cannot be moved"
            block_va = kernel.space.u64(kernel.percpu("cpu_control_block", cpu, purpose_fifo))
            block = kernel.place(block_va, 4096) if block_va else None
            queue = kernel.place(kernel.percpu("cpu_queue", cpu, purpose_fifo), 64)
        cpus.append(
            Cpu(
                cpu=cpu,
                vcpu=vcpu,
                vcpu_info=kernel.place(info_va, 64),
                registered=info_va == kernel.percpu("xen_vcpu_info", cpu, purpose),
                runstate=kernel.place(runstate_va, 48),
                runstate_va=runstate_va,
                old_runstate=kernel.place(kernel.percpu("old_runstate_time", cpu, purpose), 32),
                control_block=block,
                queue=queue,
            )
        )
    if not cpus or len({one.vcpu for one in cpus}) != len(cpus):
        raise UnsupportedGuest(
            f"the guest's kernel has {len(cpus)} CPUs set up for Xen, numbered "
            f"{[one.vcpu for one in cpus]}; expected at least one, and different numbers"
        )
    return tuple(cpus)


def _find_shared_info(kernel: Kernel) -> int:
    va = kernel.pointer("HYPERVISOR_shared_info", "the page that it shares with Xen is not known")
    pa = kernel.place(va, 4096)
    if pa & PAGE_MASK:
        raise UnsupportedGuest(
            f"the guest's shared_info is at physical address {pa:#x}; expected a whole page"
        )
    return pa


def _find_grants(kernel: Kernel) -> Grants:
    """``struct grant_frames`` and the ABI in use (drivers/xen/grant-table.c)."""
    purpose = "its grant table cannot be found"
    frames = kernel.va("xen_auto_xlat_grant_frames", purpose)
    row, count = kernel.space.u64(frames), kernel.space.u32(frames + 8)
    if count > _MOST_GRANT_FRAMES:
        raise UnsupportedGuest(
            f"the guest's kernel counts {count} grant frames; expected at most {_MOST_GRANT_FRAMES}"
        )
    data = kernel.space.read(row, 8 * count) if count else b""
    gfns = tuple(int.from_bytes(data[at : at + 8], "little") for at in range(0, 8 * count, 8))
    if any(gfn >= _MOST_GFN for gfn in gfns):
        raise UnsupportedGuest("the guest's list of grant frames holds no frame numbers")
    interface = kernel.pointer("gnttab_interface", purpose)
    for version in (1, 2):
        if interface == kernel.symbols.get(f"gnttab_v{version}_ops"):
            return Grants(gfns, kernel.at("nr_grant_frames", 4, purpose), version)
    raise UnsupportedGuest(
        "the guest's kernel has not set up its grant table in version 1 or 2; one is expected"
    )


def _find_fifo(kernel: Kernel) -> Fifo | None:
    """The event-channel ABI in use (drivers/xen/events/events_base.c, events_fifo.c)."""
    purpose = "its event channels cannot be moved"
    ops = kernel.pointer("evtchn_ops", purpose)
    if ops == kernel.symbols.get("evtchn_ops_2l"):
        return None
    if ops != kernel.symbols.get("evtchn_ops_fifo"):
        raise UnsupportedGuest(
            "the guest's kernel uses neither the two-level nor the FIFO event-channel ABI; one of "
            "them is expected"
        )
    return Fifo(
        array=kernel.at("event_array", 1024, purpose),
        pages=kernel.at("event_array_pages", 4, purpose),
    )


def _find_xenbus(kernel: Kernel, types: Btf) -> Xenbus:
    """The xenstore connection (drivers/xen/xenbus/xenbus_comms.c, xenbus_xs.c).

    A mutex of a kernel with PREEMPT_RT is another one and has no owner word.
    """
    purpose = "it cannot be seen whether its xenstore connection is at rest"
    heads = []
    for name in ("xs_reply_list", "xb_write_list"):
        heads.append((kernel.at(name, 16, purpose), kernel.va(name, purpose)))
    return Xenbus(
        lists=tuple(heads),
        reading=kernel.at("xs_response_mutex", 8, purpose) + types.offset("mutex", "owner"),
        users=kernel.at("xs_state_users", 4, purpose),
        watches_va=kernel.va("watches", "its xenstore watches cannot be set again after a move"),
    )
