# SPDX-License-Identifier: Apache-2.0
"""What must be known before a guest can be run from one epoch: found out, and nothing changed.

Most of it takes a slow Dom0 longer than what follows.  So it is asked for when the guest's host has
fallen silent, while nobody knows yet whether it is dead (:meth:`XenShell.foresee`).
"""

from __future__ import annotations

from dataclasses import dataclass

from checkpoint.driver import Description
from checkpoint.errors import ReviveError
from checkpoint.guest.events import event_pages
from checkpoint.guest.layout import LinuxLayout
from checkpoint.guest.memory import PAGE_SIZE, PhysicalMemory
from checkpoint.guest.xenstore import read_watches
from checkpoint.xen import stub
from checkpoint.xen.borrowed import vendor_is_intel
from checkpoint.xen.control import (
    HVM_PARAM_CALLBACK_IRQ,
    HVM_PARAM_CONSOLE_EVTCHN,
    HVM_PARAM_STORE_EVTCHN,
    Domain,
)
from checkpoint.xen.state import MachineState

#: HYPERVISOR_CALLBACK_VECTOR of Linux (arch/x86/include/asm/irq_vectors.h), used when the guest
#: has its events delivered per vCPU
_UPCALL_VECTOR = 0xF3
_CALLBACK_TYPE_VECTOR = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """How to run a guest from one epoch.

    :ivar state: its machine state
    :ivar layout: where the guest keeps what is changed
    :ivar reserved: event channels that the toolstack of this host has made
    :ivar vector: interrupt by which each vCPU is told of events; None for one that the state names
    :ivar fifo_pages: addresses of the guest's pages of event words; none with two levels
    :ivar calls: hypercalls that only the guest itself may make, in order
    :ivar watches: (path, token) of each of its xenstore watches
    :ivar intel: whether this host's processors are Intel's
    """

    state: MachineState
    layout: LinuxLayout
    reserved: set[int]
    vector: int | None
    fifo_pages: list[int]
    calls: list[stub.Call]
    watches: list[tuple[str, str]]
    intel: bool


def make_plan(
    domain: Domain, description: Description, state: bytes, memory: PhysicalMemory
) -> Plan:
    """Find out.

    :param domain: the shell
    :param memory: its RAM, of the epoch of ``state``
    :raise CheckpointError: the guest could not be run from them
    """
    parsed = MachineState.from_bytes(state)
    layout = LinuxLayout.from_json(description.detail["layout"])
    reserved = check_state(domain, description, layout, parsed)
    vector = _upcall_vector(parsed)
    calls = [
        stub.register_vcpu_info(cpu.vcpu, cpu.vcpu_info) for cpu in layout.cpus if cpu.registered
    ]
    if vector is not None:
        calls += [stub.upcall_vector(cpu.vcpu, vector) for cpu in layout.cpus]
    pages = event_pages(memory, layout)
    # Before any port is bound.
    calls += [
        stub.fifo_init_control(
            cpu.vcpu, cpu.control_block // PAGE_SIZE, cpu.control_block % PAGE_SIZE
        )
        for cpu in layout.cpus
        if cpu.control_block is not None
    ]
    calls += [stub.fifo_expand_array(pa // PAGE_SIZE) for pa in pages]
    calls += stub.bind_events(parsed.events, reserved)
    return Plan(
        state=parsed,
        layout=layout,
        reserved=reserved,
        vector=vector,
        fifo_pages=pages,
        calls=calls,
        watches=read_watches(memory, layout),
        intel=vendor_is_intel(),
    )


def check_state(
    domain: Domain, description: Description, layout: LinuxLayout, state: MachineState
) -> set[int]:
    """Whether ``state`` has all that a revival needs; the ports that the toolstack has made.

    :raise ReviveError: it has not
    """
    missing = set(description.detail["special"][:2]).difference(state.pages)
    if missing:
        raise ReviveError(f"the state has no page {min(missing):#x} (expected its contents)")
    if HVM_PARAM_CALLBACK_IRQ not in state.params:
        raise ReviveError("the state has no HVM parameter 0 (expected how events are delivered)")
    frames = layout.grants.gfns
    if len(state.grants) > len(frames):
        raise ReviveError(
            f"the state has {len(state.grants)} grant frames (expected at most {len(frames)})"
        )
    reserved = {
        domain.get_param(HVM_PARAM_STORE_EVTCHN),
        domain.get_param(HVM_PARAM_CONSOLE_EVTCHN),
    }
    if not reserved <= {event.port for event in state.events}:
        raise ReviveError(
            f"the toolstack made event channels {sorted(reserved)} "
            "(expected ones that the guest has)"
        )
    return reserved


def _upcall_vector(state: MachineState) -> int | None:
    via = state.params[HVM_PARAM_CALLBACK_IRQ]
    # With per-vCPU upcall vectors the parameter is a dummy (arch/x86/xen/enlighten_hvm.c)
    return None if via >> 56 == _CALLBACK_TYPE_VECTOR else _UPCALL_VECTOR
