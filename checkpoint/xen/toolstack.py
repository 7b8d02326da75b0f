# SPDX-License-Identifier: Apache-2.0
"""The xl toolstack as a program: what it does with a domain, it does best itself."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterable
from typing import Any

from checkpoint.errors import CheckpointError

#: seconds; xl waits up to 40 s for a hotplug script of its own
_TIMEOUT = 120
#: what libxl says of a number that a domain had until a moment ago
_RECENT = "recently used"


def _run(*args: str) -> str:
    # libxl refuses a domain number that was in use a minute ago; a guest that comes back to a host
    # needs exactly its old number (libxl_internal.h, LIBXL_DOMID_REUSE_TIMEOUT).
    env = {**os.environ, "LIBXL_DOMID_REUSE_TIMEOUT": "0"}
    try:
        done = subprocess.run(
            ["xl", *args], capture_output=True, text=True, timeout=_TIMEOUT, env=env, check=False
        )
    except FileNotFoundError:
        raise CheckpointError("xl is not installed (expected Xen's toolstack)") from None
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"xl {args[0]} did not end within {_TIMEOUT} s") from None
    if done.returncode:
        raise CheckpointError(f"xl {args[0]} failed: {_reason(done.stderr)}")
    return done.stdout


def _reason(stderr: str) -> str:
    """The most telling line of what xl printed: its first error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    for line in lines:
        if "error" in line.lower() or "failed" in line.lower():
            return line.removeprefix("libxl: error: ")
    return lines[-1] if lines else "no reason given"


def configuration(domid: int) -> dict[str, Any]:
    """The domain's configuration as libxl keeps it (``xl list -l``)."""
    for item in json.loads(_run("list", "-l", str(domid))):
        if item["domid"] == domid:
            config: dict[str, Any] = item["config"]
            return config
    raise CheckpointError(f"xl knows no configuration of domain {domid}")


def restore_paused(stream: Iterable[bytes]) -> None:
    """Build a domain from a restore stream and leave it paused."""
    with tempfile.NamedTemporaryFile(prefix="kemari-shell-", dir="/run") as file:
        for piece in stream:
            file.write(piece)
        file.flush()
        try:
            _run("restore", "-p", file.name)
        except CheckpointError as error:
            if _RECENT not in str(error):
                raise
            # Of the same second, which no timeout allows (libxl_domain.c, libxl__is_domid_recent):
            # a guest that is protected again as soon as it was stopped.  xl has undone its part.
            time.sleep(1.0 - time.monotonic() % 1.0)
            _run("restore", "-p", file.name)


def rename(domid: int, name: str) -> None:
    """Give the domain another name."""
    _run("rename", str(domid), name)


def destroy(domid: int) -> None:
    """Destroy the domain and its devices."""
    _run("destroy", str(domid))
