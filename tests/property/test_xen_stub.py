# SPDX-License-Identifier: Apache-2.0
"""Any event-channel table that a guest can have comes out of the stub port by port."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from checkpoint.xen import stub
from checkpoint.xen.state import EventChannel
from tests.unit.xen_machine import PER_VCPU_VIRQS, Hypervisor, Port, run, toolstack_ports

BASE = 0x20000
VCPUS = 4


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[EventChannel], set[int]]:
    """Bound ports in ascending order, and which of them the toolstack makes."""
    numbers = draw(st.sets(st.integers(1, 60), max_size=45))
    reserved = set(draw(st.lists(st.integers(1, 6), unique=True, max_size=2)))
    virqs = {
        (virq, vcpu if virq in PER_VCPU_VIRQS else 0) for virq in range(16) for vcpu in range(VCPUS)
    }
    free = draw(st.permutations(sorted(virqs)))
    events = []
    for number in sorted(numbers | reserved):
        kind = draw(st.sampled_from((stub.UNBOUND, stub.INTERDOMAIN, stub.VIRQ, stub.IPI)))
        vcpu = draw(st.integers(0, VCPUS - 1))
        detail = draw(st.integers(0, 0x7FEF))
        if number in reserved:
            kind = stub.INTERDOMAIN
        elif kind == stub.VIRQ:
            detail, bound = free.pop()
            vcpu = bound if detail in PER_VCPU_VIRQS else vcpu
        events.append(EventChannel(number, kind, vcpu, detail if kind != stub.IPI else 0))
    return events, reserved


@given(table=tables(), intel=st.booleans())
def test_every_port_comes_out_under_its_number(
    table: tuple[list[EventChannel], set[int]], intel: bool
) -> None:
    events, reserved = table
    xen = Hypervisor(vcpus=VCPUS, ports=toolstack_ports(reserved))
    calls = stub.bind_events(events, reserved)
    memory = bytearray(stub.assemble(calls, BASE, intel=intel))
    run(memory, BASE, xen, instruction=b"\x0f\x01\xc1" if intel else b"\x0f\x01\xd9")
    assert stub.finished(memory)
    stub.check_results(memory, calls)
    kinds = {stub.VIRQ: "virq", stub.IPI: "ipi"}
    assert xen.ports == {
        event.port: Port(
            kinds.get(event.status, "unbound"),
            0 if event.port in reserved else event.detail,
            event.vcpu,
        )
        for event in events
    }
