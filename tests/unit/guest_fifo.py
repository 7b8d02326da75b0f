# SPDX-License-Identifier: Apache-2.0
"""Both sides of FIFO event channels, as in Xen's common/event_fifo.c and Linux's events_fifo.c."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

from checkpoint.guest.events import LINK, LINKED, MASKED, PENDING, settle_fifo
from checkpoint.guest.linux import read_layout
from tests.unit.guest_kernel import DIRECT, Options, build

PAGE = 4096
WORDS = 0x40000
BLOCKS = 0x50000
PRIORITY = 7


class FifoGuest:
    """A guest whose state was captured on another host, and the shell that it comes to.

    :ivar captured: the event words of the old host
    """

    def __init__(self, pages: int = 1, cpus: int = 2) -> None:
        self.kernel = build(Options(cpus=cpus))
        self.kernel.poke("event_array_pages", pages, size=4)
        pointers = [DIRECT + WORDS + page * PAGE for page in range(pages)]
        self.kernel.poke("event_array", *pointers)
        self.layout = read_layout(self.kernel.memory, self.kernel.registers)
        self.size = pages * PAGE
        self.captured = array("I", bytes(self.size))
        self.tails = [0] * cpus
        self._settled = False
        self._shell = bytearray(self.size)
        self._blocks = bytearray(cpus * PAGE)

    def settle(self, raised: Mapping[int, Sequence[int]], *, shell: bool = True) -> None:
        """Load the captured state and join it with the shell's, if that had registered any."""
        ram = self.kernel.ram
        ram[WORDS : WORDS + self.size] = self.captured.tobytes()
        live = {
            WORDS + at: bytes(self._shell[at : at + PAGE]) for at in range(0, self.size, PAGE)
        } | {
            BLOCKS + at: bytes(self._blocks[at : at + PAGE])
            for at in range(0, len(self._blocks), PAGE)
        }
        settle_fifo(self.kernel.memory, self.layout, live if shell else {}, raised)
        self._settled = True

    def _get(self, pa: int) -> int:
        if self._settled:
            return self.kernel.peek(pa, 4)
        buffer, base = (self._blocks, BLOCKS) if pa >= BLOCKS else (self._shell, WORDS)
        return int.from_bytes(buffer[pa - base : pa - base + 4], "little")

    def _set(self, pa: int, value: int) -> None:
        if self._settled:
            self.kernel.poke(pa, value, size=4)
            return
        buffer, base = (self._blocks, BLOCKS) if pa >= BLOCKS else (self._shell, WORDS)
        buffer[pa - base : pa - base + 4] = value.to_bytes(4, "little")

    def word(self, port: int) -> int:
        return self._get(WORDS + 4 * port)

    def _put(self, port: int, value: int) -> None:
        self._set(WORDS + 4 * port, value)

    def send(self, vcpu: int, port: int) -> None:
        """Xen: mark a port as pending, link it unless it is masked or linked."""
        self._put(port, self.word(port) | PENDING)
        if self.word(port) & (MASKED | LINKED):
            return
        self._put(port, (self.word(port) & ~LINK) | LINKED)
        tail = self.tails[vcpu]
        block = BLOCKS + vcpu * PAGE
        if tail and self.word(tail) & LINKED and tail != port:
            self._put(tail, (self.word(tail) & ~LINK) | port)
        else:
            self._set(block + 8 + 4 * PRIORITY, port)
        self.tails[vcpu] = port
        self._set(block, self._get(block) | 1 << PRIORITY)

    def unmask(self, vcpu: int, port: int) -> None:
        """Linux: unmask, through Xen where the port is pending."""
        pending = self.word(port) & PENDING
        self._put(port, self.word(port) & ~MASKED)
        if pending:
            self.send(vcpu, port)

    def handle(self, vcpu: int) -> list[int]:
        """Linux: the ports whose handlers run, in order."""
        block = BLOCKS + vcpu * PAGE
        local = self.kernel.percpu("cpu_queue", vcpu)
        handled = []
        ready = self._get(block)
        self._set(block, 0)
        while ready:
            queue = (ready & -ready).bit_length() - 1
            head = self.kernel.peek(local + 4 * queue, 4) or self._get(block + 8 + 4 * queue)
            word = self.word(head)
            self._put(head, word & ~(LINKED | LINK))
            if not word & LINK:
                ready &= ~(1 << queue)
            if word & PENDING and not word & MASKED:
                self._put(head, self.word(head) & ~PENDING)
                handled.append(head)
            self.kernel.poke(local + 4 * queue, word & LINK, size=4)
            ready |= self._get(block)
            self._set(block, 0)
        return handled
