# SPDX-License-Identifier: Apache-2.0
"""Running a test in a network of its own, as root or as an ordinary user.

A process that has entered a user namespace cannot come back, so the test's body runs in a forked
child; its failure is raised again in the parent, with its traceback as text.  Where neither a
network namespace nor a user namespace can be made, the test fails.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import pickle
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import pytest

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000

_P = ParamSpec("_P")


def own_network(test: Callable[_P, None]) -> Callable[_P, None]:
    """Run a test in a new network namespace, in which it may do everything."""

    @functools.wraps(test)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> None:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            # What other tests have left belongs to the parent, and not all of it was inherited.
            gc.freeze()
            os.close(reader)
            failure = _attempt(lambda: test(*args, **kwargs))
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(failure, pipe)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            told = pipe.read()
        os.waitpid(child, 0)
        if not told:
            pytest.fail("the test's process died without a word")
        failure = pickle.loads(told)
        if failure is not None:
            pytest.fail(failure, pytrace=False)

    return wrapped


def _attempt(test: Callable[[], None]) -> str | None:
    try:
        _enter()
        test()
    except BaseException:  # noqa: BLE001 - the child of a fork must not return
        return traceback.format_exc()
    return None


def _enter() -> None:
    uid, gid = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _CLONE_NEWNET if uid == 0 else _CLONE_NEWNET | _CLONE_NEWUSER
    if libc.unshare(flags):
        reason = os.strerror(ctypes.get_errno())
        raise RuntimeError(f"these tests need root or user namespaces: unshare: {reason}")
    if uid != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def add_link(name: str, kind: str, **options: Any) -> None:
    """Make a network device and set it up.

    :param options: ``peer``: name of the other end of a veth pair; ``master``: its bridge
    """
    peer = options.pop("peer", None)
    _ip("link", "add", name, "type", kind, *(("peer", "name", peer) if peer else ()))
    for one in (name, peer) if peer else (name,):
        # Frames of the host itself would be seen beside those of the test.
        path = Path(f"/proc/sys/net/ipv6/conf/{one}/disable_ipv6")
        if path.exists() and os.access(path, os.W_OK):
            path.write_text("1")
    if master := options.pop("master", None):
        _ip("link", "set", name, "master", master)
    for one in (name, peer) if peer else (name,):
        _ip("link", "set", one, "up")


def _ip(*words: str) -> None:

    subprocess.run(("ip", *words), check=True, capture_output=True)
