# SPDX-License-Identifier: Apache-2.0
"""How a protection comes about, for all who wait: whoever asked, and who found it under way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kemari.copying import Progress
from kemari.host import first_of


class Coming:
    """The beginning of one protection.

    :ivar progress: how far the first copy is
    :ivar protected: set by the first acknowledged checkpoint
    :ivar ended: set once the protection is over, whatever the end was
    :ivar failure: what kept it from coming about
    """

    def __init__(self) -> None:
        self.progress = Progress()
        self.protected = asyncio.Event()
        self.ended = asyncio.Event()
        self.failure: BaseException | None = None
        self._listeners: list[Callable[[Progress], None]] = []

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for it."""
        return bool(self._listeners)

    def report(self) -> None:
        """Tell all who wait how far it is."""
        for listener in tuple(self._listeners):
            listener(self.progress)

    async def wait(self, report: Callable[[Progress], None] | None = None) -> bool:
        """Wait for the first checkpoint's ack, or the end; whether it is protected.

        :param report: called as the first copy goes on
        :raise CheckpointError, KemariError: what kept it from coming about
        """
        listener = report or (lambda progress: None)
        self._listeners.append(listener)
        try:
            await first_of(self.protected.wait(), self.ended.wait())
        finally:
            self._listeners.remove(listener)
        if not self.protected.is_set() and self.failure is not None:
            raise self.failure
        return self.protected.is_set()
