# SPDX-License-Identifier: Apache-2.0
"""Memory that Dom0 can spare: references of guests stop growing before the kernel has to kill."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Final

from checkpoint.driver import PAGE_SIZE

log = logging.getLogger(__name__)

MEMINFO: Final = Path("/proc/meminfo")
#: Bytes that are left to Dom0 at least, and the share of its memory.
RESERVE: Final = 64 << 20
RESERVE_SHARE: Final = 16
_LINE: Final = re.compile(r"^(MemTotal|MemAvailable): +(\d+) kB$", re.MULTILINE)


class Headroom:
    """How much more a reference may take; asked by an encoder as its reference grows.

    :param meminfo: the kernel's account (proc(5))
    :ivar short: there was not enough once
    """

    def __init__(self, meminfo: Path = MEMINFO) -> None:
        self._meminfo = meminfo
        self.short = False

    def pages(self) -> int:
        """Pages that may still be taken; negative if some should be given back.

        Without the kernel's account nothing more is taken: a checkpoint does not fail for it.
        """
        try:
            text = self._meminfo.read_text()
        except OSError as error:
            log.warning("how much memory Dom0 has left cannot be read: %s", error)
            self.short = True
            return 0
        found = {name: int(kib) << 10 for name, kib in _LINE.findall(text)}
        reserve = max(RESERVE, found["MemTotal"] // RESERVE_SHARE)
        spare = (found["MemAvailable"] - reserve) // PAGE_SIZE
        self.short |= spare <= 0
        return spare
