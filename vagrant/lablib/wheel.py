# SPDX-License-Identifier: Apache-2.0
"""A wheel, laid out in a file system as ``pip install`` run by an administrator lays it out.

Source of the rules: "The wheel format" and "Recording installed projects" of the Python packaging
specifications; Debian's scheme for /usr/local.
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import os
import py_compile
import stat
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from vagrant.lablib.errors import LabError
from vagrant.lablib.image import LayerFile, executable
from vagrant.lablib.recipe import Recipe

PREFIX = "usr/local"
INTERPRETER = b"#!/usr/bin/python3\n"

SCRIPT = """\
#!/usr/bin/python3
import sys

from {module} import {name}

if __name__ == "__main__":
    sys.exit({call}())
"""


def lay_out(wheel: Path, recipe: Recipe) -> dict[str, LayerFile]:
    """The files that installing the wheel makes, by path without a leading /.

    :raises LabError: the wheel does not fit the suite's Python
    """
    _check_tags(wheel, recipe)
    files: dict[str, LayerFile] = {}
    with zipfile.ZipFile(wheel) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist() if not i.is_dir()}
    info = next(name.partition("/")[0] for name in members if name.endswith(".dist-info/METADATA"))
    data = info.removesuffix(".dist-info") + ".data/"
    for name, content in members.items():
        if name == f"{info}/RECORD":
            continue
        if name.startswith(data):
            path, entry = _data_file(name.removeprefix(data), content, recipe)
        else:
            path, entry = f"{recipe.dist_packages}/{name}", LayerFile(content)
        files[path] = entry
    entry_points = members.get(f"{info}/entry_points.txt", b"").decode()
    files.update(_scripts(entry_points))
    files[f"{recipe.dist_packages}/{info}/INSTALLER"] = LayerFile(b"lab\n")
    files.update(list(_compiled(files, recipe)))
    record = f"{recipe.dist_packages}/{info}/RECORD"
    files[record] = LayerFile(_record(files, record, recipe))
    return files


def _check_tags(wheel: Path, recipe: Recipe) -> None:
    # NAME-VERSION(-BUILD)-PYTHON-ABI-PLATFORM.whl
    python, abi = wheel.stem.split("-")[-3:-1]
    exact = "cp" + recipe.python.replace(".", "")
    if abi not in ("none", "abi3") and python != exact:
        raise LabError(
            f"The wheel {wheel.name} does not fit Python {recipe.python} of {recipe.suite}; "
            "expected the stable ABI (abi3)."
        )


def _data_file(name: str, content: bytes, recipe: Recipe) -> tuple[str, LayerFile]:
    scheme, _, path = name.partition("/")
    match scheme:
        case "purelib" | "platlib":
            return f"{recipe.dist_packages}/{path}", LayerFile(content)
        case "data":
            # Hotplug scripts are files to a wheel, and programs to whoever calls them.
            made = executable(content) if content.startswith(b"#!") else LayerFile(content)
            return f"{PREFIX}/{path}", made
        case "scripts":
            if content.startswith(b"#!python"):
                content = INTERPRETER + content.partition(b"\n")[2]
            return f"{PREFIX}/bin/{path}", executable(content)
    raise LabError(f"The wheel holds a file of kind {scheme!r}, which the lab cannot install.")


def _scripts(entry_points: str) -> dict[str, LayerFile]:
    parser = configparser.ConfigParser(delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(entry_points)
    if not parser.has_section("console_scripts"):
        return {}
    scripts = {}
    for name, target in parser.items("console_scripts"):
        module, _, call = target.partition(" ")[0].partition(":")
        text = SCRIPT.format(module=module, name=call.partition(".")[0], call=call)
        scripts[f"{PREFIX}/bin/{name}"] = executable(text.encode())
    return scripts


def _compiled(files: dict[str, LayerFile], recipe: Recipe) -> Iterator[tuple[str, LayerFile]]:
    """Byte code, as pip makes it, if this interpreter makes the kind that the host's one reads."""
    if "{}.{}".format(*sys.version_info[:2]) != recipe.python:
        return
    with tempfile.TemporaryDirectory(prefix="kemari-compile-") as work:
        source, result = Path(work) / "source.py", Path(work) / "result.pyc"
        for path, entry in files.items():
            if not path.endswith(".py"):
                continue
            source.write_bytes(entry.data)
            try:
                py_compile.compile(
                    os.fspath(source),
                    os.fspath(result),
                    dfile=f"/{path}",
                    doraise=True,
                    # By content: the time of a file is when it was written into the disk.
                    invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH,
                )
            except py_compile.PyCompileError as error:
                raise LabError(f"/{path} is not valid Python.", str(error)) from None
            folder, _, name = path.rpartition("/")
            tag = sys.implementation.cache_tag
            compiled = f"{folder}/__pycache__/{name.removesuffix('.py')}.{tag}.pyc"
            yield compiled, LayerFile(result.read_bytes(), stat.S_IFREG | 0o644)


def _record(files: dict[str, LayerFile], record: str, recipe: Recipe) -> bytes:
    lines = []
    for path in sorted(files):
        relative = os.path.relpath(path, recipe.dist_packages)
        data = files[path].data
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{relative},sha256={digest},{len(data)}\n")
    lines.append(f"{os.path.relpath(record, recipe.dist_packages)},,\n")
    return "".join(lines).encode()
