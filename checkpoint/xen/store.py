# SPDX-License-Identifier: Apache-2.0
"""xenstore, through pyxs: what the toolstack and the guest say to each other about devices."""

from __future__ import annotations

import errno
import queue
import time
from collections.abc import Callable
from typing import Any

import pyxs
from pyxs.exceptions import PyXSError

from checkpoint.errors import CheckpointError


class Store:
    """One connection to xenstored.  Values and paths are text; nodes must be ASCII."""

    def __init__(self) -> None:
        self._client: Any = pyxs.Client()
        try:
            self._client.connect()
        except (PyXSError, OSError) as exc:
            raise CheckpointError(f"xenstore cannot be reached: {exc}") from exc
        self._monitor: Any = None

    def close(self) -> None:
        """Close the connection (idempotent)."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def read(self, path: str) -> str | None:
        """The value at ``path``, or None when there is no such node."""
        try:
            return str(self._client.read(path.encode()).decode("latin-1"))
        except PyXSError as exc:
            if exc.args and exc.args[0] == errno.ENOENT:
                return None
            raise CheckpointError(f"xenstore node {path} cannot be read: {exc}") from exc

    def write(self, path: str, value: str) -> None:
        """Set the value at ``path``."""
        try:
            self._client.write(path.encode(), value.encode("latin-1"))
        except PyXSError as exc:
            raise CheckpointError(f"xenstore node {path} cannot be written: {exc}") from exc

    def children(self, path: str) -> list[str]:
        """Names of the nodes below ``path``; none when it does not exist."""
        try:
            return [name.decode("latin-1") for name in self._client.list(path.encode()) if name]
        except PyXSError as exc:
            if exc.args and exc.args[0] == errno.ENOENT:
                return []
            raise CheckpointError(f"xenstore node {path} cannot be listed: {exc}") from exc

    def tree(self, top: str) -> dict[str, str]:
        """Every node below ``top``: path relative to it -> value.

        Not a snapshot: nodes that vanish meanwhile are left out.
        """
        found: dict[str, str] = {}
        pending = [""]
        while pending:
            relative = pending.pop()
            for name in self.children(f"{top}/{relative}" if relative else top):
                path = f"{relative}/{name}" if relative else name
                value = self.read(f"{top}/{path}")
                if value is not None:
                    found[path] = value
                    pending.append(path)
        return found

    def wait(
        self, path: str, satisfied: Callable[[str | None], bool], timeout: float
    ) -> str | None:
        """Wait until the value at ``path`` satisfies; the value then, or at the end of the time.

        :param timeout: seconds
        """
        monitor = self._client.monitor()
        token = f"kemari-wait-{path}"
        monitor.watch(path.encode(), token.encode())
        try:
            deadline = time.monotonic() + timeout
            while True:
                value = self.read(path)
                if satisfied(value):
                    return value
                left = deadline - time.monotonic()
                if left <= 0:
                    return value
                try:
                    monitor.events.get(timeout=left)
                except queue.Empty:
                    continue
        finally:
            monitor.unwatch(path.encode(), token.encode())

    def watch(self, path: str) -> Callable[[], bool]:
        """Watch everything below ``path``.

        :return: a function that tells whether anything changed since it was last called; the
            first call says yes
        """
        monitor = self._client.monitor()
        monitor.watch(path.encode(), b"kemari-changes")
        events = monitor.events

        def changed() -> bool:
            seen = False
            while not events.empty():
                events.get()
                seen = True
            return seen

        return changed
