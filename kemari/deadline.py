# SPDX-License-Identifier: Apache-2.0
"""A timer for what is put off again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """A timer that is set and cleared far more often than it comes due.

    The event loop is asked for a wake-up only when none is under way that comes early enough:
    setting and clearing cost next to nothing.
    """

    def __init__(self, due: Callable[[], None]) -> None:
        self._due = due
        self._at: float | None = None
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None

    def set(self, delay: float) -> None:
        """Come due after ``delay`` seconds, instead of when set before."""
        self._at = self._loop.time() + delay
        if self._handle is not None and self._handle.when() > self._at:
            self._handle.cancel()
            self._handle = None
        if self._handle is None:
            self._handle = self._loop.call_at(self._at, self._wake)

    def clear(self) -> None:
        """Do not come due."""
        self._at = None

    def close(self) -> None:
        """Do not come due, and leave nothing behind in the event loop."""
        self._at = None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _wake(self) -> None:
        self._handle = None
        if self._at is None:
            return
        if self._loop.time() < self._at:
            self._handle = self._loop.call_at(self._at, self._wake)
        else:
            self._at = None
            self._due()
