# SPDX-License-Identifier: Apache-2.0
"""A guest's memory is the guest's: whatever is in it, only named errors come out, and soon."""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint.errors import CheckpointError, ProtocolError, UnsupportedGuest
from checkpoint.guest.btf import Btf
from checkpoint.guest.clock import shift_clock, timekeeping_at_rest
from checkpoint.guest.events import LINKED, MASKED, PENDING, event_pages, grant_frames
from checkpoint.guest.kallsyms import Symbols
from checkpoint.guest.layout import LinuxLayout
from checkpoint.guest.linux import Registers, read_layout
from checkpoint.guest.memory import GuestMemoryError, RamView
from checkpoint.guest.paging import AddressSpace
from checkpoint.guest.xenstore import read_watches, xenstore_at_rest
from tests.unit.guest_fifo import FifoGuest
from tests.unit.guest_kernel import DATA, IMAGE_PA, RODATA, Options, build, kernel_types

PATIENCE_S = 30.0
slow = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)

GOOD = build(Options(order="6.1"))
LAYOUT = read_layout(GOOD.memory, GOOD.registers)
TYPES = kernel_types().bytes()
REGIONS = [
    (0x1000, 0x8000),
    (IMAGE_PA + RODATA, 0x8000),
    (IMAGE_PA + DATA, 0x5000),
    (0x20_0000, 0x400),
    (0x60000, 0x200),
]


@contextmanager
def named(kind: type[CheckpointError] = UnsupportedGuest) -> Iterator[None]:
    """Lets what is inside raise errors of that kind, with something said, soon."""
    start = time.monotonic()
    try:
        yield
    except kind as error:
        if not str(error):
            raise
    assert time.monotonic() - start < PATIENCE_S


def use(memory: RamView, layout: LinuxLayout) -> None:
    """All that is done with a layout."""
    timekeeping_at_rest(memory, layout)
    xenstore_at_rest(memory, layout)
    for ask in (grant_frames, event_pages, read_watches):
        with named():
            ask(memory, layout)
    shift_clock(memory, layout, -1)


@slow
@given(seed=st.integers(0, 1 << 32), flips=st.integers(1, 200), region=st.sampled_from(REGIONS))
def test_damaged_kernels(seed: int, flips: int, region: tuple[int, int]) -> None:
    chance = random.Random(seed)
    ram = bytearray(GOOD.ram)
    for _ in range(flips):
        at = region[0] + chance.randrange(region[1])
        ram[at] = chance.choice((0, 0xFF, chance.randrange(256), ram[at] ^ 1))
    with named():
        use(RamView(ram), LAYOUT)
    with named():
        use(RamView(ram), read_layout(RamView(ram), GOOD.registers))


@settings(slow, max_examples=15)
@given(seed=st.integers(0, 1 << 32), cr3=st.integers(0, (1 << 64) - 1), la57=st.booleans())
def test_pages_of_noise(seed: int, cr3: int, la57: bool) -> None:
    ram = bytearray(random.Random(seed).randbytes(1 << 18))
    # Noise is mostly not present, or far outside: make it lead back into this memory.
    for at in range(0, len(ram), 8):
        ram[at] |= 1
        ram[at + 2 : at + 8] = bytes([ram[at + 2] & 3, 0, 0, 0, 0, 0])
    with named(GuestMemoryError):
        space = AddressSpace(RamView(ram), cr3 & 0x3_FFFF, la57=la57)
        for extent in space.extents(0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_C000_0000):
            assert extent.length > 0
    registers = [Registers(cr3 & 0x3_FFFF, la57 << 12, 0xFFFF_FFFF_8100_0080)]
    with named():
        read_layout(RamView(ram), registers)


@slow
@given(data=st.binary(max_size=400), at=st.integers(0, len(TYPES) - 1), tail=st.booleans())
def test_damaged_types(data: bytes, at: int, tail: bool) -> None:
    damaged = TYPES[:at] + data + (TYPES[at + len(data) :] if tail else b"")
    with named():
        types = Btf(damaged)
        types.size("tk_fast")
        types.offset("tk_fast", "base", 1, "cycle_last")
        types.offset("vdso_data", "cycle_last")


def test_a_symbol_table_made_to_keep_the_reader_busy() -> None:
    """Each row of digits looks like a table, at each place of which names could begin."""
    kernel = build()
    at = kernel.ram.find(b"0\x001\x002\x003\x00")
    row = bytes(kernel.ram[at : at + 20])
    start = IMAGE_PA + RODATA
    kernel.ram[start : start + 0x80000] = row * (0x80000 // 20) + bytes(8)
    with named(), pytest.raises(UnsupportedGuest, match="no symbol table was found"):
        Symbols.read(kernel.memory, kernel.cr3, kernel.lstar)


def test_names_that_could_begin_anywhere() -> None:
    """Names of 8 bytes each, that are also the count of names, and end where none may end."""
    kernel = build()
    start, end = IMAGE_PA + RODATA, IMAGE_PA + DATA
    count = 0x10007
    names = struct.pack("<Q", count) * (count + 4000) + b"\x7f" * 8
    markers = struct.pack(f"<{(count + 255) >> 8}I", *range(0, 8 * count, 2048))
    table = b"\0" + b"".join(bytes([value]) + b"\0" for value in range(1, 256))
    index = struct.pack("<256H", 0, *range(1, 511, 2))
    parts = [names, markers, table, index]
    block = b"".join(part + bytes(-len(part) % 8) for part in parts)
    assert len(block) <= end - start
    kernel.ram[start:end] = block.ljust(end - start, b"\0")
    with named(), pytest.raises(UnsupportedGuest, match="no symbol table was found"):
        Symbols.read(kernel.memory, kernel.cr3, kernel.lstar)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(value=json_values, name=st.sampled_from(sorted(LAYOUT.to_json())))
def test_layouts_from_a_hostile_peer(value: object, name: str) -> None:
    for untrusted_value in (value, LAYOUT.to_json() | {name: value}):
        with named(ProtocolError):
            layout = LinuxLayout.from_json(untrusted_value)
            assert json.dumps(layout.to_json()) == json.dumps(untrusted_value)


@slow
@given(seed=st.integers(0, 1 << 32), pages=st.integers(1, 2))
def test_no_event_is_lost_in_a_move(seed: int, pages: int) -> None:
    """Whatever both hosts' queues were like, all bound ports are handled, and later ones too."""
    chance = random.Random(seed)
    guest = FifoGuest(pages)
    ports = chance.sample(range(1, 1024 * pages), 12)
    bound = {0: ports[:6], 1: ports[6:]}
    for port in ports:
        guest.captured[port] = chance.choice((0, PENDING, LINKED, PENDING | LINKED | ports[0]))
        guest.captured[port] |= chance.choice((0, 0, MASKED))
    masked = {port for port in ports if guest.captured[port] & MASKED}
    for vcpu, mine in bound.items():
        guest.kernel.poke(guest.kernel.percpu("cpu_queue", vcpu) + 28, chance.choice(mine), size=4)
        for port in chance.sample(mine, chance.randrange(4)):
            guest.send(vcpu, port)
    guest.settle(bound)
    for vcpu, mine in bound.items():
        for port in chance.sample(mine, chance.randrange(3)):
            guest.send(vcpu, port)
        assert sorted(guest.handle(vcpu)) == sorted(set(mine) - masked)
        for port in chance.sample(mine, len(mine)):
            if port in masked:
                guest.unmask(vcpu, port)
            else:
                guest.send(vcpu, port)
        assert sorted(guest.handle(vcpu)) == sorted(mine)
