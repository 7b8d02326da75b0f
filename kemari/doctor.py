# SPDX-License-Identifier: Apache-2.0
"""``kemari doctor``: whether this host has what protection needs.

Looks from outside the daemon where it can, so that it also helps when the daemon does not start.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from kemari.control import request
from kemari.errors import KemariError

Finding = dict[str, Any]

#: Kernel modules that the output buffer is made of, and what says that they are there.
MODULES: Final = ("ifb", "sch_plug", "sch_ingress", "act_mirred", "cls_matchall")


def examine(socket: Path, domain: str) -> list[Finding]:
    """All checks, in the order in which a failure explains later ones.

    :param domain: a guest to look at as well, or ""
    """
    return [{"check": name, "ok": ok, "text": text} for name, ok, text in _checks(socket, domain)]


def _checks(socket: Path, domain: str) -> Iterator[tuple[str, bool, str]]:
    yield _check("root", lambda: os.geteuid() == 0, "runs as root", "does not run as root")
    yield _check(
        "dom0",
        lambda: "control_d" in Path("/proc/xen/capabilities").read_text(),
        "this is Dom0 of a Xen host",
        "this is not Dom0 of a Xen host, or /proc/xen is not mounted",
    )
    for module in MODULES:
        yield _check(
            module,
            lambda module=module: _has_module(module),  # type: ignore[misc]
            f"the kernel has {module}",
            f"the kernel lacks {module}",
        )
    try:
        about = request(socket, "ping", {})
    except KemariError as error:
        yield "kemarid", False, str(error)
        return
    yield "kemarid", True, f"kemarid {about['version']} serves on {', '.join(about['addresses'])}"
    for peer in about.get("peers", ()):
        yield _peer(socket, peer)
    if domain:
        try:
            request(socket, "check", {"domain": domain})
        except KemariError as error:
            yield domain, False, str(error)
        else:
            yield domain, True, f"{domain} can be protected"


def _check(name: str, test: Callable[[], bool], good: str, bad: str) -> tuple[str, bool, str]:
    try:
        ok = test()
    except OSError:
        ok = False
    return name, ok, good if ok else bad


def _has_module(module: str) -> bool:
    if Path("/sys/module", module).is_dir():
        return True
    release = os.uname().release
    folder = Path("/lib/modules", release)
    names = {f"{module}.ko", f"{module.replace('_', '-')}.ko"}
    for index in ("modules.dep", "modules.builtin"):
        for line in (folder / index).read_text().splitlines():
            file = line.partition(":")[0].rsplit("/", 1)[-1]
            if any(file.startswith(name) for name in names):
                return True
    return False


def _peer(socket: Path, peer: str) -> tuple[str, bool, str]:
    try:
        answer = request(socket, "ping-peer", {"standby": peer})
    except KemariError as error:
        return peer, False, str(error)
    return peer, True, f"{peer} answers as host {answer['host']}, {answer['software']}"
