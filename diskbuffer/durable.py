# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole, or not at all, whatever loses power when."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path


def replace(
    path: Path,
    parts: Iterable[bytes | bytearray],
    reached: Callable[[str], None] = lambda step: None,
) -> None:
    """Replace a file by other contents; on return that is on stable storage.

    :param reached: is told "write", "synced", "renamed" and "written" as they are
    :raise OSError: it could not be; the old file is as it was
    """
    reached("write")
    new = path.with_name(path.name + ".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    reached("synced")
    new.replace(path)
    reached("renamed")
    sync_folder(path.parent)
    reached("written")


def remove(path: Path) -> None:
    """Remove a file, durably (idempotent)."""
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to stable storage."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
