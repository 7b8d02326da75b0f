# SPDX-License-Identifier: Apache-2.0
"""The symbol table of a kernel in memory: every layout known, and what is not one."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from checkpoint.errors import UnsupportedGuest
from checkpoint.guest.kallsyms import Symbols
from checkpoint.guest.kernel import Kernel
from tests.unit.guest_kernel import IMAGE_PA, RODATA, GuestKernel, Options, build


def read(kernel: GuestKernel, *, user: bool = False) -> Symbols:
    cr3 = kernel.user_cr3 if user else kernel.cr3
    return Symbols.read(kernel.memory, cr3, kernel.lstar, la57=kernel.options.la57)


@pytest.mark.parametrize("order", ["6.1-first", "6.1", "6.4"])
@pytest.mark.parametrize("absolute_percpu", [True, False])
@pytest.mark.parametrize("fillers", [400, 641, 3000])
def test_every_symbol_has_its_type_name_and_address(
    order: str, absolute_percpu: bool, fillers: int
) -> None:
    options = Options(order=order, absolute_percpu=absolute_percpu, fillers=fillers)
    kernel = build(options)
    symbols = read(kernel)
    assert list(symbols) == kernel.names
    assert len(symbols) == len(kernel.names)
    for _, name, address in kernel.names:
        assert symbols[name] == address


@pytest.mark.parametrize("image_va", [0xFFFF_FFFF_8100_0000, 0xFFFF_FFFF_BFE0_0000])
def test_the_image_may_be_anywhere_in_its_window(image_va: int) -> None:
    kernel = build(Options(image_va=image_va))
    assert read(kernel)["tk_core"] == kernel.symbol("tk_core")


@pytest.mark.parametrize("la57", [False, True])
def test_a_cpu_paused_in_user_mode_has_other_page_tables(la57: bool) -> None:
    kernel = build(Options(isolated=True, la57=la57))
    assert list(read(kernel, user=True)) == kernel.names
    assert Kernel(read(kernel, user=True), kernel.memory, la57=la57).word("nr_cpu_ids", "") == 2


def test_a_name_that_is_missing_or_ambiguous_is_named() -> None:
    symbols = read(build(Options(twice=("last_value", "last_value"))))
    assert len(symbols.all("last_value")) == 3
    assert symbols.get("last_value") is None
    with pytest.raises(UnsupportedGuest, match="3 different symbol 'last_value'; expected one"):
        symbols["last_value"]
    assert symbols.all("no_such_thing") == []
    with pytest.raises(UnsupportedGuest, match="no symbol 'no_such_thing'"):
        symbols["no_such_thing"]


def test_a_function_ends_where_the_next_symbol_begins() -> None:
    kernel = build()
    symbols = read(kernel)
    start = kernel.symbol("pvclock_clocksource_read")
    assert symbols.after(start) == kernel.symbol("pvclock_resume")
    last = kernel.names[-1][2]
    assert symbols.after(last) == last


def test_per_cpu_symbols_are_one_for_each_cpu() -> None:
    for absolute_percpu in (True, False):
        guest = build(Options(absolute_percpu=absolute_percpu, cpus=3))
        kernel = Kernel(read(guest), guest.memory, la57=False)
        places = [kernel.place(kernel.percpu("xen_vcpu_id", cpu, ""), 4) for cpu in range(3)]
        assert [guest.peek(place, 4) for place in places] == [0, 1, 2]


def test_a_system_call_entry_outside_of_the_kernel_is_refused() -> None:
    kernel = build()
    for lstar in (0x1000, 0xFFFF_8880_0000_0000, 0xFFFF_FFFF_C000_0000):
        with pytest.raises(UnsupportedGuest, match="system call entry"):
            Symbols.read(kernel.memory, kernel.cr3, lstar)


def test_a_system_call_entry_that_is_not_linuxs_is_refused() -> None:
    kernel = build()
    with pytest.raises(UnsupportedGuest, match="no symbol table was found"):
        Symbols.read(kernel.memory, kernel.cr3, kernel.lstar + 16)


def test_a_kernel_without_symbols_is_refused() -> None:
    kernel = build()
    at = kernel.ram.find(b"0\x001\x002\x003\x00")
    kernel.ram[at + 4] = ord("x")
    with pytest.raises(UnsupportedGuest, match="no symbol table was found"):
        read(kernel)


@pytest.mark.parametrize("order", ["6.1-first", "6.1", "6.4"])
def test_a_damaged_table_is_not_believed(order: str) -> None:
    kernel = build(replace(Options(), order=order))
    count = struct.pack("<Q", len(kernel.names))
    at = kernel.ram.index(count, IMAGE_PA + RODATA)
    kernel.ram[at : at + 8] = struct.pack("<Q", len(kernel.names) - 1)
    with pytest.raises(UnsupportedGuest, match="no symbol table was found"):
        read(kernel)


def test_names_that_are_not_sorted_are_still_found() -> None:
    kernel = build()
    at = kernel.ram.rindex(struct.pack("<Q", kernel.options.image_va)) + 8
    kernel.ram[at : at + 3] = b"\0\0\0"
    symbols = read(kernel)
    assert [symbols[name] for _, name, _ in kernel.names] == [a for _, _, a in kernel.names]
