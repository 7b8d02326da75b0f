# SPDX-License-Identifier: Apache-2.0
"""Targets of disks on this host, and the servers that block-kemari has started for them."""

from __future__ import annotations

import os
from pathlib import Path

from kemari.errors import Refused


def servers(run: Path, target: Path) -> list[Path]:
    """Folders of servers of a target, as block-kemari makes them; some may be of dead ones."""
    wanted = str(target.resolve())
    found = []
    for folder in sorted((run / "disks").glob("*")):
        try:
            served = (folder / "state" / "target").read_text().strip()
        except OSError:
            continue  # being made or removed
        if served == wanted:
            found.append(folder)
    return found


def target_size(target: Path) -> int:
    """Bytes of a file or block device.

    :raise Refused: it cannot be opened
    """
    try:
        descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(f"The disk {target} cannot be read: {error.strerror}") from None
    try:
        return os.lseek(descriptor, 0, os.SEEK_END) // 512 * 512
    finally:
        os.close(descriptor)
