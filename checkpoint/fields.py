# SPDX-License-Identifier: Apache-2.0
"""What a peer says in JSON, value by value: nothing of it is used before its type was checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from checkpoint.errors import ProtocolError

MAX_INTEGER: Final = (1 << 63) - 1


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Fields:
    """Typed access to an untrusted JSON object; every method raises :class:`ProtocolError`.

    :ivar where: what the object is, for messages
    """

    where: str
    untrusted_values: dict[str, Any]

    def _get(self, key: str, wanted: type, words: str) -> Any:
        value = self.untrusted_values.get(key)
        # bool is an int to Python and not to JSON
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ProtocolError(f"{self.where} has no {words} {key!r}")
        return value

    def text(self, key: str) -> str:
        """A string that every text file can hold: no lone surrogates."""
        value: str = self._get(key, str, "string")
        if not _encodable(value):
            raise ProtocolError(f"{self.where} has no valid string {key!r}")
        return value

    def integer(self, key: str, least: int = 0, most: int = MAX_INTEGER) -> int:
        """An integer of ``least`` to ``most``."""
        value: int = self._get(key, int, "integer")
        if not least <= value <= most:
            raise ProtocolError(f"{self.where} has {key!r} outside of {least} to {most}")
        return value

    def choice(self, key: str, values: tuple[str, ...]) -> str:
        """One of ``values``."""
        value = self.text(key)
        if value not in values:
            raise ProtocolError(f"{self.where} has {key!r} other than {', '.join(values)}")
        return value

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.untrusted_values.get(key)
        if not isinstance(value, bool):
            raise ProtocolError(f"{self.where} has no true or false {key!r}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        value: list[Any] = self._get(key, list, "list of strings")
        if not all(isinstance(item, str) and _encodable(item) for item in value):
            raise ProtocolError(f"{self.where} has no list of strings {key!r}")
        return tuple(value)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers."""
        value: list[Any] = self._get(key, list, "list of integers")
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            raise ProtocolError(f"{self.where} has no list of integers {key!r}")
        return tuple(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """An object, its values unchecked."""
        value: dict[str, Any] = self._get(key, dict, "object")
        return value

    def fields(self, key: str) -> Fields:
        """An object."""
        return Fields(f"{self.where}.{key}", self.mapping(key))
