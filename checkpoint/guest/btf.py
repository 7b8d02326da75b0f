# SPDX-License-Identifier: Apache-2.0
"""Structure layouts from the type information that a kernel carries (BTF).

Format: Documentation/bpf/btf.rst and include/uapi/linux/btf.h.  A kernel has some 130,000 types;
one pass notes where each begins, and only the structures asked for are ever looked at.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator

from checkpoint.errors import UnsupportedGuest
from checkpoint.guest.kallsyms import Symbols

_MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_WORDS3 = struct.Struct("<III")
_LARGEST = 64 << 20
_DEEPEST = 32

_PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _TYPEDEF, _ENUM64 = 2, 3, 4, 5, 6, 8, 19
_INT, _FLOAT = 1, 16
_ALIASES = (_TYPEDEF, 9, 10, 11, 18)  # typedef, volatile, const, restrict, type tag
_SIZED = (_INT, _STRUCT, _UNION, _ENUM, _FLOAT, _ENUM64)

_FIXED = dict.fromkeys(range(1, 20), 0) | {_INT: 4, _ARRAY: 12, 14: 4, 17: 4}
"""Bytes that follow a type's header, whatever its number of elements."""
_EACH = dict.fromkeys(range(1, 20), 0) | {
    _STRUCT: 12, _UNION: 12, _ENUM: 8, 13: 8, 15: 12, _ENUM64: 12,
}  # fmt: skip
"""Bytes that follow for each element (member, enumerator, parameter, variable)."""


class Btf:
    """The types of one kernel.

    :param data: the ``.BTF`` section, from the guest: taken as hostile
    :raise UnsupportedGuest: it is not BTF as this reader knows it
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        if len(data) < _HEADER.size:
            raise _broken("is cut short")
        magic, version, _, header, *sections = _HEADER.unpack_from(data)
        type_at, type_size, text_at, text_size = sections
        if magic != _MAGIC or version != 1:
            raise _broken(f"begins with {magic:#x}, version {version}; expected {_MAGIC:#x}, 1")
        self._types = header + type_at
        self._types_end = self._types + type_size
        text = header + text_at
        if max(self._types_end, text + text_size) > len(data):
            raise _broken("is cut short")
        self._text = data[text : text + text_size]
        self._at = array("I", [0])
        self._named: dict[tuple[int, bool], int] = {}
        self._scan()

    @classmethod
    def read(cls, symbols: Symbols) -> Btf:
        """The types of the kernel that ``symbols`` belong to.

        :raise UnsupportedGuest: the kernel carries none, or they cannot be read
        """
        start, stop = symbols.get("__start_BTF"), symbols.get("__stop_BTF")
        if start is None or stop is None or not 0 < stop - start <= _LARGEST:
            raise UnsupportedGuest(
                "the guest's kernel carries no type information (CONFIG_DEBUG_INFO_BTF), which "
                "is expected because the layout of its timekeeping is read from it"
            )
        return cls(symbols.image.read(start, stop - start))

    def offset(self, name: str, *path: str | int) -> int:
        """Byte offset, from the start of struct ``name``, of the member that ``path`` leads to.

        ``path`` holds member names, and numbers for elements of arrays; members of anonymous
        structures and unions are found as in C.

        :raise UnsupportedGuest: there is no such struct or member
        """
        kind = self._find(name)
        total = 0
        for step in path:
            add, kind = self._element(kind, step) if isinstance(step, int) else self._member(
                name, kind, step, _DEEPEST
            )
            total += add
        return total

    def size(self, name: str) -> int:
        """Size in bytes of the struct or typedef ``name``.

        :raise UnsupportedGuest: there is no such type
        """
        return self._size(self._find(name))

    def has(self, name: str) -> bool:
        """Whether there is a struct, union or typedef ``name``."""
        return self._lookup(name) is not None

    def _scan(self) -> None:
        """Note where every type begins, and the number of each named struct and typedef."""
        data, at, end = self._data, self._types, self._types_end
        unpack, note, named = _TYPE.unpack_from, self._at.append, self._named
        number = 1
        while at + 12 <= end:
            text, info, _ = unpack(data, at)
            kind = (info >> 24) & 31
            if kind not in _FIXED:
                raise _broken(f"has a type of kind {kind}, which is not known")
            note(at)
            if text and kind in (_STRUCT, _UNION, _TYPEDEF):
                named.setdefault((text, kind == _TYPEDEF), number)
            at += 12 + _FIXED[kind] + _EACH[kind] * (info & 0xFFFF)
            number += 1
        if at != end:
            raise _broken("does not end with a whole type")

    def _lookup(self, name: str) -> int | None:
        at = self._text.find(b"\0" + name.encode("ascii") + b"\0")
        if at < 0:
            return None
        return self._named.get((at + 1, False)) or self._named.get((at + 1, True))

    def _find(self, name: str) -> int:
        number = self._lookup(name)
        if number is None:
            raise UnsupportedGuest(f"the guest's kernel has no type '{name}'; expected one")
        return number

    def _head(self, number: int) -> tuple[int, int, int, int]:
        """(kind, info, size or type, address of what follows) of a type, aliases resolved."""
        for _ in range(_DEEPEST):
            if not 0 < number < len(self._at):
                break
            at = self._at[number]
            _, info, value = _TYPE.unpack_from(self._data, at)
            kind = (info >> 24) & 31
            if kind not in _ALIASES:
                return kind, info, value, at + 12
            number = value
        raise _broken(f"leads from type {number} to nothing")

    def _size(self, number: int) -> int:
        count = 1
        for _ in range(_DEEPEST):
            kind, _, value, at = self._head(number)
            if kind == _PTR:
                return 8 * count
            if kind in _SIZED:
                return value * count
            if kind != _ARRAY:
                break
            number, _, length = self._array(at)
            count *= length
        raise _broken(f"has no size for type {number}")

    def _array(self, at: int) -> tuple[int, int, int]:
        """(type of an element, type of an index, number of elements)."""
        element, index, length = _WORDS3.unpack_from(self._data, at)
        return element, index, length

    def _element(self, number: int, index: int) -> tuple[int, int]:
        kind, _, _, at = self._head(number)
        element, _, length = self._array(at) if kind == _ARRAY else (0, 0, 0)
        if not 0 <= index < length:
            raise UnsupportedGuest(
                f"the guest's kernel has an array of {length} elements where element {index} is "
                "expected"
            )
        return index * self._size(element), element

    def _members(self, info: int, at: int) -> Iterator[tuple[int, int, int]]:
        """(name, type, offset in bits) of each member."""
        mask = 0xFF_FFFF if info >> 31 else 0xFFFF_FFFF
        for index in range(info & 0xFFFF):
            text, kind, bits = _WORDS3.unpack_from(self._data, at + 12 * index)
            yield text, kind, bits & mask

    def _member(self, name: str, number: int, member: str, depth: int) -> tuple[int, int]:
        """(byte offset, type) of a member."""
        found = self._search(number, member.encode("ascii"), depth)
        if found is None:
            raise UnsupportedGuest(
                f"the guest's kernel has no member '{member}' in its type '{name}'; expected one"
            )
        return found

    def _search(self, number: int, member: bytes, depth: int) -> tuple[int, int] | None:
        kind, info, _, at = self._head(number)
        if kind not in (_STRUCT, _UNION) or not depth:
            return None
        for text, inner, bits in self._members(info, at):
            if not text:
                found = self._search(inner, member, depth - 1)
                if found is not None:
                    return bits // 8 + found[0], found[1]
            elif self._text.startswith(member + b"\0", text):
                return bits // 8, inner
        return None


def _broken(what: str) -> UnsupportedGuest:
    return UnsupportedGuest(f"the guest kernel's type information (BTF) {what}")
