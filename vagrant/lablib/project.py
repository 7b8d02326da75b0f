# SPDX-License-Identifier: Apache-2.0
"""The project under test, in the form in which an administrator installs it."""

from __future__ import annotations

import io
import stat
import tarfile
from pathlib import Path

from lablib.image import Layer, LayerFile
from lablib.recipe import Recipe


def tar_of(layer: Layer) -> bytes:
    """The layer's files as a tar archive; everything belongs to root."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path, entry in sorted(layer.items()):
            info = tarfile.TarInfo(path)
            info.mode = stat.S_IMODE(entry.mode)
            info.size = len(entry.data)
            tar.addfile(info, io.BytesIO(entry.data))
    return out.getvalue()


def project_layer(repository: Path, recipe: Recipe, state: Path) -> dict[str, LayerFile]:
    return {}
