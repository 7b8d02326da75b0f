# SPDX-License-Identifier: Apache-2.0
"""The symbol table that a running Linux kernel carries in its own read-only data.

Facts from kernel/kallsyms.c and scripts/kallsyms.c.  The table is made of arrays without a header,
each aligned to 8 bytes::

    num_syms     u32
    names        per symbol a length (1 byte, or 2 if the first has bit 7) and that many tokens
    markers      u32 each: where in names every 256th symbol begins
    token_table  256 NUL-terminated strings, one for each value of a token
    token_index  u16 each: where in token_table each string begins
    offsets      i32 each: a symbol's address, see below
    relative_base  u64
    seqs_of_names  3 bytes each, big-endian: the symbols' numbers in the order of their names

This is the order since Linux 6.4.  Before, offsets and relative_base stood in front of num_syms,
and seqs_of_names (from 6.2, and in stable 6.1) between markers and token_table.

A token that stands for itself is a single character, which is so for all digits; that row of ten
strings is what the tables are found by.  Everything else follows from their distances, and is
checked.

With CONFIG_KALLSYMS_ABSOLUTE_PERCPU (x86-64 up to 6.14) an offset >= 0 is an absolute value (all
per-CPU symbols), and an offset < 0 is ``relative_base - 1 - address``.  Without it an offset is the
unsigned distance from relative_base.  Which one holds is told by entry_SYSCALL_64, whose address
is known.
"""

from __future__ import annotations

import re
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

from checkpoint.errors import UnsupportedGuest
from checkpoint.guest.image import KERNEL_MAP, KernelImage, images
from checkpoint.guest.memory import GuestMemoryError, PhysicalMemory

ENTRY = "entry_SYSCALL_64"
"""The symbol that MSR LSTAR points to (arch/x86/kernel/cpu/common.c)."""

_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_MOST_SYMBOLS = 1 << 20
_MOST_HITS = 16
"""Rows of digits that are looked at; in real kernels there are one or two."""
_MOST_TRIES = 8
"""Places per row at which the names are tried, each a walk over all of them."""
_LONGEST_NAME = 0x3FFF + 2
_LONGEST_TABLE = 16384
_SANE_NAME = re.compile(rb"[a-zA-Z?][A-Za-z0-9_.$][\x21-\x7e]*")
_HIGH_BYTE = re.compile(rb"[\x10-\xff]")
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_I32 = struct.Struct("<i")
_U64 = struct.Struct("<Q")
_WORD = (1 << 64) - 1


def _align(value: int) -> int:
    return (value + 7) & ~7


class _MismatchError(Exception):
    """A place that looked like the table's is not it."""


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The token table.

    :ivar table: virtual address of ``kallsyms_token_table``
    :ivar end: virtual address just after ``kallsyms_token_index``
    :ivar text: the 256 strings
    """

    table: int
    end: int
    text: list[bytes]


@dataclass(frozen=True, slots=True)
class _Names:
    """The compressed names.

    :ivar at: virtual address of ``kallsyms_names``
    :ivar count: number of symbols
    :ivar data: the array's bytes
    :ivar markers: offset in ``data`` of every 256th symbol
    :ivar order: virtual address of ``kallsyms_seqs_of_names`` if it stands before the tokens
    """

    at: int
    count: int
    data: bytes
    markers: array[int]
    order: int | None


@dataclass(frozen=True, slots=True)
class _Addresses:
    """The symbols' addresses.

    :ivar offsets: ``kallsyms_offsets`` as it stands
    :ivar base: ``kallsyms_relative_base``
    :ivar absolute_percpu: how an offset is to be read
    """

    offsets: array[int]
    base: int
    absolute_percpu: bool

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> int:
        offset = self.offsets[index]
        if not self.absolute_percpu:
            return (self.base + (offset & 0xFFFF_FFFF)) & _WORD
        return offset if offset >= 0 else (self.base - 1 - offset) & _WORD


class Symbols:
    """The symbols of a running kernel; addresses are virtual, as they are now (KASLR included).

    A name is looked up when it is asked for, by bisection where the kernel has its names sorted;
    the whole table is expanded only where it has not (6.1 kernels without that stable update).
    """

    def __init__(
        self,
        image: KernelImage,
        tokens: _Tokens,
        names: _Names,
        addresses: _Addresses,
        order: bytes | None,
    ) -> None:
        self.image = image
        self._tokens = tokens.text
        self._names = names
        self._addresses = addresses
        self._order = order
        self._by_name: dict[str, list[int]] = {}
        self._complete = False

    @classmethod
    def read(cls, memory: PhysicalMemory, cr3: int, lstar: int, *, la57: bool = False) -> Symbols:
        """Find the symbol table of the kernel that runs in ``memory``.

        :param cr3: a virtual CPU's CR3, also that of a user process
        :param lstar: its MSR LSTAR
        :param la57: whether bit 12 of its CR4 is set (five-level paging)
        :raise UnsupportedGuest: no Linux kernel with a readable symbol table, in one sentence
        """
        for image in images(memory, cr3, lstar, la57=la57):
            for hit in islice(image.find(_DIGITS), _MOST_HITS):
                try:
                    return cls._read_at(image, hit)
                except (_MismatchError, GuestMemoryError):
                    continue
        raise UnsupportedGuest(
            f"no symbol table was found in the guest kernel's image around {lstar:#x}; a Linux "
            "kernel built with CONFIG_KALLSYMS_ALL is expected, since it tells where the kernel "
            "keeps its clock and its Xen pages"
        )

    @classmethod
    def _read_at(cls, image: KernelImage, digits: int) -> Symbols:
        tokens = _read_tokens(image, digits)
        names = _read_names(image, tokens)
        addresses, order_at = _read_addresses(image, tokens, names)
        order = _read_order(image, names, names.order if names.order else order_at)
        symbols = cls(image, tokens, names, addresses, order)
        symbols._check()
        return symbols

    def __len__(self) -> int:
        return self._names.count

    def __iter__(self) -> Iterator[tuple[str, str, int]]:
        """(type letter, name, address) of every symbol, in the table's order: all of ~100,000."""
        data, tokens = self._names.data, self._tokens
        at = 0
        for index in range(self._names.count):
            length = data[at]
            at += 1
            if length & 0x80:
                length = (length & 0x7F) | data[at] << 7
                at += 1
            text = b"".join([tokens[token] for token in data[at : at + length]])
            at += length
            whole = text.decode("ascii", "replace")
            yield whole[:1], whole[1:], self._addresses[index]

    def all(self, name: str) -> list[int]:
        """Addresses of every symbol of that name (static ones may share it), ascending."""
        if name not in self._by_name and not self._complete:
            if self._order is None:
                for _, other, address in self:
                    self._by_name.setdefault(other, []).append(address)
                for several in self._by_name.values():
                    several.sort()
                self._complete = True
            else:
                self._by_name[name] = self._bisect(name.encode("ascii"), self._order)
        return self._by_name.get(name, [])

    def get(self, name: str) -> int | None:
        """Address of ``name``; None if there is none, or more than one of that name."""
        found = self.all(name)
        return found[0] if len(found) == 1 else None

    def __getitem__(self, name: str) -> int:
        """Address of ``name``.

        :raise UnsupportedGuest: there is none, or more than one of that name
        """
        found = self.all(name)
        if len(found) != 1:
            count = "no" if not found else f"{len(found)} different"
            raise UnsupportedGuest(f"the guest's kernel has {count} symbol '{name}'; expected one")
        return found[0]

    def after(self, address: int) -> int:
        """The lowest address of a symbol above ``address``; that itself if there is none.

        For a function's address this is where it ends, padding included.
        """
        index = bisect_right(self._addresses, address)
        return self._addresses[index] if index < len(self._addresses) else address

    def _bisect(self, name: bytes, order: bytes) -> list[int]:
        low, high = 0, self._names.count
        while low < high:
            middle = (low + high) // 2
            if self._text(self._ranked(order, middle))[1:] < name:
                low = middle + 1
            else:
                high = middle
        found = []
        while low < self._names.count:
            index = self._ranked(order, low)
            if self._text(index)[1:] != name:
                break
            found.append(self._addresses[index])
            low += 1
        return sorted(found)

    @staticmethod
    def _ranked(order: bytes, rank: int) -> int:
        return int.from_bytes(order[3 * rank : 3 * rank + 3], "big")

    def _text(self, index: int) -> bytes:
        """Type letter and name of symbol ``index``."""
        data = self._names.data
        at = self._names.markers[index >> 8]
        for _ in range(index & 255):
            length = data[at]
            at += 1
            if length & 0x80:
                length = (length & 0x7F) | data[at] << 7
                at += 1
            at += length
        length = data[at]
        at += 1
        if length & 0x80:
            length = (length & 0x7F) | data[at] << 7
            at += 1
        return b"".join([self._tokens[token] for token in data[at : at + length]])

    def _check(self) -> None:
        """Whether names look like names, and the one known symbol is where it is known to be."""
        for index in range(0, self._names.count, max(1, self._names.count // 64)):
            if not _SANE_NAME.fullmatch(self._text(index)):
                raise _MismatchError
        if self.image.lstar not in self.all(ENTRY):
            raise _MismatchError


def _read_tokens(image: KernelImage, digits: int) -> _Tokens:
    """The token table around the strings "0" to "9" at ``digits``."""
    tail = image.read(digits, min(image.rest(digits), _LONGEST_TABLE))
    at = 0
    for _ in range(ord("0"), 256):
        at = tail.find(0, at) + 1
        if not at:
            raise _MismatchError
    index_at = _align(digits + at)
    index = struct.unpack("<256H", image.read(index_at, 512))
    table = digits - index[ord("0")]
    if index[0] or table & 7 or any(low >= high for low, high in pairwise(index)):
        raise _MismatchError
    data = image.read(table, digits + at - table)
    text = data[:-1].split(b"\0")
    if len(text) != 256 or any(data[start - 1] for start in index[1:]):
        raise _MismatchError
    return _Tokens(table, index_at + 512, text)


def _read_names(image: KernelImage, tokens: _Tokens) -> _Names:
    """The names and their markers, which stand before the token table."""
    tries = iter(range(_MOST_TRIES))
    for end, order, count in _marker_ends(image, tokens.table):
        markers = _read_markers(image, end)
        if len(markers) < 2 or (count and (count + 255) >> 8 != len(markers)):
            continue
        begin = end - _align(4 * len(markers))
        for at, head, data in _name_starts(image, begin, markers, count):
            if next(tries, None) is None:
                raise _MismatchError
            if _spans(data, markers, head):
                return _Names(at, head, data, markers, order)
    raise _MismatchError


def _marker_ends(image: KernelImage, table: int) -> Iterator[tuple[int, int | None, int]]:
    """Where the markers may end: (end, address of seqs_of_names or None, number of symbols or 0).

    Either at the token table, or before a seqs_of_names that ends there.  That array's numbers
    are below 2^20, so that every third byte of it, and hardly one in 16 before it, is below 16.
    """
    yield table, None, 0
    block = image.before(table, 3 * _MOST_SYMBOLS)
    for pad in range(8):
        high_bytes = block[len(block) - pad - 3 :: -3] if len(block) >= pad + 3 else b""
        stop = _HIGH_BYTE.search(high_bytes)
        longest = stop.start() if stop else len(high_bytes)
        for count in range(longest, max(256, longest - 64), -1):
            start = table - pad - 3 * count
            if not start & 7:
                yield start, start, count


def _read_markers(image: KernelImage, end: int) -> array[int]:
    """The row of ascending numbers from 0 on that ends at ``end``, padded to 8 bytes."""
    block = image.before(end, 4 * (_MOST_SYMBOLS // 256 + 1))
    words = array("I")
    words.frombytes(block[len(block) & 3 :])
    last = len(words) - 1
    if last > 0 and not words[last]:
        last -= 1
    first = last
    while first > 0 and words[first]:
        if not 512 <= words[first] - words[first - 1] <= 256 * _LONGEST_NAME:
            break
        first -= 1
    if last < 1 or words[first]:
        return array("I")
    return words[first : last + 1]


def _name_starts(
    image: KernelImage, end: int, markers: array[int], count: int
) -> Iterator[tuple[int, int, bytes]]:
    """Where names that end at ``end`` (padded to 8 bytes) may begin: (address, number, bytes).

    It is told by num_syms, which stands 8 bytes before with 4 bytes of padding.
    """
    shortest = _align(markers[-1] + 2)
    block = image.before(end, shortest + 256 * 512 + 8)
    for begin in range(len(block) - shortest, 7, -8):
        (head,) = _U64.unpack_from(block, begin - 8)
        if (head + 255) >> 8 == len(markers) and count in (0, head):
            yield end - len(block) + begin, head, block[begin:]


def _spans(data: bytes, markers: array[int], count: int) -> bool:
    """Whether ``count`` names fill ``data`` but for its padding, and every marker is right."""
    at = 0
    size = len(data)
    for index in range(count):
        if at + 1 >= size:
            return False
        if not index & 255 and markers[index >> 8] != at:
            return False
        length = data[at]
        if length & 0x80:
            at += 1
            length = (length & 0x7F) | data[at] << 7
        if not length:
            return False
        at += 1 + length
    return _align(at) == size


def _read_addresses(image: KernelImage, tokens: _Tokens, names: _Names) -> tuple[_Addresses, int]:
    """The addresses, and where seqs_of_names begins if it follows them."""
    size = 4 * names.count
    after = tokens.end, tokens.end + _align(size)
    before = names.at - 16 - _align(size), names.at - 16
    for offsets_at, base_at in (after, before):
        if image.rest(offsets_at) < base_at + 8 - offsets_at:
            continue
        (base,) = _U64.unpack(image.read(base_at, 8))
        if not KERNEL_MAP <= base <= image.lstar:
            continue
        raw = image.read(offsets_at, size)
        distance = image.lstar - base
        for absolute_percpu, offset in ((True, -1 - distance), (False, distance)):
            if _holds(raw, _I32.pack(offset)):
                offsets = array("i")
                offsets.frombytes(raw)
                return _Addresses(offsets, base, absolute_percpu), base_at + 8
    raise _MismatchError


def _holds(raw: bytes, word: bytes) -> bool:
    at = raw.find(word)
    while at >= 0 and at & 3:
        at = raw.find(word, at + 1)
    return at >= 0


def _read_order(image: KernelImage, names: _Names, at: int) -> bytes | None:
    """seqs_of_names at ``at`` if that is what stands there, else None."""
    if image.rest(at) < 3 * names.count:
        return None
    order = image.read(at, 3 * names.count)
    seen = bytearray(names.count)
    for high, middle, low in zip(order[::3], order[1::3], order[2::3], strict=True):
        index = high << 16 | middle << 8 | low
        if index >= names.count:
            return None
        seen[index] = 1
    return order if 0 not in seen else None
