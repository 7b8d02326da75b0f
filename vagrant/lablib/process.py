# SPDX-License-Identifier: Apache-2.0
"""Processes that outlive the command that started them: remembered in a file, ended by number."""

from __future__ import annotations

import json
import os
import select
import signal
from pathlib import Path

from vagrant.lablib.errors import LabError


def _start_time(pid: int) -> str | None:
    """When a process began, in clock ticks since boot; None if there is none or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # proc(5): field 3 is the state, field 22 the start time; the first two are cut off.
    return None if fields[0] in "ZX" else fields[19]


class Remembered:
    """A process noted in a file together with its start time.

    Numbers of processes are used again; the start time makes sure that no stranger is taken for
    ours.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def note(self, pid: int) -> None:
        """Remember this process.

        :raises LabError: it has ended already
        """
        began = _start_time(pid)
        if began is None:
            raise LabError(f"The process for {self._file.name} ended at once.")
        new = self._file.with_name(self._file.name + ".new")
        new.write_text(json.dumps({"pid": pid, "began": began}))
        new.replace(self._file)

    @property
    def pid(self) -> int | None:
        """Its number, or None if it does not run (any more)."""
        try:
            noted = json.loads(self._file.read_text())
        except FileNotFoundError:
            return None
        pid = int(noted["pid"])
        return pid if _start_time(pid) == noted["began"] else None

    def kill(self, timeout: float = 30) -> bool:
        """End it with SIGKILL and wait until it is gone.

        :returns: whether it ran
        :raises LabError: it is still there after ``timeout`` seconds
        """
        pid = self.pid
        if pid is None:
            return False
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            if self.pid != pid:
                return False
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            if not select.select([handle], [], [], timeout)[0]:
                raise LabError(f"Process {pid} is still there {timeout:.0f} s after SIGKILL.")
        finally:
            os.close(handle)
        self._file.unlink(missing_ok=True)
        return True
