# SPDX-License-Identifier: Apache-2.0
"""A network in plain memory, for tests only: the counterpart of :mod:`checkpoint.memory`.

A :class:`Switch` records every frame that anybody outside could have seen, and which host it came
from; that record is what the tests judge.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from checkpoint.driver import Nic


@dataclass(slots=True)
class Switch:
    """The world outside the hosts.

    :ivar seen: (host, frame) of all that left a host, in order
    :ivar announced: (host, MAC address) of all announcements
    :ivar arrived: set with each frame
    """

    seen: list[tuple[str, bytes]] = field(default_factory=list)
    announced: list[tuple[str, str]] = field(default_factory=list)
    arrived: threading.Event = field(default_factory=threading.Event)


class MemoryOutput:
    """See :class:`kemari.output.Output`."""

    def __init__(self, network: MemoryNetwork, nics: Sequence[Nic], limit: int) -> None:
        self._network = network
        self._devices = [nic.vif for nic in nics]
        self._limit = limit
        self._epochs: deque[list[bytes]] = deque()
        self._passing = True
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.RLock()

    def setup(self) -> None:
        """Begin to hold."""
        self._passing = False
        self._epochs = deque([[]])
        for device in self._devices:
            self._network.buffers[device] = self

    def transmit(self, frame: bytes) -> None:
        """A guest sends a frame."""
        with self._lock:
            if self._passing:
                self._network.leave(frame)
            else:
                self._epochs[-1].append(frame)
                os.eventfd_write(self._event, 1)

    def close_epoch(self) -> None:
        """End the current epoch."""
        with self._lock:
            if len(self._epochs) != 1:
                raise AssertionError("an epoch is closed already; only one may be")
            self._epochs.append([])

    def release_epoch(self) -> None:
        """Let the closed epoch leave."""
        with self._lock:
            if len(self._epochs) != 2:
                raise AssertionError("no epoch is closed")
            self._leave(self._epochs.popleft())

    def release_all(self) -> None:
        """Let everything leave."""
        with self._lock:
            self._passing = True
            while self._epochs:
                self._leave(self._epochs.popleft())

    def _leave(self, frames: list[bytes]) -> None:
        for frame in frames:
            self._network.leave(frame)

    def full(self) -> bool:
        """Whether more than the limit is held."""
        with self._lock:
            held = sum(len(frame) for epoch in self._epochs for frame in epoch)
        return held >= self._limit

    def fileno(self) -> int:
        """Readable once a frame was held."""
        return self._event

    def drain(self) -> int:
        """Forget the frames seen."""
        try:
            return os.eventfd_read(self._event)
        except BlockingIOError:
            return 0

    def teardown(self, *, drop: bool) -> None:
        """Remove the buffer."""
        with self._lock:
            if drop:
                self._epochs.clear()
            self.release_all()
            for device in self._devices:
                self._network.buffers.pop(device, None)
        if self._event >= 0:
            os.close(self._event)
            self._event = -1


class MemoryBacklog:
    """See :class:`kemari.output.Backlog`.

    :ivar frames: what tests have put there
    """

    def __init__(self, network: MemoryNetwork) -> None:
        self.frames: list[bytes] = []
        self._network = network

    def deliver(self) -> int:
        """Hand it over."""
        self.close()
        self._network.delivered += self.frames
        return len(self.frames)

    def close(self) -> None:
        """Forget it."""
        if self in self._network.backlogs:
            self._network.backlogs.remove(self)


class MemoryNetwork:
    """One host's network; see :class:`kemari.output.Network`.

    :ivar buffers: device -> its buffer; outlives the daemon, as the kernel's does
    :ivar backlogs: those that are open
    :ivar delivered: what guests got out of them
    :ivar powered: without power nothing leaves
    """

    def __init__(self, host: str, switch: Switch) -> None:
        self.host = host
        self.switch = switch
        self.buffers: dict[str, MemoryOutput] = {}
        self.backlogs: list[MemoryBacklog] = []
        self.delivered: list[bytes] = []
        self.powered = True
        self._lock = threading.Lock()

    def transmit(self, device: str, frame: bytes) -> None:
        """A guest here sends a frame."""
        buffer = self.buffers.get(device)
        if buffer is not None:
            buffer.transmit(frame)
        else:
            self.leave(frame)

    def leave(self, frame: bytes) -> None:
        """A frame leaves the host."""
        with self._lock:
            if self.powered:
                self.switch.seen.append((self.host, frame))
                self.switch.arrived.set()

    def output(self, nics: Sequence[Nic], limit: int) -> MemoryOutput:
        """The buffer for ``nics``."""
        return MemoryOutput(self, nics, limit)

    def leftovers(self) -> list[str]:
        """Devices whose output is held."""
        return list(self.buffers)

    def reclaim(self, device: str, *, release: bool) -> str:
        """Remove a buffer that was left."""
        buffer = self.buffers.get(device)
        if buffer is None:
            return ""
        buffer.teardown(drop=not release)
        return f"removed the output buffer of {device} that was left behind"

    def backlog(self, nics: Sequence[Nic]) -> MemoryBacklog:
        """Keep what tests put there."""
        self.backlogs.append(MemoryBacklog(self))
        return self.backlogs[-1]

    async def announce(self, nics: Sequence[Nic]) -> None:
        """Tell the switch."""
        if self.powered:
            self.switch.announced += [(self.host, nic.mac) for nic in nics]
