# SPDX-License-Identifier: Apache-2.0
"""Tell systemd how the daemon fares (sd_notify(3)), without a library."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> bool:
    """Send ``state``, e.g. ``READY=1``, to the service manager.

    :return: whether there is one that wants to know
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return False
    if path.startswith("@"):
        path = "\0" + path[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(state.encode(), path)
        except OSError:
            return False  # a service manager that went away is no reason to stop serving
    return True


def watchdog_interval() -> float:
    """Seconds between two ``WATCHDOG=1``: half of what systemd allows; 0.0 if it wants none."""
    try:
        allowed = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
        for_us = int(os.environ.get("WATCHDOG_PID", str(os.getpid()))) == os.getpid()
    except ValueError:
        return 0.0
    return allowed / 2 if for_us else 0.0
