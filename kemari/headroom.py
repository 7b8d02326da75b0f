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
_LINES: Final = {"MemTotal", "MemAvailable"}
_LINE: Final = re.compile(rf"^({'|'.join(_LINES)}): +(\d+) kB$", re.MULTILINE)


class Headroom:
    """How much more a reference may take; asked by an encoder as its reference grows.

    :param guest: whose reference it is, for the log
    :param meminfo: the kernel's account (proc(5))
    :ivar short: there was not enough once
    """

    def __init__(self, guest: str, meminfo: Path = MEMINFO) -> None:
        self._guest = guest
        self._meminfo = meminfo
        self.short = False

    def pages(self) -> int:
        """Pages that may still be taken; negative if some should be given back.

        Without the kernel's account nothing more is taken: a checkpoint does not fail for it.
        """
        try:
            text = self._meminfo.read_text()
        except OSError as error:
            return self._none(f"{self._meminfo} cannot be read: {error.strerror}")
        found = {name: int(kib) << 10 for name, kib in _LINE.findall(text)}
        if len(found) < len(_LINES):
            return self._none(f"{self._meminfo} lacks {' or '.join(_LINES - found.keys())}")
        reserve = max(RESERVE, found["MemTotal"] // RESERVE_SHARE)
        spare = (found["MemAvailable"] - reserve) // PAGE_SIZE
        if spare <= 0:
            self._none(f"{found['MemAvailable'] >> 20} MiB are left to Dom0")
        return spare

    def _none(self, why: str) -> int:
        if not self.short:
            log.warning(
                "%s: the copy of what the standby has grows no further: %s", self._guest, why
            )
        self.short = True
        return 0
