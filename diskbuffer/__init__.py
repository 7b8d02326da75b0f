# SPDX-License-Identifier: Apache-2.0
"""Disk output commit: a guest's disk, and a copy of it that is always of a known moment.

- :func:`plugin` is nbdkit's plug-in that serves the disk and writes its changes down;
- :class:`diskbuffer.disk.DiskBuffer` reads them, on the host where the guest runs;
- :class:`diskbuffer.replica.Replica` applies them, an epoch at a time, on the other one;
- :mod:`diskbuffer.errors` has all errors.

Knows nothing of Xen or of checkpoints: a disk is any file or block device that nbdkit serves.
The format of records and bitmaps, and what is promised when: ``docs/disk.md``.
"""

from __future__ import annotations

from pathlib import Path


def plugin() -> Path:
    """The plug-in, for nbdkit's command line.

    :raise FileNotFoundError: this package was installed without what it compiles
    """
    folder = Path(__file__).resolve().parent
    for path in sorted(folder.glob("_plugin*.so")):
        return path
    raise FileNotFoundError(f"{folder} has no compiled plug-in for nbdkit, expected _plugin*.so")
