# SPDX-License-Identifier: Apache-2.0
"""Guest memory and page tables."""

from __future__ import annotations

import struct

import pytest

from checkpoint.guest.memory import GuestMemoryError, RamView
from checkpoint.guest.paging import AddressSpace, Extent, NotMappedError

PRESENT, LARGE, NO_EXECUTE = 1, 0x80, 1 << 63
LOW, HIGH = 0x4000_0000, 0xFFFF_FFFF_8000_0000


def tables() -> bytearray:
    """Four levels at 0x1000: 4 KiB pages, a 2 MiB and a 1 GiB page from LOW on."""
    ram = bytearray(0x10000)

    def entry(table: int, index: int, value: int) -> None:
        struct.pack_into("<Q", ram, table + 8 * index, value)

    entry(0x1000, 0, 0x2000 | PRESENT)
    entry(0x2000, 1, 0x3000 | PRESENT)
    entry(0x2000, 2, 0x8000_0000 | PRESENT | LARGE | NO_EXECUTE | 1 << 12)
    entry(0x3000, 0, 0x4000 | PRESENT)
    entry(0x3000, 1, 0x40_0000 | PRESENT | LARGE)
    entry(0x4000, 0, 0x6000 | PRESENT | NO_EXECUTE)
    entry(0x4000, 1, 0x7000 | PRESENT)
    entry(0x4000, 2, 0x9000)
    entry(0x4000, 511, 0x3F_F000 | PRESENT)
    return ram


def test_pages_of_each_size_are_translated() -> None:
    space = AddressSpace(RamView(tables()), 0x1018)
    assert space.translate(LOW + 0x123) == 0x6123
    assert space.translate(LOW + 0x1FFF) == 0x7FFF
    assert space.translate(LOW + 0x2A_BCDE) == 0x4A_BCDE
    assert space.translate(LOW + 0x4123_4567) == 0x8000_0000 + 0x123_4567


def test_what_is_not_mapped_is_said_so() -> None:
    space = AddressSpace(RamView(tables()), 0x1000)
    for va in (0, LOW + 0x2000, LOW + 0x40_0000, HIGH):
        with pytest.raises(NotMappedError, match=f"no page at virtual address {va:#x}"):
            space.translate(va)
    for va in (1 << 47, 1 << 64, -1):
        with pytest.raises(NotMappedError, match="not canonical"):
            space.translate(va)


def test_five_levels_have_one_table_more() -> None:
    ram = tables()
    struct.pack_into("<Q", ram, 0x5000 + 8 * 0x100, 0x1000 | PRESENT)
    space = AddressSpace(RamView(ram), 0x5000, la57=True)
    assert space.translate(0xFF00_0000_0000_0000 | LOW) == 0x6000
    with pytest.raises(NotMappedError, match="no page"):
        space.translate(LOW)
    with pytest.raises(NotMappedError, match="not canonical"):
        space.translate(1 << 56)


def test_extents_are_joined_where_both_sides_go_on() -> None:
    space = AddressSpace(RamView(tables()), 0x1000)
    assert list(space.extents(LOW, LOW + 0x8000_0000)) == [
        Extent(LOW, 0x6000, 0x2000),
        Extent(LOW + 0x1F_F000, 0x3F_F000, 0x20_1000),
        Extent(LOW + 0x4000_0000, 0x8000_0000, 0x4000_0000),
    ]
    assert list(space.extents(LOW + 0x800, LOW + 0x1800)) == [Extent(LOW + 0x800, 0x6800, 0x1000)]
    assert not list(space.extents(HIGH, HIGH + 0x4000_0000))


def test_reads_go_across_pages() -> None:
    ram = tables()
    ram[0x6FFE:0x7002] = b"abcd"
    ram[0x7FFC:0x8000] = b"end\xff"
    space = AddressSpace(RamView(ram), 0x1000)
    assert space.read(LOW + 0xFFE, 4) == b"abcd"
    assert space.u32(LOW + 0xFFE) == int.from_bytes(b"abcd", "little")
    assert space.cstring(LOW + 0xFFE) == "abcd"
    with pytest.raises(NotMappedError):
        space.read(LOW + 0x1FFE, 4)
    with pytest.raises(NotMappedError):
        space.cstring(LOW + 0x1FFC)
    with pytest.raises(GuestMemoryError, match="no string ends within 3 bytes"):
        space.cstring(LOW + 0xFFE, 3)


def test_a_table_outside_of_memory_is_an_error() -> None:
    ram = tables()
    struct.pack_into("<Q", ram, 0x2000 + 8, 0xF_FFFF_F000 | PRESENT)
    space = AddressSpace(RamView(ram), 0x1000)
    with pytest.raises(GuestMemoryError, match="outside of guest RAM, which ends at 0x10000"):
        space.translate(LOW)
    with pytest.raises(GuestMemoryError, match="outside of guest RAM"):
        list(space.extents(LOW, LOW + 1))


def test_memory_is_bounded() -> None:
    ram = bytearray(b"0123456789")
    memory = RamView(memoryview(ram))
    assert memory.read(8, 2) == b"89"
    assert memory.read(10, 0) == b""
    memory.write(8, b"xy")
    assert ram == b"01234567xy"
    for pa, length in ((9, 2), (-1, 1), (1 << 63, 1), (0, -1)):
        with pytest.raises(GuestMemoryError, match="outside of guest RAM"):
            memory.read(pa, length)
    for pa in (9, -1):
        with pytest.raises(GuestMemoryError, match="outside of guest RAM"):
            memory.write(pa, b"ab")
    assert ram == b"01234567xy"
    with pytest.raises(GuestMemoryError, match="read-only"):
        RamView(bytes(ram)).write(0, b"a")


def test_any_buffer_is_seen_as_bytes() -> None:
    words = memoryview(bytearray(16)).cast("I")
    memory = RamView(words)
    memory.write(4, b"\1\0\0\0")
    assert words[1] == 1
