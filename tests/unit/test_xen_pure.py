# SPDX-License-Identifier: Apache-2.0
"""Save records, rings, machine state and release table: what needs no Xen at all."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from checkpoint.driver import PAGE_SIZE
from checkpoint.errors import CheckpointError, ProtocolError, UnsupportedGuest
from checkpoint.xen import rings
from checkpoint.xen.context import CPU, LAPIC_REGS, Context
from checkpoint.xen.rings import Kind
from checkpoint.xen.state import EventChannel, MachineState, StateEncoder
from checkpoint.xen.versions import RELEASES, running_release
from tests.unit.xen_fakes import save_file

# ---- Section: save records ----


def words(text: str) -> list[str]:
    return text.split()


#: struct hvm_hw_cpu (arch-x86/hvm/save.h), written out member by member
CPU_MEMBERS = [
    ("fpu", 512),
    *((name, 8) for name in words("rax rbx rcx rdx rbp rsi rdi rsp")),
    *((f"r{number}", 8) for number in range(8, 16)),
    *((name, 8) for name in words("rip rflags cr0 cr2 cr3 cr4")),
    *((f"dr{number}", 8) for number in (0, 1, 2, 3, 6, 7)),
    *((f"{name}_sel", 4) for name in words("cs ds es fs gs ss tr ldtr")),
    *((f"{name}_limit", 4) for name in words("cs ds es fs gs ss tr ldtr idtr gdtr")),
    *((f"{name}_base", 8) for name in words("cs ds es fs gs ss tr ldtr idtr gdtr")),
    *((f"{name}_arbytes", 4) for name in words("cs ds es fs gs ss tr ldtr")),
    *((name, 8) for name in words("sysenter_cs sysenter_esp sysenter_eip shadow_gs")),
    *((name, 8) for name in words("msr_flags lstar star cstar syscall_mask efer tsc_aux tsc")),
    *((name, 4) for name in words("pending_event error_code flags pad0")),
]
CPU_SIZE = sum(size for _name, size in CPU_MEMBERS)


def registers(body: bytes) -> dict[str, int]:
    """Members of a CPU record."""
    at, found = 0, {}
    for name, size in CPU_MEMBERS:
        found[name] = int.from_bytes(body[at : at + size], "little")
        at += size
    return found


def records(raw: bytes) -> list[tuple[int, int, bytes]]:
    """(typecode, instance, body) of each record, walked as Xen does."""
    at, found = 0, []
    while True:
        code, instance, length = struct.unpack_from("<HHI", raw, at)
        found.append((code, instance, raw[at + 8 : at + 8 + length]))
        at += 8 + length
        if code == 0:
            assert at == len(raw)
            return found


def cpu_of(raw: bytes, number: int) -> dict[str, int]:
    (body,) = (body for code, instance, body in records(raw) if (code, instance) == (2, number))
    assert len(body) == CPU_SIZE
    return registers(body)


def test_the_records_of_a_file() -> None:
    context = Context(save_file((0, 2), down=(1,)))
    assert context.vcpus() == [0, 2]
    assert list(context) == [(1, 0), (2, 0), (2, 2), (6, 0), (6, 1), (6, 2), (0, 0)]
    assert context.to_bytes() == save_file((0, 2), down=(1,))


def test_registers_are_where_xen_puts_them() -> None:
    raw = save_file((0, 1), rip=0xFFFF_8000_1234_5678, tsc=99)
    context = Context(raw)
    for number in (0, 1):
        vcpu, expected = context.vcpu(number), cpu_of(raw, number)
        for name in ("rip", "cr0", "cr3", "cr4", "lstar", "efer", "tsc"):
            assert getattr(vcpu, name) == expected[name], name
    offsets = context.instruction_pointers_at()
    assert [raw[at : at + 8] for at in offsets] == [
        (0xFFFF_8000_1234_5678).to_bytes(8, "little")
    ] * 2


def test_what_follows_the_end_record_is_no_part_of_it() -> None:
    assert Context(save_file() + b"rest of the buffer").to_bytes() == save_file()


@pytest.mark.parametrize("length", [0, 7, 8, 31, 32, 40])
def test_files_without_an_end(length: int) -> None:
    with pytest.raises(CheckpointError, match=r"no end record|exceeds its file"):
        Context(save_file()[:length])


def test_a_record_that_is_longer_than_its_file() -> None:
    with pytest.raises(CheckpointError, match="2/3 of 4294967295 bytes exceeds"):
        Context(struct.pack("<HHI", 2, 3, 0xFFFFFFFF) + bytes(64))


def test_records_that_are_missing_or_short() -> None:
    context = Context(save_file((0,)))
    with pytest.raises(CheckpointError, match="2/1 is missing"):
        context.vcpu(1)
    with pytest.raises(CheckpointError, match="6/5 is missing"):
        context.request_interrupt(5, 32)
    short = Context(struct.pack("<HHI", 2, 0, 900) + bytes(900) + bytes(8))
    for action in (lambda: short.vcpu(0), lambda: short.start_flat(0, 0)):
        with pytest.raises(CheckpointError, match="900 bytes"):
            action()


def changed(before: bytes, after: bytes) -> set[str]:
    """Names of the members of vCPU 1's record that differ; nothing else does."""
    assert len(before) == len(after)
    for old, new in zip(records(before), records(after), strict=True):
        if old[:2] != (CPU, 1):
            assert old == new
    old_cpu, new_cpu = cpu_of(before, 1), cpu_of(after, 1)
    return {name for name, value in old_cpu.items() if new_cpu[name] != value}


def test_setting_the_time_stamp_counter() -> None:
    context = Context(save_file((0, 1)))
    context.set_tsc(1, (5 << 64) + 123456789)
    assert changed(save_file((0, 1)), context.to_bytes()) == {"tsc"}
    assert context.vcpu(1).tsc == 123456789


@pytest.mark.parametrize("vector", [0, 31, 32, 0xF3, 255])
def test_requesting_an_interrupt(vector: int) -> None:
    context = Context(save_file((0, 1)))
    for _ in range(2):
        context.request_interrupt(1, vector)
    for code, instance, body in records(context.to_bytes()):
        if code == LAPIC_REGS and instance == 1:
            # the local APIC's IRR is 8 words of 32 bits, 16 bytes apart, from offset 0x200 on
            words = [struct.unpack_from("<I", body, 0x200 + 16 * index)[0] for index in range(8)]
            pending = sum(word << 32 * index for index, word in enumerate(words))
            assert pending == 1 << vector
            assert sum(map(bool, body)) == 1
        elif code == LAPIC_REGS:
            assert not any(body)


def test_requests_do_not_clear_each_other() -> None:
    context = Context(save_file())
    context.request_interrupt(0, 0xF3)
    context.request_interrupt(0, 0xF0)
    body = next(body for code, _instance, body in records(context.to_bytes()) if code == 6)
    assert struct.unpack_from("<I", body, 0x200 + 16 * 7) == (1 << 19 | 1 << 16,)


def test_only_the_boot_vcpu_is_left_with_a_record() -> None:
    context = Context(save_file((0, 1, 2)))
    context.set_tsc(0, 4711)
    raw = context.only_boot_vcpu()
    assert [item[:2] for item in records(raw)] == [(1, 0), (2, 0), (6, 0), (6, 1), (6, 2), (0, 0)]
    assert Context(raw).vcpu(0).tsc == 4711
    assert context.vcpus() == [0, 1, 2]


def test_the_state_that_the_stub_starts_in() -> None:
    before = save_file((0, 1))
    context = Context(before)
    context.start_flat(1, 0x20000)
    cpu = cpu_of(context.to_bytes(), 1)
    assert (cpu["rip"], cpu["rflags"], cpu["cr0"]) == (0x20000, 2, 0x11)
    assert all(cpu[name] == 0 for name in ("cr2", "cr3", "cr4", "efer", "rsp", "rax", "r15"))
    flat = {"cs": 0xC9B} | dict.fromkeys(("ds", "es", "fs", "gs", "ss"), 0xC93)
    for name, rights in flat.items():
        assert cpu[f"{name}_base"] == 0
        assert cpu[f"{name}_limit"] == 0xFFFFFFFF
        assert cpu[f"{name}_arbytes"] == rights
    assert (cpu["tr_arbytes"], cpu["tr_limit"], cpu["ldtr_arbytes"]) == (0x8B, 0x67, 0)
    kept = {f"dr{number}" for number in (0, 1, 2, 3, 6, 7)}
    kept.update(words("fpu shadow_gs lstar star cstar syscall_mask tsc tsc_aux msr_flags pad0"))
    kept.update(words("sysenter_cs sysenter_esp sysenter_eip flags"))
    assert not changed(before, context.to_bytes()) & kept
    # An interrupt that was being delivered to the guest would be the stub's end: it has no table of
    # handlers.
    assert cpu_of(before, 1)["pending_event"] != 0
    assert cpu["pending_event"] == cpu["error_code"] == 0


def test_a_vcpu_record_of_a_xen_that_has_no_pending_events() -> None:
    length = 1024 - 8
    record = struct.pack("<HHI", CPU, 0, length) + bytes(range(256)) * 3 + bytes(length - 768)
    context = Context(record + bytes(8))
    context.start_flat(0, 0x20000)
    assert context.vcpu(0).rip == 0x20000
    assert len(context.to_bytes()) == len(record) + 8


# ---- Section: rings ----


def grants(*frames: int) -> bytes:
    return b"".join(struct.pack("<HHI", 1, 0, frame) for frame in frames)


def test_rings_of_connected_devices_with_one_and_several_queues() -> None:
    store = {
        "device/vif/0/state": "4",
        "device/vif/0/tx-ring-ref": "1",
        "device/vif/0/rx-ring-ref": "2",
        "device/vif/1/state": "4",
        "device/vif/1/queue-0/tx-ring-ref": "3",
        "device/vif/1/queue-1/rx-ring-ref": "4",
        "device/vif/1/mac": "aa",
        "device/vbd/51712/state": "4",
        "device/vbd/51712/queue-0/ring-ref0": "5",
        "device/vbd/51712/queue-0/ring-ref1": "6",
        "device/vbd/51728/state": "4",
        "device/vbd/51728/ring-ref": "6",
        "device/vbd/51744/state": "2",
        "device/vbd/51744/ring-ref": "0",
        "device/console/0/tx-ring-ref": "0",
    }
    assert rings.device_rings(store, grants(50, 51, 52, 53, 54, 55, 56)) == [
        rings.Ring(51, Kind.TRANSMIT),
        rings.Ring(52, Kind.RECEIVE),
        rings.Ring(53, Kind.TRANSMIT),
        rings.Ring(54, Kind.RECEIVE),
        rings.Ring(55, Kind.DISK),
        rings.Ring(56, Kind.DISK),
    ]


@pytest.mark.parametrize("state", ["1", "3", "5", "6", None])
def test_references_of_a_frontend_that_is_not_connected_are_not_followed(state: str | None) -> None:
    store = {"device/vif/0/tx-ring-ref": "1"} | ({"device/vif/0/state": state} if state else {})
    assert rings.device_rings(store, grants(50, 51)) == []


@pytest.mark.parametrize("value", ["2", "99999999999", "", "ring", "0x1"])
def test_references_that_are_none(value: str) -> None:
    store = {"device/vif/0/state": "4", "device/vif/0/rx-ring-ref": value}
    with pytest.raises(CheckpointError, match="device/vif/0/rx-ring-ref has no valid grant"):
        rings.device_rings(store, grants(50, 51))


@pytest.mark.parametrize(
    ("requests", "responses", "answered"),
    [(0, 0, True), (7, 7, True), (8, 7, False), (0xFFFFFFFF, 0, False), (0, 0xFFFFFFFF, False)],
)
def test_transmit_rings(requests: int, responses: int, answered: bool) -> None:
    page = struct.pack("<4I", requests, 1, responses, 2) + bytes(4080)
    assert rings.answered(memoryview(page)) is answered


def receive_ring(requests: int, responses: int) -> bytearray:
    """A receive ring on which every slot holds a request, id and grant as Linux puts them."""
    page = bytearray(PAGE_SIZE)
    struct.pack_into("<4I", page, 0, requests, 1, responses, 1)
    for slot in range(256):
        struct.pack_into("<HHI", page, 64 + 8 * slot, slot, 0, 8 + slot)
    return page


def answer(page: bytearray, index: int, *, status: int, flags: int = 0) -> None:
    """What netback writes over a request: id, offset, flags, status (io/netif.h)."""
    slot = index % 256
    struct.pack_into("<HHHh", page, 64 + 8 * slot, slot, 0, flags, status)


@pytest.mark.parametrize("base", [0, 200, 0xFFFFFFF0])
def test_receive_rings_with_a_batch_of_answers_under_way(base: int) -> None:
    requests, responses = (base + 64) & 0xFFFFFFFF, base
    page = receive_ring(requests, responses)
    assert rings.receive_unambiguous(page, 512)
    answer(page, base - 1, status=60)  # answered before: it does not matter
    answer(page, base + 64, status=60)  # not asked for yet
    assert rings.receive_unambiguous(page, 512)
    for index in (base, base + 63):
        torn = bytearray(page)
        answer(torn, index, status=60)
        assert not rings.receive_unambiguous(torn, 512)
        failed = bytearray(page)
        answer(failed, index, status=-1)
        assert not rings.receive_unambiguous(failed, 512)


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 7])
def test_an_answer_whose_status_is_not_written_yet(flags: int) -> None:
    page = receive_ring(64, 0)
    answer(page, 5, status=0, flags=flags)
    assert not rings.receive_unambiguous(page, 512)


def test_receive_rings_at_their_ends() -> None:
    assert rings.receive_unambiguous(receive_ring(256, 0), 512)
    assert not rings.receive_unambiguous(receive_ring(257, 0), 512)
    assert not rings.receive_unambiguous(receive_ring(0, 1), 512)
    nothing_waits = receive_ring(9, 9)
    for index in range(256):
        answer(nothing_waits, index, status=1500)
    assert rings.receive_unambiguous(nothing_waits, 512)


def test_references_beyond_the_grant_table_are_no_requests() -> None:
    page = receive_ring(256, 0)
    assert rings.receive_unambiguous(page, 8 + 256)
    assert not rings.receive_unambiguous(page, 8 + 255)


def test_the_xenstore_ring() -> None:
    page = bytearray(PAGE_SIZE)
    struct.pack_into("<4I", page, 2048, 5, 5, 9, 9)
    assert rings.xenstore_indices(page) == (5, 5, 9, 9)
    assert rings.xenstore_empty(page)
    struct.pack_into("<4I", page, 2048, 5, 6, 9, 9)
    assert not rings.xenstore_empty(page)
    struct.pack_into("<4I", page, 2048, 5, 5, 8, 9)
    assert not rings.xenstore_empty(page)


def test_grants_that_nobody_uses() -> None:
    entries = [(1 | 0x18 | 0xE0, 7, 0x1234), (0xFF01, 0, 5), (0, 0, 0), (3, 1, 0xFFFFFFFF)]
    raw = b"".join(struct.pack("<HHI", *entry) for entry in entries)
    expected = [(1 | 0xE0, 7, 0x1234), (0xFF01, 0, 5), (0, 0, 0), (3, 1, 0xFFFFFFFF)]
    assert rings.unused_grants(raw) == b"".join(struct.pack("<HHI", *entry) for entry in expected)


# ---- Section: machine state ----


def state(**changes: object) -> MachineState:
    values: dict[str, object] = {
        "context": b"context of no round length",
        "events": [EventChannel(1, 2, 3, 4), EventChannel(9, 5, 0, 0xFFFF)],
        "grants": [b"\x01" * PAGE_SIZE, b"\x02" * PAGE_SIZE],
        "pages": {0xFEFFC: b"\x03" * PAGE_SIZE, 1 << 40: b"\x04" * PAGE_SIZE},
        "params": {0: (1 << 64) - 1, 7: 0},
        "store": {"name": "web", "data": "caf\xe9 \x00"},
    }
    return MachineState(**(values | changes))  # type: ignore[arg-type]


def test_a_state_comes_back_as_it_was() -> None:
    assert MachineState.from_bytes(state().to_bytes()) == state()
    empty = MachineState(b"", [], [], {}, {}, {})
    assert MachineState.from_bytes(empty.to_bytes()) == empty


def test_states_of_one_guest_have_one_shape() -> None:
    first = state().to_bytes()
    second = state(params={0: 1, 7: 2}, grants=[bytes(PAGE_SIZE)] * 2).to_bytes()
    assert len(first) == len(second)
    assert len(first) % 8 == 0


def test_an_encoder_sees_what_is_another_object() -> None:
    encoder = StateEncoder()
    first = state()
    assert encoder.encode(first) == encoder.encode(first) == first.to_bytes()
    other = state(events=[EventChannel(1, 1, 1, 1)], store={"name": "db"})
    assert encoder.encode(other) == other.to_bytes()


def broken(change: str) -> bytes:
    raw = bytearray(state().to_bytes())
    if change == "magic":
        raw[0] ^= 1
    elif change == "kind":
        raw[8] = 99
    elif change == "twice":
        raw += struct.pack("<II", 1, 0)
    elif change == "header":
        raw += b"\0\0\0\0"
    elif change == "length":
        raw[12:16] = b"\xff\xff\xff\xff"
    elif change == "cut":
        del raw[-8:]
    else:
        kind, body = change.split("=", 1)
        raw = bytearray(b"KMST0001")
        for number in range(1, 7):
            part = body.encode() if number == int(kind) else b"{}" if number == 5 else b""
            raw += struct.pack("<II", number, len(part)) + part + bytes(-len(part) % 8)
    return bytes(raw)


@pytest.mark.parametrize(
    "change",
    [
        "magic", "kind", "twice", "header", "length", "cut", "2=short", "3=page", "4=page",
        "6=param", "5=", "5=[]", "5={", '5={"a":1}', '5={"a":null}', "5=\x80", "5=" + "[" * 100000,
    ],
    ids=lambda change: change[:12],
)  # fmt: skip
def test_broken_states_are_refused(change: str) -> None:
    with pytest.raises(ProtocolError):
        MachineState.from_bytes(broken(change))


def test_a_state_that_lacks_something_says_what() -> None:
    body = json.dumps({}).encode()
    raw = b"KMST0001" + struct.pack("<II", 5, len(body)) + body + bytes(6)
    with pytest.raises(ProtocolError, match="lacks: vCPU context, event channels, grant table"):
        MachineState.from_bytes(raw)


# ---- Section: releases ----


def hypervisor(root: Path, kind: str, major: str, minor: str) -> Path:
    (root / "version").mkdir()
    (root / "type").write_text(kind + "\n")
    (root / "version/major").write_text(major + "\n")
    (root / "version/minor").write_text(minor + "\n")
    return root


@pytest.mark.parametrize("minor", ["17", "20"])
def test_releases_that_are_known(tmp_path: Path, minor: str) -> None:
    release = running_release(hypervisor(tmp_path, "xen", "4", minor))
    assert release == RELEASES[f"4.{minor}"]
    assert release.libxenctrl == f"libxenctrl.so.4.{minor}"
    assert release.python_path == f"/usr/lib/xen-4.{minor}/lib/python"


@pytest.mark.parametrize(("kind", "minor"), [("xen", "18"), ("xen", "2"), ("kvm", "17")])
def test_releases_that_are_not(tmp_path: Path, kind: str, minor: str) -> None:
    with pytest.raises(UnsupportedGuest, match=r"is not supported \(expected one of 4.17, 4.20\)"):
        running_release(hypervisor(tmp_path, kind, "4", minor))


def test_no_xen_at_all(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedGuest, match="does not run Xen"):
        running_release(tmp_path / "missing")
