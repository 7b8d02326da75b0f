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

_FIXED = {_INT: 1, _ARRAY: 3, 14: 1, 17: 1}
"""Words of 4 bytes that follow a type's header, whatever its number of elements."""
_EACH = {_STRUCT: 3, _UNION: 3, _ENUM: 2, 13: 2, 15: 3, _ENUM64: 3}
"""Words that follow for each element (member, enumerator, parameter, variable)."""
_KINDS = range(1, 20)


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
        if type_size & 3:
            raise _broken(f"has {type_size} bytes of types; expected a multiple of 4")
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
            if isinstance(step, int):
                add, kind = self._element(kind, step)
            else:
                add, kind = self._member(name, kind, step)
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
        words = memoryview(self._data)[self._types : self._types_end].cast("I")
        fixed = [3 + _FIXED.get(kind, 0) if kind in _KINDS else 0 for kind in range(32)]
        each = [_EACH.get(kind, 0) for kind in range(32)]
        note, named = self._at.append, self._named
        at, end = 0, len(words) - 2
        while at < end:
            info = words[at + 1]
            kind = (info >> 24) & 31
            if kind in (_STRUCT, _UNION, _TYPEDEF) and words[at]:
                named.setdefault((words[at], kind == _TYPEDEF), len(self._at))
            if not fixed[kind]:
                raise _broken(f"has a type of kind {kind}, which is not known")
            note(at)
            at += fixed[kind] + each[kind] * (info & 0xFFFF)
        if at != len(words):
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
            at = self._types + 4 * self._at[number]
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

    def _member(self, name: str, number: int, member: str) -> tuple[int, int]:
        """(byte offset, type) of a member."""
        found = self._search(number, member.encode("ascii"), set())
        if found is None:
            raise UnsupportedGuest(
                f"the guest's kernel has no member '{member}' in its type '{name}'; expected one"
            )
        return found

    def _search(self, number: int, member: bytes, seen: set[int]) -> tuple[int, int] | None:
        """As :meth:`_member`; no type is searched twice, so that hostile ones are no maze."""
        kind, info, _, at = self._head(number)
        if kind not in (_STRUCT, _UNION) or at in seen or len(seen) == _DEEPEST:
            return None
        seen.add(at)
        for text, inner, bits in self._members(info, at):
            if not text:
                found = self._search(inner, member, seen)
                if found is not None:
                    return bits // 8 + found[0], found[1]
            elif self._text.startswith(member + b"\0", text):
                return bits // 8, inner
        return None


def _broken(what: str) -> UnsupportedGuest:
    return UnsupportedGuest(f"the guest kernel's type information (BTF) {what}")
