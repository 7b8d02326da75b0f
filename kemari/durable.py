# SPDX-License-Identifier: Apache-2.0
"""Files that a power cut leaves either as they were or as they were to be."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from diskbuffer.durable import sync_folder


def write(path: Path, text: str, step: Callable[[str], None] | None = None) -> None:
    """Replace a file: a new one is written and synced, renamed, and the folder synced.

    :param step: is told "write", "synced", "renamed" and "written" as they are reached
    :raise OSError: it could not be; the old file stands
    """
    tell = step or _nobody
    tell("write")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    tell("synced")
    fresh.replace(path)
    tell("renamed")
    sync_folder(path.parent)
    tell("written")


def _nobody(_step: str) -> None:
    pass
