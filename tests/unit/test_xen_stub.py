# SPDX-License-Identifier: Apache-2.0
"""The revive stub's machine code, run; and what its hypercalls say."""

from __future__ import annotations

import errno
import struct

import pytest

from checkpoint.driver import PAGE_SIZE
from checkpoint.errors import ReviveError
from checkpoint.xen import stub
from checkpoint.xen.state import EventChannel
from tests.unit.xen_machine import VMCALL, VMMCALL, Hypervisor, Port, run, toolstack_ports

BASE = 0x20000


def execute(calls: list[stub.Call], xen: Hypervisor, *, intel: bool = True) -> bytearray:
    """Assemble and run; the stub's memory afterwards."""
    memory = bytearray(stub.assemble(calls, BASE, intel=intel))
    assert not stub.finished(memory)
    run(memory, BASE, xen, instruction=VMCALL if intel else VMMCALL)
    return memory


@pytest.mark.parametrize("intel", [True, False])
def test_each_call_is_made_once_in_order_with_its_argument(intel: bool) -> None:
    calls = [
        stub.register_vcpu_info(1, 0x123456),
        stub.upcall_vector(2, 0xF3),
        stub.fifo_init_control(3, 0x55, 0x80),
        stub.fifo_expand_array(0x1_0000_0001),
    ]
    xen = Hypervisor()
    memory = execute(calls, xen, intel=intel)
    assert stub.finished(memory)
    stub.check_results(memory, calls)
    assert xen.made == [
        (24, 10, struct.pack("<IQII", 1, 0x123, 0x456, 0)),
        (34, 23, struct.pack("<IB3x", 2, 0xF3)),
        (32, 11, struct.pack("<QIIB7x", 0x55, 0x80, 3, 0)),
        (32, 12, struct.pack("<Q", 0x1_0000_0001)),
    ]


def test_no_call_at_all() -> None:
    xen = Hypervisor()
    assert stub.finished(execute([], xen))
    assert xen.made == []


def test_every_kind_of_port_gets_its_number_and_its_vcpu() -> None:
    events = [
        EventChannel(1, stub.INTERDOMAIN, 0, 0),
        EventChannel(2, stub.INTERDOMAIN, 0, 0),
        EventChannel(3, stub.VIRQ, 2, 0),
        EventChannel(4, stub.IPI, 3, 0),
        EventChannel(7, stub.UNBOUND, 1, 9),
        EventChannel(8, stub.VIRQ, 3, 4),
        EventChannel(9, stub.INTERDOMAIN, 0, 5),
    ]
    xen = Hypervisor(ports=toolstack_ports((1, 2)))
    calls = stub.bind_events(events, {1, 2})
    stub.check_results(execute(calls, xen), calls)
    assert xen.ports == {
        **toolstack_ports((1, 2)),
        3: Port("virq", 0, 2),
        4: Port("ipi", 0, 3),
        7: Port("unbound", 9, 1),
        8: Port("virq", 4, 3),
        9: Port("unbound", 5, 0),
    }


def test_ports_of_the_toolstack_may_lie_anywhere() -> None:
    events = [EventChannel(port, stub.IPI, 0, 0) for port in (2, 5)]
    events += [EventChannel(port, stub.INTERDOMAIN, 0, 0) for port in (1, 4)]
    xen = Hypervisor(ports=toolstack_ports((1, 4)))
    calls = stub.bind_events(sorted(events, key=lambda e: e.port), {1, 4})
    stub.check_results(execute(calls, xen), calls)
    assert sorted(xen.ports) == [1, 2, 4, 5]


def test_a_port_that_comes_out_with_another_number_is_an_error() -> None:
    calls = stub.bind_events([EventChannel(3, stub.IPI, 0, 0)], {1, 2})
    xen = Hypervisor(ports=toolstack_ports((1, 2, 3)))  # one more than the primary's toolstack made
    with pytest.raises(ReviveError, match="IPI port 3: the hypervisor made port 4"):
        stub.check_results(execute(calls, xen), calls)


def test_a_filler_that_comes_out_with_another_number_is_an_error() -> None:
    calls = stub.bind_events([EventChannel(3, stub.IPI, 0, 0)], set())
    xen = Hypervisor(ports=toolstack_ports((2,)))
    with pytest.raises(ReviveError, match="filler port 2: the hypervisor made port 3"):
        stub.check_results(execute(calls, xen), calls)


@pytest.mark.parametrize(
    ("command", "what"), [(1, "VIRQ 0 port 3"), (6, "port 4"), (7, "IPI port 5"), (8, "target of")]
)
def test_a_call_that_xen_refuses_is_named(command: int, what: str) -> None:
    events = [
        EventChannel(3, stub.VIRQ, 0, 0),
        EventChannel(4, stub.UNBOUND, 1, 0),
        EventChannel(5, stub.IPI, 0, 0),
    ]
    calls = stub.bind_events(events, {1, 2})
    xen = Hypervisor(ports=toolstack_ports((1, 2)), refusing={command: errno.EPERM})
    with pytest.raises(ReviveError, match=rf"^{what}.*answered -1 \(expected 0\)"):
        stub.check_results(execute(calls, xen), calls)


def test_a_call_that_was_never_made_is_no_success() -> None:
    calls = [stub.fifo_expand_array(1), stub.upcall_vector(0, 1)]
    memory = bytearray(stub.assemble(calls, BASE, intel=True))
    memory[PAGE_SIZE : PAGE_SIZE + 4] = b"\xff\xff\xff\xff"  # the table ends at once
    xen = Hypervisor()
    run(memory, BASE, xen)
    assert xen.made == []
    results = [
        int.from_bytes(memory[at : at + 4], "little")
        for at in (PAGE_SIZE + 16, PAGE_SIZE + 20 + 16)
    ]
    assert 0 not in results


def test_a_physical_interrupt_cannot_be_moved() -> None:
    with pytest.raises(ReviveError, match="event channel 7 is a physical interrupt"):
        stub.bind_events([EventChannel(7, stub.PIRQ, 0, 0)], set())


def test_as_many_calls_as_fit_and_one_more() -> None:
    xen = Hypervisor(ports=toolstack_ports((1,)))
    calls = [stub.fifo_init_control(0, 1, 0)] * stub.MOST_CALLS  # the largest structure
    memory = execute(calls, xen)
    assert len(memory) == stub.STUB_PAGES * PAGE_SIZE
    stub.check_results(memory, calls)
    assert len(xen.made) == stub.MOST_CALLS
    with pytest.raises(ReviveError, match="257 hypercalls do not fit the revive stub"):
        stub.assemble([*calls, calls[0]], BASE, intel=True)


def test_calls_with_small_structures_fill_their_table_instead() -> None:
    with pytest.raises(ReviveError, match="500 hypercalls do not fit"):
        stub.assemble([stub.send(1)] * 500, BASE, intel=True)
