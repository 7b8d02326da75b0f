# SPDX-License-Identifier: Apache-2.0
"""The output of a guest as the daemon sees it: held, in epochs, let go.

:class:`Output` and :class:`Network` are the seam to :mod:`netbuffer`, so that tests can put memory
in its place.  :mod:`kemari.frames` has the real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from checkpoint.driver import Nic


class Output(Protocol):
    """All outbound frames of one guest.  Blocking, short; one caller at a time."""

    def setup(self) -> None:
        """Begin to hold; what is sent from now on is the first epoch's."""

    def close_epoch(self) -> None:
        """End the current epoch; what is sent from now on is the next one's."""

    def release_epoch(self) -> None:
        """Let the frames of the oldest closed epoch leave, in order."""

    def release_all(self) -> None:
        """Let everything leave, held and future."""

    def full(self) -> bool:
        """Whether so much is held that the guest must wait."""

    def fileno(self) -> int:
        """A descriptor that is readable once a frame was held (see :meth:`drain`)."""

    def drain(self) -> int:
        """Forget the frames that the descriptor told of; returns how many there were."""

    def teardown(self, *, drop: bool) -> None:
        """Remove the buffer (idempotent); what is held leaves, or is dropped."""


class Backlog(Protocol):
    """What passes this host on its way to a guest that no host runs."""

    def deliver(self) -> int:
        """Hand it to the guest, which runs here now, and close; how many frames."""

    def close(self) -> None:
        """Forget it (idempotent)."""


class Network(Protocol):
    """A host's way to hold output, and to tell the network where a guest is."""

    def output(self, nics: Sequence[Nic], limit: int) -> Output:
        """The buffer for the frames of ``nics``; not yet holding.

        :param limit: bytes of memory for held frames from which on it counts as full
        """

    def leftovers(self) -> list[str]:
        """Network devices for which a killed daemon still holds output."""

    def reclaim(self, device: str, *, release: bool) -> str:
        """Remove what a killed daemon left for ``device`` (idempotent).

        :param release: let the held frames leave; otherwise they are dropped
        :return: what was found, as a clause; "" if nothing
        """

    def backlog(self, nics: Sequence[Nic]) -> Backlog:
        """Keep, from now on, what is sent to ``nics``, which no host has as far as is known."""

    async def announce(self, nics: Sequence[Nic]) -> None:
        """Tell the network that the addresses of ``nics`` are here now."""
