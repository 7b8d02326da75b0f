# SPDX-License-Identifier: Apache-2.0
"""Structure layouts from BTF."""

from __future__ import annotations

import struct

import pytest

from checkpoint.errors import UnsupportedGuest
from checkpoint.guest.btf import Btf
from checkpoint.guest.kallsyms import Symbols
from tests.unit.guest_kernel import CONST, FUNC_PROTO, TYPEDEF, UNION, Options, Types, build


def sample() -> Types:
    """struct outer {u32 a; union {u64 b; struct {u32 c, d;};}; inner_t e[3]; u32 f:3, g:5;}"""
    types = Types()
    types.add("", FUNC_PROTO, types.u32, struct.pack("<IIII", 0, types.u64, 0, 0), 2)
    inner = types.struct("inner", 12, [("x", types.u32, 0), ("outer", types.u64, 4)])
    alias = types.add("inner_t", TYPEDEF, types.add("", CONST, inner))
    pair = types.struct("", 8, [("c", types.u32, 0), ("d", types.u32, 4)])
    either = types.struct("", 8, [("b", types.u64, 0), ("", pair, 0)], kind=UNION)
    members = [("a", types.u32, 0), ("", either, 8), ("e", types.array(alias, 3), 16)]
    fields = b"".join(struct.pack("<III", types.name(t), of, 8 * at) for t, of, at in members)
    fields += struct.pack("<III", types.name("f"), types.u32, 3 << 24 | 416)
    fields += struct.pack("<III", types.name("g"), types.u32, 5 << 24 | 424)
    types.add("outer", 1 << 7 | 4, 56, fields, 5)
    return types


def test_members_are_found_as_in_c() -> None:
    types = Btf(sample().bytes())
    assert types.offset("outer") == 0
    assert types.offset("outer", "b") == types.offset("outer", "c") == 8
    assert types.offset("outer", "d") == 12
    assert types.offset("outer", "e", 2) == 40
    assert types.offset("outer", "e", 2, "outer") == 44
    assert types.offset("outer", "f") == 52
    assert types.offset("outer", "g") == 53
    assert types.offset("inner_t", "outer") == 4


def test_sizes_follow_typedefs() -> None:
    types = Btf(sample().bytes())
    assert (types.size("outer"), types.size("inner"), types.size("inner_t")) == (56, 12, 12)
    assert types.has("inner_t")
    assert not types.has("u64")
    assert not types.has("x")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (("nothing",), "no type 'nothing'"),
        (("outer", "x"), "no member 'x' in its type 'outer'"),
        (("outer", "a", "x"), "no member 'x' in its type 'outer'"),
        (("outer", "e", 3), "array of 3 elements where element 3"),
        (("outer", "a", 0), "array of 0 elements where element 0"),
    ],
)
def test_what_is_missing_is_named(path: tuple[str, ...], said: str) -> None:
    with pytest.raises(UnsupportedGuest, match=said):
        Btf(sample().bytes()).offset(*path)


def test_damaged_types_are_refused() -> None:
    good = sample().bytes()
    for data, said in (
        (b"", "is cut short"),
        (good[:-1], "is cut short"),
        (b"\x9e\xeb" + good[2:], "begins with 0xeb9e, version 1; expected 0xeb9f, 1"),
        (good[:24] + b"\0\0\0\0\0\0\0\x1f" + good[32:], "type of kind 31"),
        (good[:24] + b"\0\0\0\0\xff\xff\0\x04" + good[32:], "does not end with a whole type"),
        (good[:12] + struct.pack("<I", 7) + good[16:], "7 bytes of types"),
    ):
        with pytest.raises(UnsupportedGuest, match=said):
            Btf(data)


def test_types_in_a_circle_lead_to_nothing() -> None:
    types = Types()
    types.add("loop_t", TYPEDEF, types.count + 1)
    ring = types.count + 1
    types.struct("ring", 8, [("", ring, 0), ("", ring, 0)])
    read = Btf(types.bytes())
    with pytest.raises(UnsupportedGuest, match="leads from type"):
        read.size("loop_t")
    with pytest.raises(UnsupportedGuest, match="no member 'a'"):
        read.offset("ring", "a")


def test_a_kernel_without_types_is_refused() -> None:
    kernel = build(Options(without=("__start_BTF",)))
    symbols = Symbols.read(kernel.memory, kernel.cr3, kernel.lstar)
    with pytest.raises(UnsupportedGuest, match="CONFIG_DEBUG_INFO_BTF"):
        Btf.read(symbols)
