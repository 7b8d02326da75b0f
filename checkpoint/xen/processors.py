# SPDX-License-Identifier: Apache-2.0
"""Whether Dom0 gets the processors that it wants, or guests have them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

#: Seconds between two looks: the file has hundredths of a second, and is not cheap to make.
_PACE: Final = 1.0
_STAT: Final = Path("/proc/stat")


class Processors:
    """Reads, now and then, what the kernel keeps of its time.

    The first line of ``/proc/stat`` (proc(5)) has, since boot and over all vCPUs of Dom0: user,
    nice, system, idle, iowait, irq, softirq, steal.  Steal is time for which a vCPU could have run
    and Xen ran another one, as Xen says in the runstate area.
    """

    def __init__(self, stat: Path = _STAT, clock: Callable[[], float] = time.monotonic) -> None:
        self._stat = stat
        self._clock = clock
        self._looked = clock()
        self._last = self._read()
        self._share = 0.0

    def stolen(self) -> float:
        """Of the time for which Dom0 wanted a processor lately, the share that it had to wait."""
        now = self._clock()
        if now - self._looked >= _PACE:
            self._looked = now
            read = self._read()
            wanted, stolen = (new - old for new, old in zip(read, self._last, strict=True))
            self._last = read
            self._share = stolen / wanted if wanted > 0 else 0.0
        return self._share

    def _read(self) -> tuple[int, int]:
        # time wanted, which is all but the idle time; the part of it that was stolen
        with self._stat.open() as file:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(
                int, file.readline().split()[1:9]
            )
        return user + nice + system + irq + softirq + steal, steal
