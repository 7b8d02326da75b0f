# SPDX-License-Identifier: Apache-2.0
"""A shell's half of the guest's devices in xenstore, and having backends attach to it.

Each question to xenstored costs a change of processes, and after a power cut the world waits.  So
what backends are going to read is written while the guest still runs elsewhere; a backend looks at
nothing but its frontend's ``state`` until that says that it may (``xen/include/public/io/netif.h``,
``blkif.h``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from checkpoint.errors import ReviveError
from checkpoint.xen.store import Store

_CONNECTED: Final = "4"
#: Seconds that a backend may take to attach.
_BACKEND_BOUND = 10.0
#: Nodes of a frontend's folder that are the toolstack's of this host ...
_TOOLSTACK_NODES: Final = {
    "backend", "backend-id", "handle", "mac", "trusted", "script", "virtual-device", "device-type",
}  # fmt: skip
#: ... and the one that lets the backend attach.
_STATE: Final = "state"


class Frontends:
    """The frontends of one domain.

    :param domid: a shell, made by the toolstack of this host
    """

    def __init__(self, domid: int) -> None:
        self._domid = domid
        self._base = f"/local/domain/{domid}"
        self._written: dict[str, str] = {}
        self._backends: dict[str, str] = {}

    def describe(self, tree: Mapping[str, str]) -> None:
        """Write what backends will read; none of them attaches.

        :param tree: the guest's part of the store where it runs: relative path -> value
        :raise CheckpointError: xenstore cannot be reached or written
        """
        store = Store()
        try:
            self._describe(store, tree)
        finally:
            store.close()

    @contextmanager
    def attached(self, tree: Mapping[str, str]) -> Iterator[None]:
        """Have every backend attach to the rings that the guest goes on using, and mark the domain
        as a living guest; what is to be done at once then, is done in the context.

        netback and blkback take the ring's own response index as their start (BACK_RING_ATTACH in
        ``xen/include/public/io/ring.h``), so that unanswered requests are taken up again.

        :param tree: as of the epoch that is to run
        :raise ReviveError: a backend does not attach
        :raise CheckpointError: xenstore cannot be reached or written
        """
        # Opened anew: a connection kept for weeks may be of no use just when it is needed.
        store = Store()
        try:
            self._describe(store, tree)
            frontends = sorted(
                path.removesuffix(f"/{_STATE}")
                for path, value in tree.items()
                if _is_state(path) and value == _CONNECTED
            )
            backends = []
            for frontend in frontends:
                backend = self._backend(store, frontend)
                if backend is None:
                    raise ReviveError(f"{frontend} has no backend (expected the toolstack's)")
                backends.append(backend)
            watched = [store.watch(f"{backend}/{_STATE}") for backend in backends]
            for frontend in frontends:
                store.write(f"{self._base}/{frontend}/{_STATE}", _CONNECTED)
            for backend, state in zip(backends, watched, strict=True):
                found = state.wait(lambda value: value == _CONNECTED, _BACKEND_BOUND)
                if found != _CONNECTED:
                    raise ReviveError(
                        f"backend {backend} is in state {found} (expected {_CONNECTED}, connected)"
                    )
            store.write(revived_node(self._domid), "revived")
            yield
        finally:
            store.close()

    def _backend(self, store: Store, frontend: str) -> str | None:
        """Path of a frontend's backend: set by the toolstack of this host, and for good."""
        known = self._backends.get(frontend) or store.read(f"{self._base}/{frontend}/backend")
        if known is not None:
            self._backends[frontend] = known
        return known

    def _describe(self, store: Store, tree: Mapping[str, str]) -> None:
        for path in filter(_is_state, tree):
            self._backend(store, path.removesuffix(f"/{_STATE}"))
        wanted = {path: value for path, value in tree.items() if _is_carried(path)}
        for path in sorted(self._written.keys() - wanted.keys()):
            store.remove(f"{self._base}/{path}")
            del self._written[path]
        for path, value in wanted.items():
            if self._written.get(path) != value:
                store.write(f"{self._base}/{path}", value)
                self._written[path] = value


def revived_node(domid: int) -> str:
    """The xenstore node that tells a living guest from a shell; only Dom0 can write it."""
    return f"/local/domain/{domid}/kemari"


def _node(path: str) -> list[str]:
    """What follows device/CLASS/ID in the path of a network interface's or disk's node."""
    parts = path.split("/")
    return parts[3:] if parts[0] == "device" and parts[1:2] in (["vif"], ["vbd"]) else []


def _is_state(path: str) -> bool:
    return _node(path) == [_STATE]


def _is_carried(path: str) -> bool:
    if path.partition("/")[0] in ("control", "data", "attr", "feature"):
        return True
    node = _node(path)
    return bool(node) and node[0] not in _TOOLSTACK_NODES and node[0] != _STATE
