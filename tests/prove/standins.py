# SPDX-License-Identifier: Apache-2.0
"""What stands in for time, locks, the control socket and the world outside in simulated hosts."""

from __future__ import annotations

import errno
import os
import threading
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from checkpoint.driver import Nic
from diskbuffer import durable
from kemari.memory import MemoryNetwork, MemoryOutput, Switch
from tests.prove.simulation import Simulation


class Clock(types.ModuleType):
    """Stands in for the module ``time``."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__("time")
        self.monotonic = lambda: simulation.now
        self.perf_counter = self.monotonic
        self.time = lambda: simulation.now + 1.7e9
        self.monotonic_ns = lambda: int(simulation.now * 1e9)
        self.perf_counter_ns = self.monotonic_ns
        self.CLOCK_BOOTTIME = 7
        self.clock_gettime_ns = lambda clock: int(simulation.now * 1e9)


class _NoLock:
    """Only one thread runs at a time, and one that stands still must not keep a lock."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class Threading(types.ModuleType):
    """Stands in for the module ``threading`` where it is used for locks only."""

    Lock = RLock = _NoLock
    Event = threading.Event


class Control:
    """Stands in for the control socket.  See :meth:`tests.prove.machine.Machine.ask`."""

    def __init__(self, path: Path, handler: Callable[..., Any]) -> None:
        self.handler = handler

    async def start(self) -> None:
        """There is no socket."""

    async def close(self) -> None:
        """There is no socket."""


class Durable(types.ModuleType):
    """Stands in for :mod:`diskbuffer.durable` where the ledger uses it.

    :param full: whether there is no room for a file
    """

    def __init__(self, full: Callable[[Path], bool]) -> None:
        super().__init__("durable")
        self._full = full
        self.remove = durable.remove  # needs no room

    def replace(
        self, path: Path, parts: Iterable[bytes | bytearray], reached: Callable[[str], None]
    ) -> None:
        """See :func:`diskbuffer.durable.replace`."""
        if self._full(path):
            reached("write")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        durable.replace(path, parts, reached)


class SeenSwitch(Switch):
    """Tells the world of each frame at once."""

    def __init__(self, seen: Callable[[str, bytes], None]) -> None:
        super().__init__()
        self._seen = seen

    def take(self, host: str, frame: bytes) -> None:
        """A frame has left a host."""
        self._seen(host, frame)


class HostNetwork(MemoryNetwork):
    """Keeps account of buffers, so that their descriptors can be closed."""

    def __init__(self, host: str, switch: SeenSwitch) -> None:
        super().__init__(host, switch)
        self.outputs: list[MemoryOutput] = []
        self._out = switch

    def leave(self, frame: bytes) -> None:
        if self.powered:
            self._out.take(self.host, frame)

    def close(self) -> None:
        """Close what killed daemons had open."""
        for output in self.outputs:
            if output._event >= 0:
                os.close(output._event)
                output._event = -1

    def output(self, nics: Sequence[Nic], limit: int) -> MemoryOutput:
        made = super().output(nics, limit)
        self.outputs.append(made)
        return made
