# SPDX-License-Identifier: Apache-2.0
"""The stub: a few instructions that make, on the shell's vCPU 0, the hypercalls that only the
guest itself may make.  Pure: this module lays out bytes.

The stub runs in 32-bit protected mode without paging.  It walks a table of hypercalls (number and
three arguments each), stores every result, sets a flag and yields until it is paused and replaced:
where there is no other processor for Dom0, which waits for the flag, spinning would keep it waiting
for the rest of a time slice.
Numbers and structures: ``xen/include/public/{xen,vcpu,event_channel}.h``, ``hvm/hvm_op.h``; none
of the structures used differs between 32 and 64 bits.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint.driver import PAGE_SIZE
from checkpoint.errors import ReviveError
from checkpoint.xen.state import EventChannel

_HYPERVISOR_VCPU_OP, _HYPERVISOR_EVENT_CHANNEL_OP, _HYPERVISOR_HVM_OP = 24, 32, 34
_HYPERVISOR_SCHED_OP = 29  # SCHEDOP_yield is 0 (xen/include/public/sched.h)
_VCPUOP_REGISTER_VCPU_INFO = 10
_HVMOP_SET_EVTCHN_UPCALL_VECTOR = 23
_BIND_VIRQ, _CLOSE, _SEND, _STATUS, _ALLOC_UNBOUND, _BIND_IPI, _BIND_VCPU = 1, 3, 4, 5, 6, 7, 8
_INIT_CONTROL, _EXPAND_ARRAY = 11, 12
_DOMID_SELF = 0x7FF0

UNBOUND, INTERDOMAIN, PIRQ, VIRQ, IPI = 1, 2, 3, 4, 5

_DONE = 0x00C0FFEE
_PENDING = 0x55555555
_ENTRY = struct.Struct("<5I")
_END = 0xFFFFFFFF

#: pages of guest RAM that a stub needs: code and flag, table (2), arguments (2)
STUB_PAGES = 5
_TABLE, _ARGS = PAGE_SIZE, 3 * PAGE_SIZE
_FLAG = 256

#: calls that fit at one time, whichever they are (the largest structure has 24 bytes)
MOST_CALLS = 256


@dataclass(frozen=True, slots=True)
class Call:
    """One hypercall: number, command, what it is for, and the argument structure if any.

    With ``vcpu`` the second argument is that vCPU's number and the structure the third one.  With
    ``port`` Xen fills in an event channel's number, the last word of the structure, and it must be
    that one.
    """

    number: int
    command: int
    about: str
    argument: bytes
    vcpu: int | None = None
    port: int | None = None


def register_vcpu_info(vcpu: int, address: int) -> Call:
    """Place the vcpu_info of ``vcpu`` at guest-physical ``address``."""
    argument = struct.pack("<QII", address // PAGE_SIZE, address % PAGE_SIZE, 0)
    return Call(
        _HYPERVISOR_VCPU_OP, _VCPUOP_REGISTER_VCPU_INFO, f"vcpu_info of vCPU {vcpu}", argument, vcpu
    )


def upcall_vector(vcpu: int, vector: int) -> Call:
    """Deliver events to ``vcpu`` through its local APIC as ``vector``."""
    argument = struct.pack("<IB3x", vcpu, vector)
    return Call(
        _HYPERVISOR_HVM_OP,
        _HVMOP_SET_EVTCHN_UPCALL_VECTOR,
        f"upcall vector of vCPU {vcpu}",
        argument,
    )


def fifo_init_control(vcpu: int, gfn: int, offset: int) -> Call:
    """Give ``vcpu`` its FIFO control block."""
    argument = struct.pack("<QIIB7x", gfn, offset, vcpu, 0)
    return Call(
        _HYPERVISOR_EVENT_CHANNEL_OP, _INIT_CONTROL, f"FIFO control block of vCPU {vcpu}", argument
    )


def fifo_expand_array(gfn: int) -> Call:
    """Append a page to the FIFO event array."""
    return Call(
        _HYPERVISOR_EVENT_CHANNEL_OP, _EXPAND_ARRAY, "FIFO event array", struct.pack("<Q", gfn)
    )


def send(port: int) -> Call:
    """Notify the other end of ``port``."""
    return Call(
        _HYPERVISOR_EVENT_CHANNEL_OP, _SEND, f"notification on port {port}", struct.pack("<I", port)
    )


def status(port: int) -> Call:
    """Ask what ``port`` is; changes nothing."""
    argument = struct.pack("<HxxI16x", _DOMID_SELF, port)
    return Call(_HYPERVISOR_EVENT_CHANNEL_OP, _STATUS, f"status of port {port}", argument)


def bind_events(events: Sequence[EventChannel], reserved: set[int]) -> list[Call]:
    """Calls after which every port of ``events`` exists under its own number.

    Xen hands out the lowest free port, so ports are made in ascending order and gaps are filled
    with ports that are closed again.  ``reserved`` ports were made by the toolstack.

    :raise ReviveError: for a port that only real hardware can provide
    """
    calls: list[Call] = []
    gaps: list[int] = []
    wanted = {event.port: event for event in events if event.port not in reserved}

    def add(command: int, about: str, argument: bytes, makes: int | None = None) -> None:
        calls.append(Call(_HYPERVISOR_EVENT_CHANNEL_OP, command, about, argument, port=makes))

    for port in range(1, max(wanted, default=0) + 1):
        event = wanted.get(port)
        if event is None:
            if port not in reserved:
                gaps.append(port)
                unbound = struct.pack("<HHI", _DOMID_SELF, 0, 0)
                add(_ALLOC_UNBOUND, f"filler port {port}", unbound, port)
        elif event.status == VIRQ:
            add(
                _BIND_VIRQ,
                f"VIRQ {event.detail} port {port}",
                struct.pack("<III", event.detail, event.vcpu if _per_vcpu(event.detail) else 0, 0),
                port,
            )
        elif event.status == IPI:
            add(_BIND_IPI, f"IPI port {port}", struct.pack("<II", event.vcpu, 0), port)
        elif event.status in (UNBOUND, INTERDOMAIN):
            add(
                _ALLOC_UNBOUND,
                f"port {port}",
                struct.pack("<HHI", _DOMID_SELF, event.detail, 0),
                port,
            )
        else:
            raise ReviveError(f"event channel {port} is a physical interrupt (expected none)")
    for port in gaps:
        add(_CLOSE, f"filler port {port}", struct.pack("<I", port))
    for event in events:
        movable = event.status in (UNBOUND, INTERDOMAIN) or (
            event.status == VIRQ and not _per_vcpu(event.detail)
        )
        if movable and event.vcpu:
            add(
                _BIND_VCPU,
                f"target of port {event.port}",
                struct.pack("<II", event.port, event.vcpu),
            )
    return calls


def _per_vcpu(virq: int) -> bool:
    # VIRQ_TIMER, VIRQ_DEBUG, VIRQ_XENOPROF, VIRQ_XENPMU (xen.h); all others are global
    return virq in (0, 1, 7, 13)


def assemble(calls: Sequence[Call], base: int, *, intel: bool) -> bytes:
    """The stub's memory: ``STUB_PAGES`` pages to be placed at physical address ``base``.

    :param intel: use VMCALL instead of AMD's VMMCALL
    :raise ReviveError: more calls than the pages hold
    """
    table = bytearray()
    args = bytearray()
    for call in calls:
        address = base + _ARGS + len(args)
        args += call.argument.ljust(_room(call), b"\0")
        words = (call.vcpu, address) if call.vcpu is not None else (address, 0)
        table += _ENTRY.pack(call.number, call.command, *words, _PENDING)
    table += struct.pack("<I", _END)
    if len(table) > _ARGS - _TABLE or len(args) > STUB_PAGES * PAGE_SIZE - _ARGS:
        raise ReviveError(f"{len(calls)} hypercalls do not fit the revive stub")
    vmcall = b"\x0f\x01\xc1" if intel else b"\x0f\x01\xd9"
    code = b"".join(
        (
            b"\xbd" + struct.pack("<I", base + _TABLE),  # mov ebp, table
            b"\x8b\x45\x00",  # next: mov eax, [ebp]
            b"\x83\xf8\xff",  # cmp eax, -1
            b"\x74\x14",  # je done
            b"\x8b\x5d\x04\x8b\x4d\x08\x8b\x55\x0c",  # mov ebx, [ebp+4]; ecx +8; edx +12
            vmcall,
            b"\x89\x45\x10",  # mov [ebp+16], eax
            b"\x83\xc5\x14",  # add ebp, 20
            b"\xeb\xe4",  # jmp next
            b"\xc7\x05" + struct.pack("<II", base + _FLAG, _DONE),  # done: mov [flag], DONE
            b"\xb8" + struct.pack("<I", _HYPERVISOR_SCHED_OP),  # yield: mov eax, sched_op
            b"\x31\xdb",  # xor ebx, ebx
            vmcall,
            b"\xeb\xf4",  # jmp yield
        )
    )
    out = bytearray(STUB_PAGES * PAGE_SIZE)
    out[: len(code)] = code
    out[_TABLE : _TABLE + len(table)] = table
    out[_ARGS : _ARGS + len(args)] = args
    return bytes(out)


def _room(call: Call) -> int:
    return -(-len(call.argument) // 16) * 16


def finished(memory: bytes | bytearray | memoryview) -> bool:
    """Whether the stub in these pages has made all its calls."""
    return bytes(memory[_FLAG : _FLAG + 4]) == struct.pack("<I", _DONE)


def check_results(memory: bytes | bytearray | memoryview, calls: Sequence[Call]) -> None:
    """Look at the results that a finished stub has left.

    :raise ReviveError: naming the first call that failed, or made another port than it should
    """
    end = _ARGS
    for index, call in enumerate(calls):
        at = _TABLE + index * _ENTRY.size + 16
        (result,) = struct.unpack_from("<i", memory, at)
        if result < 0:
            raise ReviveError(f"{call.about}: the hypervisor answered {result} (expected 0)")
        (made,) = struct.unpack_from("<I", memory, end + len(call.argument) - 4)
        if call.port is not None and made != call.port:
            raise ReviveError(f"{call.about}: the hypervisor made port {made}")
        end += _room(call)
