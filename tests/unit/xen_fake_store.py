# SPDX-License-Identifier: Apache-2.0
"""A xenstore in plain memory, in the place of :mod:`checkpoint.xen.store`; for tests."""

from __future__ import annotations

from collections.abc import Callable


class FakeStore:
    """In the place of ``checkpoint.xen.store.Store``: one tree, shared by all connections.

    :param tree: the guest's own part of the store, relative paths
    :ivar others: nodes elsewhere, absolute paths
    :ivar connects: backends that go to state 4 when their frontend does
    """

    def __init__(self, tree: dict[str, str], domid: int = 3) -> None:
        self.nodes = tree
        self.others: dict[str, str] = {}
        self.changed = True
        self.open = 0
        self.connects = True
        self.written: list[str] = []
        self._base = f"/local/domain/{domid}/"

    def connect(self) -> FakeStore:
        """What ``Store()`` is."""
        self.open += 1
        return self

    def close(self) -> None:
        """End one connection."""
        self.open -= 1

    def read(self, path: str) -> str | None:
        """As ``Store.read``."""
        if path.startswith(self._base):
            return self.nodes.get(path.removeprefix(self._base))
        return self.others.get(path)

    def write(self, path: str, value: str) -> None:
        """As ``Store.write``."""
        assert path.startswith(self._base)
        self.written.append(path.removeprefix(self._base))
        self.set(path.removeprefix(self._base), value)

    def remove(self, path: str) -> None:
        """As ``Store.remove``."""
        assert path.startswith(self._base)
        gone = path.removeprefix(self._base)
        for node in [node for node in self.nodes if f"{node}/".startswith(f"{gone}/")]:
            del self.nodes[node]

    def tree(self, path: str) -> dict[str, str]:
        """As ``Store.tree``."""
        assert f"{path}/" == self._base
        return dict(self.nodes)

    def children(self, path: str) -> list[str]:
        """As ``Store.children``."""
        prefix = path.removeprefix(self._base) + "/"
        names = {
            node[len(prefix) :].split("/")[0] for node in self.nodes if node.startswith(prefix)
        }
        return sorted(names)

    def watch(self, path: str) -> FakeWatched:
        """As ``Store.watch``."""
        assert self.others.get(path) != "4", "a backend attaches before it is watched"
        return FakeWatched(self, path)

    def set(self, path: str, value: str) -> None:
        """Somebody writes a node."""
        self.nodes[path] = value
        self.changed = True

    def follow(self, _top: str) -> FakeFollowing:
        """As ``Store.follow``."""
        return FakeFollowing(self)


class FakeWatched:
    """In the place of ``checkpoint.xen.store.Watched``."""

    def __init__(self, store: FakeStore, path: str) -> None:
        self._store = store
        self._path = path

    def wait(self, satisfied: Callable[[str | None], bool], _timeout: float) -> str | None:
        """As ``Watched.wait``, at the end of its time."""
        if self._store.connects:
            self._store.others[self._path] = "4"
        value = self._store.others.get(self._path)
        assert self._store.connects == satisfied(value)
        return value


class FakeFollowing:
    """In the place of ``checkpoint.xen.store.Following``."""

    def __init__(self, store: FakeStore) -> None:
        self._store = store

    def changed(self) -> bool:
        """As ``Following.changed``."""
        return self._store.changed

    def tree(self) -> dict[str, str]:
        """As ``Following.tree``."""
        self._store.changed = False
        return dict(self._store.nodes)
