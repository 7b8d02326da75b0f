# SPDX-License-Identifier: Apache-2.0
"""The project under test, built to a wheel once for each state of the repository."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vagrant.lablib.command import run, step
from vagrant.lablib.errors import LabError
from vagrant.lablib.image import LayerFile
from vagrant.lablib.recipe import Recipe
from vagrant.lablib.wheel import lay_out

# What the wheel is made of.  It is built from a copy, so that neither what an earlier build left
# in the repository gets into it nor anything is left there.
SOURCES = (
    "pyproject.toml",
    "setup.cfg",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "kemari",
    "checkpoint",
    "netbuffer",
    "diskbuffer",
    "dom0-tools",
)
# Looked for, not imported: Debian's setuptools cannot be imported after pip.
HAS_ALL = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"
GENERATED = (".pyc", ".so")


def _sources(repository: Path) -> Iterator[Path]:
    for name in SOURCES:
        place = repository / name
        found = sorted(place.rglob("*")) if place.is_dir() else [place]
        for path in found:
            if path.is_file() and path.suffix not in GENERATED:
                yield path


def source_digest(repository: Path) -> str:
    """Names the state of the project's files; 16 hexadecimal digits."""
    whole = hashlib.sha256(sys.version.encode())
    for path in _sources(repository):
        data = path.read_bytes()
        whole.update(f"{path.relative_to(repository)}\0{len(data)}\0".encode())
        whole.update(data)
    return whole.hexdigest()[:16]


def build_wheel(repository: Path, folder: Path) -> Path:
    """Build the project's wheel, or take the one that was built from the same files.

    :param folder: where wheels are kept; one made from other files is removed
    :raises LabError: it could not be built
    """
    place = folder / source_digest(repository)
    if not place.is_dir():
        with step("building the project's wheel"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            with tempfile.TemporaryDirectory(prefix="kemari-wheel-") as work:
                copy = Path(work) / "source"
                for path in _sources(repository):
                    target = copy / path.relative_to(repository)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
                out = Path(work) / "out"
                python, options = _builder()
                pip = [python, "-m", "pip", "wheel", "--quiet", "--no-deps"]
                run([*pip, *options, "--wheel-dir", out, copy])
                shutil.copytree(out, folder / "new")
            (folder / "new").rename(place)
    wheels = list(place.glob("*.whl"))
    if len(wheels) != 1:
        raise LabError(f"Building the project made {len(wheels)} wheels; expected one.")
    return wheels[0]


def _builder() -> tuple[str, list[str]]:
    """An interpreter that can build a wheel, and what pip must be told there.

    What is installed comes first: it needs no package index.
    """
    pythons = (sys.executable, "/usr/bin/python3")
    choices: tuple[tuple[tuple[str, ...], list[str]], ...] = (
        (("pip", "setuptools", "wheel"), ["--no-build-isolation"]),
        (("pip",), []),
    )
    for modules, options in choices:
        for python in pythons:
            if subprocess.run([python, "-c", HAS_ALL, *modules], check=False).returncode == 0:
                return python, options
    raise LabError(
        "Building the project's wheel needs pip: apt-get install --no-install-recommends "
        "python3-pip python3-setuptools python3-wheel python3-dev"
    )


def project_layer(repository: Path, recipe: Recipe, state: Path) -> dict[str, LayerFile]:
    """The project's files in a host of this suite.

    :param state: the lab's state folder, where the wheel is kept
    :raises LabError: the wheel could not be built, or does not fit the suite
    """
    return lay_out(build_wheel(repository, state / "wheel"), recipe)
