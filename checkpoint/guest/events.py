# SPDX-License-Identifier: Apache-2.0
"""FIFO event channels: what a moved guest needs besides its memory.

Facts from Xen's public/event_channel.h and Linux's drivers/xen/events/events_fifo.c.  An event is a
32-bit word in pages of the guest; Xen links the words of pending events into queues, whose first
word is named in the virtual CPU's control block and whose last one only Xen remembers.  The guest
takes a queue over as a whole by keeping the first word of the rest in memory of its own.

After a move Xen's queues are those of the standby's shell, while the captured words, control
blocks and heads tell of the old host's.  :func:`settle_fifo` joins them.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence

from checkpoint.errors import UnsupportedGuest
from checkpoint.guest.layout import Fifo, LinuxLayout
from checkpoint.guest.memory import PAGE_MASK, PAGE_SIZE, PhysicalMemory
from checkpoint.guest.paging import AddressSpace

PENDING = 1 << 31
MASKED = 1 << 30
LINKED = 1 << 29
LINK = (1 << 17) - 1
WORDS_PER_PAGE = PAGE_SIZE // 4
DEFAULT_PRIORITY = 7

_QUEUES = 16
_MOST_PAGES = 128
_CONTROL = struct.Struct("<2I16I")


def grant_frames(memory: PhysicalMemory, layout: LinuxLayout) -> tuple[int, ...]:
    """Guest frames of the grant table that are in use now, in order.

    :raise UnsupportedGuest: the guest counts more of them than it has room for
    """
    used = int.from_bytes(memory.read(layout.grants.used, 4), "little")
    if used > len(layout.grants.gfns):
        raise UnsupportedGuest(
            f"the guest's kernel counts {used} grant frames in use, and has mapped "
            f"{len(layout.grants.gfns)}; expected no more"
        )
    return layout.grants.gfns[:used]


def event_pages(memory: PhysicalMemory, layout: LinuxLayout) -> list[int]:
    """Guest physical addresses of the pages of event words, in order; none with two levels.

    The guest adds pages as it binds more ports, so this is asked for at each capture.

    :raise UnsupportedGuest: there is no such list in the guest
    """
    return [] if layout.fifo is None else _event_pages(memory, layout, layout.fifo)


def _event_pages(memory: PhysicalMemory, layout: LinuxLayout, fifo: Fifo) -> list[int]:
    count = int.from_bytes(memory.read(fifo.pages, 4), "little")
    if not 0 < count <= _MOST_PAGES:
        raise UnsupportedGuest(
            f"the guest's kernel has {count} pages of FIFO events; expected 1 to {_MOST_PAGES}"
        )
    space = AddressSpace(memory, layout.page_table, la57=layout.la57)
    pages = []
    for va in struct.unpack(f"<{count}Q", memory.read(fifo.array, 8 * count)):
        pa = space.translate(va)
        if pa & PAGE_MASK:
            raise UnsupportedGuest(
                f"the guest's page of FIFO events is at physical address {pa:#x}; expected a "
                "whole page"
            )
        pages.append(pa)
    return pages


def settle_fifo(
    memory: PhysicalMemory,
    layout: LinuxLayout,
    live: Mapping[int, bytes],
    raised: Mapping[int, Sequence[int]],
) -> None:
    """Make captured FIFO events fit Xen's queues on this host, and raise events.

    :param memory: the paused guest's memory, holding the captured state
    :param live: contents of this guest's event pages and control blocks, by physical address, as
        they were in the shell after it had registered them and before the captured state was
        loaded; Xen has linked words there, and goes on from these links.  A page that is not in it
        has none
    :param raised: by Xen's number of a virtual CPU, the ports to raise for it: every bound one,
        since an event may have been lost in the move

    The words keep the captured mask and both sides' pending bits; the links are Xen's.  Ports that
    Xen has not linked go into the queue that the guest has already taken over, in which Xen never
    looks.  The caller marks the upcall as pending in each vcpu_info.

    :raise UnsupportedGuest: there is no such page, port or virtual CPU
    """
    if layout.fifo is None:
        raise UnsupportedGuest(
            "the guest uses the two-level event-channel ABI; expected FIFO event channels"
        )
    pages = _event_pages(memory, layout, layout.fifo)
    words = array("I")
    for pa in pages:
        captured = memory.read(pa, PAGE_SIZE)
        linked = live.get(pa, bytes(PAGE_SIZE))
        ours, theirs = array("I", captured), array("I", linked)
        words.extend(
            (our & (PENDING | MASKED)) | (their & (PENDING | LINKED | LINK))
            for our, their in zip(ours, theirs, strict=True)
        )
    cpus = {cpu.vcpu: cpu for cpu in layout.cpus}
    for vcpu, ports in raised.items():
        if vcpu not in cpus:
            raise UnsupportedGuest(f"the guest's kernel has not set up virtual CPU {vcpu}")
        if any(not 0 < port < len(words) for port in ports):
            raise UnsupportedGuest(
                f"the guest's kernel has event words for ports 1 to {len(words) - 1}; expected one "
                f"for each of {sorted(ports)}"
            )
    for vcpu, cpu in cpus.items():
        if cpu.control_block is None or cpu.queue is None:
            continue
        block = live.get(cpu.control_block, bytes(_CONTROL.size))
        ready, reserved, *heads = _CONTROL.unpack_from(block)
        xens = heads[DEFAULT_PRIORITY]
        # Xen marks a queue as ready only when it was empty, so that the guest must come upon what
        # Xen has already linked at the end of its own chain.
        rest = xens if xens < len(words) and words[xens] & LINKED else 0
        head = _link(words, raised.get(vcpu, ()), rest)
        if head:
            ready |= 1 << DEFAULT_PRIORITY
        memory.write(cpu.control_block, _CONTROL.pack(ready, reserved, *heads))
        queue = [0] * _QUEUES
        queue[DEFAULT_PRIORITY] = head
        memory.write(cpu.queue, struct.pack("<16I", *queue))
    data = words.tobytes()
    for index, pa in enumerate(pages):
        memory.write(pa, data[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])


def _link(words: array[int], ports: Sequence[int], rest: int) -> int:
    """Mark ``ports`` as pending, chain those that are free to be; the first of them, or ``rest``.

    :param rest: port that the chain's last word leads to, 0 for none

    A masked event is not chained: unmasking it makes the guest call Xen, which links it then.
    """
    following = rest
    for port in sorted(set(ports), reverse=True):
        words[port] |= PENDING
        if not words[port] & (LINKED | MASKED):
            words[port] |= LINKED | following
            following = port
    return following
