# SPDX-License-Identifier: Apache-2.0
"""xenstore, through pyxs: what the toolstack and the guest say to each other about devices."""

from __future__ import annotations

import contextlib
import errno
import queue
import time
from collections.abc import Callable
from typing import Any, Final

import pyxs
from pyxs.exceptions import PyXSError

from checkpoint.errors import CheckpointError

#: Seconds for the event that each watch begins with; without it a change costs one question more.
_FIRST_EVENT: Final = 1.0


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

    def remove(self, path: str) -> None:
        """Remove the node at ``path`` and all below it; there need not be one."""
        try:
            self._client.delete(path.encode())
        except PyXSError as exc:
            if not (exc.args and exc.args[0] == errno.ENOENT):
                raise CheckpointError(f"xenstore node {path} cannot be removed: {exc}") from exc

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
            for name in self.children(_join(top, relative)):
                path = f"{relative}/{name}" if relative else name
                value = self.read(f"{top}/{path}")
                if value is not None:
                    found[path] = value
                    pending.append(path)
        return found

    def follow(self, top: str) -> Following:
        """A copy of everything below ``top`` that is kept up to date."""
        return Following(self, self._client.monitor(), top)

    def watch(self, path: str) -> Watched:
        """Note changes of the value at ``path`` from now on, until the connection is closed."""
        try:
            return Watched(self, self._client.monitor(), path)
        except PyXSError as exc:
            raise CheckpointError(f"xenstore node {path} cannot be watched: {exc}") from exc


class Watched:
    """One node that is watched: waiting for a value costs a question for each change of it.

    :param monitor: of pyxs
    """

    def __init__(self, store: Store, monitor: Any, path: str) -> None:
        self._store = store
        self._path = path
        self._events = monitor.events
        monitor.watch(path.encode(), f"kemari-wait-{path}".encode())
        # It fires once at once (docs/misc/xenstore.txt), whatever the value is.
        with contextlib.suppress(queue.Empty):
            self._events.get(timeout=_FIRST_EVENT)

    def wait(self, satisfied: Callable[[str | None], bool], timeout: float) -> str | None:
        """Wait until the value, once it was changed, satisfies; or as it is at the end of the time.

        :param timeout: seconds
        """
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                self._events.get(timeout=left)
            except queue.Empty:
                break
            value = self._store.read(self._path)
            if satisfied(value):
                return value
        return self._store.read(self._path)


class Following:
    """A copy of a part of the store; a change costs what changed, not what there is.

    :param monitor: of pyxs
    :param top: path of the part
    """

    def __init__(self, store: Store, monitor: Any, top: str) -> None:
        self._store = store
        self._top = top
        self._tree: dict[str, str] = {}
        self._stale: set[str] = set()
        self._events = monitor.events
        # Fires once at once, for the whole part (docs/misc/xenstore.txt).
        monitor.watch(top.encode(), b"kemari-changes")

    def changed(self) -> bool:
        """Whether the copy is out of date."""
        while not self._events.empty():
            path = self._events.get().path.decode("latin-1")
            self._stale.add(path.removeprefix(self._top).strip("/"))
        return bool(self._stale)

    def tree(self) -> dict[str, str]:
        """As :meth:`Store.tree`, up to date but for what :meth:`changed` reports after it.

        :raise CheckpointError: the store cannot be read; the next call tries again
        """
        self.changed()
        tree = dict(self._tree)
        for path in sorted(self._stale):
            # Of a part that went only the topmost node fires, of one that came only the lowest.
            for known in [name for name in tree if not path or f"{name}/".startswith(f"{path}/")]:
                del tree[known]
            missing = [*_ancestors(path), path] if path else []
            for name in (name for name in missing if name not in tree):
                value = self._store.read(f"{self._top}/{name}")
                if value is not None:
                    tree[name] = value
            below = self._store.tree(_join(self._top, path))
            tree |= {_join(path, name): value for name, value in below.items()}
        self._tree = tree
        self._stale.clear()
        return dict(tree)


def _ancestors(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _join(top: str, relative: str) -> str:
    return f"{top}/{relative}" if top and relative else top or relative
