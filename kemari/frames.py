# SPDX-License-Identifier: Apache-2.0
"""The real network of a host: :mod:`netbuffer` behind the seam of :mod:`kemari.output`."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Sequence

from checkpoint.driver import Nic
from netbuffer import plug
from netbuffer.announce import announce
from netbuffer.backlog import Backlog
from netbuffer.errors import NetbufferError
from netbuffer.plug import OutputBuffer
from netbuffer.tap import Tap


class FrameOutput:
    """The held frames of all network interfaces of one guest; see :class:`kemari.output.Output`.

    Epochs are closed while the guest is paused, so those of several interfaces are one.
    """

    def __init__(self, nics: Sequence[Nic], limit: int) -> None:
        share = max(1 << 16, limit // max(1, len(nics)))
        # The kernel drops beyond limit_bytes: what comes between the check and the stall must fit.
        self._buffers = [
            OutputBuffer(nic.vif, limit_bytes=4 * share, high_water=share) for nic in nics
        ]
        self._taps: list[Tap] = []
        self._epoll = select.epoll()

    def setup(self) -> None:
        """Begin to hold.

        :raise NetbufferError: it cannot be; everything is as it was
        """
        try:
            for buffer in self._buffers:
                # The tap first: it makes the kernel give a held frame's pages back to the guest.
                tap = Tap(buffer.vif)
                self._taps.append(tap)
                self._epoll.register(tap.fileno(), select.EPOLLIN)
                buffer.setup()
        except BaseException:
            self.teardown(drop=False)
            raise

    def close_epoch(self) -> None:
        """End the epoch on every interface."""
        for buffer in self._buffers:
            buffer.close_epoch()

    def release_epoch(self) -> None:
        """Let the closed epoch leave on every interface."""
        for buffer in self._buffers:
            buffer.release_epoch()

    def release_all(self) -> None:
        """Let everything leave on every interface; a failure on one does not keep the others."""
        self._each("release_all")

    def full(self) -> bool:
        """Whether one of the interfaces holds as much as it may."""
        return any(buffer.above_high_water(buffer.stats()) for buffer in self._buffers)

    def fileno(self) -> int:
        """Readable once a frame was held."""
        return self._epoll.fileno()

    def drain(self) -> int:
        """Forget the frames seen."""
        return sum(tap.drain() for tap in self._taps)

    def teardown(self, *, drop: bool) -> None:
        """Remove the buffers, then the taps."""
        try:
            self._each("teardown", release=not drop)
        finally:
            for tap in self._taps:
                tap.close()
            self._taps.clear()
            self._epoll.close()

    def _each(self, call: str, **arguments: bool) -> None:
        errors: list[NetbufferError] = []
        for buffer in self._buffers:
            try:
                getattr(buffer, call)(**arguments)
            except NetbufferError as error:
                errors.append(error)
        if errors:
            raise errors[0]


class FrameBacklog:
    """What is sent to the network interfaces of one guest; see :class:`kemari.output.Backlog`.

    :raise NetbufferError: it cannot be kept
    """

    def __init__(self, nics: Sequence[Nic]) -> None:
        self._kept: list[tuple[str, Backlog]] = []
        try:
            for nic in nics:
                if nic.bridge:
                    self._kept.append((nic.vif, Backlog(nic.bridge, nic.mac)))
        except BaseException:
            self.close()
            raise

    def deliver(self) -> int:
        """Hand it to the guest; a failure on one interface does not keep the others'."""
        errors: list[NetbufferError] = []
        count = 0
        for vif, backlog in self._kept:
            try:
                count += backlog.deliver(vif)
            except NetbufferError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return count

    def close(self) -> None:
        """Forget it."""
        for _, backlog in self._kept:
            backlog.close()


class FrameNetwork:
    """This host's network; see :class:`kemari.output.Network`."""

    def output(self, nics: Sequence[Nic], limit: int) -> FrameOutput:
        """The buffer for the frames of ``nics``."""
        return FrameOutput(nics, limit)

    def leftovers(self) -> list[str]:
        """Devices for which a killed daemon still holds frames."""
        return [remains.vif for remains in plug.leftovers()]

    def reclaim(self, device: str, *, release: bool) -> str:
        """Remove what a killed daemon left for ``device``."""
        removal = plug.reclaim(device, release=release)
        if not removal.found:
            return ""
        return (
            f"removed the output buffer of {device} that was left behind: "
            f"{removal.released_packets} frames released, {removal.dropped_packets} dropped"
        )

    def backlog(self, nics: Sequence[Nic]) -> FrameBacklog:
        """Keep what is sent to ``nics``, by the bridge of each."""
        return FrameBacklog(nics)

    async def announce(self, nics: Sequence[Nic]) -> None:
        """Send announcements by the bridge of each interface; returns when the last is sent."""
        await asyncio.gather(
            *(announce(nic.bridge, nic.mac, port=nic.vif) for nic in nics if nic.bridge)
        )
