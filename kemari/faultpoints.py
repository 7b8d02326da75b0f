# SPDX-License-Identifier: Apache-2.0
"""Faults of the daemon itself, on demand: for tests on real hosts only (``docs/proof.md``).

``KEMARI_FAULT`` in the daemon's environment names a point of :data:`checkpoint.faultpoints.POINTS`
and what happens there: ``POINT:kill``, ``POINT:stall:SECONDS`` or ``POINT:cut``, each with an
optional ``:N``, so that it happens the N-th time only.  It is ignored, and said so, unless the
administrator has made the file :data:`MARKER`.  A fault happens once: a daemon that was killed and
is started again with the same environment finds in its run-time folder that it is spent.

``KEMARI_AUDIT=SECONDS`` has checkpoints looked at that often; see :mod:`checkpoint.audit`.

``python -m kemari.faultpoints`` prints all points.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from checkpoint import audit, faultpoints
from kemari.errors import ConfigError

log = logging.getLogger(__name__)

VARIABLE: Final = "KEMARI_FAULT"
AUDIT: Final = "KEMARI_AUDIT"
#: Without this file no fault is ever armed.
MARKER: Final = Path("/etc/kemari/allow-fault-points")
#: Seconds that a stall may last.
MAX_STALL: Final = 3600.0
ACTIONS: Final = ("kill", "stall", "cut")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is to happen where.

    :ivar point: name of the point
    :ivar action: one of :data:`ACTIONS`
    :ivar seconds: of a stall
    :ivar nth: the time at which it happens, from 1
    """

    point: str
    action: str
    seconds: float = 0.0
    nth: int = 1


def parse(text: str) -> Fault:
    """Read the value of the variable.

    :raise ConfigError: it is not of the form that the module's text gives
    """
    point, _, rest = text.partition(":")
    action, *words = rest.split(":")
    if point not in faultpoints.POINTS:
        raise ConfigError(f"{VARIABLE}: {point!r} is not a fault point")
    if action not in ACTIONS:
        raise ConfigError(f"{VARIABLE}: {action!r} is not one of {', '.join(ACTIONS)}")
    try:
        seconds = float(words.pop(0)) if action == "stall" else 0.0
        nth = int(words.pop(0)) if words else 1
    except (IndexError, ValueError):
        raise ConfigError(f"{VARIABLE}: {text!r} lacks a number") from None
    if words or nth < 1 or not 0 <= seconds <= MAX_STALL:
        raise ConfigError(f"{VARIABLE}: {text!r} has a wrong number, or too many")
    return Fault(point, action, seconds, nth)


def allowed(marker: Path = MARKER) -> bool:
    """Whether the administrator allows faults: a regular file that only its owner can write."""
    try:
        found = marker.lstat()
    except OSError:
        return False
    mine = found.st_uid in (0, os.geteuid())
    return mine and stat.S_ISREG(found.st_mode) and not found.st_mode & 0o022


def arm_from_environment(run: Path, marker: Path = MARKER) -> Fault | None:
    """Arm what the environment names, if that is allowed; returns a fault that is not spent.

    :param run: the daemon's run-time folder
    :raise ConfigError: a value makes no sense
    """
    interval = _wanted(AUDIT, marker)
    if interval:
        audit.arm(_seconds(interval))
    text = _wanted(VARIABLE, marker)
    if not text:
        return None
    fault = parse(text)
    spent = run / "fault-spent"
    if spent.exists() and spent.read_text() == text:
        return None
    run.mkdir(parents=True, exist_ok=True)
    log.warning("a fault is armed: %s", text)
    faultpoints.arm(Trigger(fault, lambda: _spend(spent, text)))
    return fault


def _wanted(variable: str, marker: Path) -> str:
    text = os.environ.get(variable, "")
    if text and not allowed(marker):
        log.warning("%s is set but ignored: %s does not allow it", variable, marker)
        return ""
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_STALL:
        raise ConfigError(f"{AUDIT}: {text!r} is not a number of seconds up to {MAX_STALL:g}")
    return seconds


def _spend(path: Path, text: str) -> None:
    faultpoints.arm(None)
    path.write_text(text)


class Trigger:
    """The hook that makes one fault happen, once.

    :param spend: called just before it happens
    """

    def __init__(self, fault: Fault, spend: Callable[[], None]) -> None:
        self._fault = fault
        self._left = fault.nth
        self._spend = spend
        self._lock = threading.Lock()

    def __call__(self, point: str) -> None:
        fault = self._fault
        if point != fault.point:
            return
        with self._lock:
            self._left -= 1
            if self._left != 0:
                return
        self._spend()
        log.warning("fault point %s: %s", point, fault.action)
        if fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "stall":
            # The thread stands still, as if the scheduler had forgotten it; nothing can be awaited.
            threading.Event().wait(fault.seconds)
        else:
            cut_connections()


def cut_connections() -> int:
    """Have the kernel end every TCP connection of this process; how many there were."""
    count = 0
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        try:
            copy = os.dup(int(descriptor.name))
        except OSError:
            continue  # the folder's own descriptor
        if not stat.S_ISSOCK(os.fstat(copy).st_mode):
            os.close(copy)
            continue
        with socket.socket(fileno=copy) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                continue
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it has ended already
            count += 1
    return count


def main() -> None:
    """Print every point and what it is."""
    for name, text in faultpoints.POINTS.items():
        print(f"{name:<20} {text}")


if __name__ == "__main__":
    main()
