# SPDX-License-Identifier: Apache-2.0
"""The guest kernel's side of xenstore: is it at rest, and which watches has it set.

Facts from drivers/xen/xenbus/xenbus_comms.c, xenbus_xs.c and include/xen/xenbus.h.
"""

from __future__ import annotations

from checkpoint.errors import UnsupportedGuest
from checkpoint.guest.conditions import Condition, equals, is_zero
from checkpoint.guest.layout import LinuxLayout
from checkpoint.guest.memory import PhysicalMemory
from checkpoint.guest.paging import AddressSpace

_MOST_WATCHES = 8192
_LONGEST_PATH = 3072 + 1
"""``XENSTORE_ABS_PATH_MAX`` (public/io/xs_wire.h) and a NUL."""
_NODE = 16
"""Offset of ``node`` in ``struct xenbus_watch``, which begins with its list entry."""
_MUTEX_FLAGS = 7
"""Low bits of a mutex's owner word that do not say that it is held (kernel/locking/mutex.c)."""


def xenstore_at_rest(memory: PhysicalMemory, layout: LinuxLayout) -> bool:
    """Whether the paused guest's kernel has no xenstore request, transaction or message half done.

    The caller looks at the ring's indices as well: a message may lie there that neither side has
    begun to read.
    """
    return all(condition.holds(memory) for condition in xenstore_rests(layout))


def xenstore_rests(layout: LinuxLayout) -> list[Condition]:
    """What :func:`xenstore_at_rest` looks at."""
    xenbus = layout.xenbus
    return [
        is_zero(xenbus.users, 4),
        Condition(xenbus.reading, 8, (1 << 64) - 1 & ~_MUTEX_FLAGS, 0),
        *(equals(pa, 8, head_va) for pa, head_va in xenbus.lists),
    ]


def read_watches(memory: PhysicalMemory, layout: LinuxLayout) -> list[tuple[str, str]]:
    """(path, token) of each watch that the guest has set, processes' ones included.

    The token is what Linux sends for it, the watch's address in upper-case hexadecimal; relative
    paths are relative to the guest's own part of the store.

    :raise UnsupportedGuest: the list leads nowhere, or does not end
    """
    space = AddressSpace(memory, layout.page_table, la57=layout.la57)
    head = layout.xenbus.watches_va
    found: list[tuple[str, str]] = []
    entry = space.u64(head)
    while entry != head:
        if len(found) == _MOST_WATCHES:
            raise UnsupportedGuest(
                f"the guest's list of xenstore watches has more than {_MOST_WATCHES} entries, "
                "which is more than any guest is expected to have"
            )
        node = space.u64(entry + _NODE)
        found.append((space.cstring(node, _LONGEST_PATH), f"{entry:X}"))
        entry = space.u64(entry)
    return found
