# SPDX-License-Identifier: Apache-2.0
"""A running PVH guest on the fake Xen host, with one vif of two ring pages, ready to protect."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from checkpoint.driver import PAGE_SIZE, Description, Staging
from checkpoint.errors import NotQuiescent
from checkpoint.guest.linux import read_layout
from checkpoint.xen import (
    dirty,
    host,
    mapping,
    moment,
    shell,
    shortcut,
    source,
    standstill,
    toolstack,
)
from checkpoint.xen.control import Domain
from checkpoint.xen.rings import Kind
from checkpoint.xen.source import XenSource
from checkpoint.xen.state import MachineState
from tests.unit.guest_fifo import WORDS
from tests.unit.guest_kernel import DIRECT, Options, build
from tests.unit.xen_fake_store import FakeStore
from tests.unit.xen_fakes import FakeDomain, FakeXen, save_file

DOMID = 3
#: A hole in the middle of RAM, as a guest has it below 4 GiB, in place of that.
HOLE = range(0x600, 0x680)
STORE_GFN, CONSOLE_GFN = 0xFEFFC, 0xFEFFF
#: guest frames of the rings, of a receive buffer and of plain data
TX, RX, BUFFER, BLOCK, DATA = 0x300, 0x301, 0x302, 0x303, 0x310
TX_REFERENCE, RX_REFERENCE, BUFFER_REFERENCE, BLOCK_REFERENCE = 8, 9, 10, 11
VIF, VBD = "device/vif/0", "device/vbd/51712"


class Rig:
    """The guest, its host and its source.

    :ivar events: what happened, in order: calls into Xen and the closing of the output
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, holes: tuple[int, ...] = ()) -> None:
        self.kernel = build(Options(cpus=2))
        self.kernel.poke("event_array_pages", 1, size=4)
        self.kernel.poke("event_array", *(DIRECT + WORDS + page * PAGE_SIZE for page in range(2)))
        self.layout = read_layout(self.kernel.memory, self.kernel.registers)
        self.pages = len(self.kernel.ram) // PAGE_SIZE
        self.xen = FakeXen()
        self.guest: FakeDomain = self.xen.add(
            DOMID, self.pages, special=(STORE_GFN, CONSOLE_GFN), holes=holes
        )
        for gfn in range(self.pages):
            if gfn not in holes:
                at = gfn * PAGE_SIZE
                self.guest.page(gfn)[:] = self.kernel.ram[at : at + PAGE_SIZE]
        self.guest.context = save_file((0, 1))
        self.guest.params = {0: 2 << 56 | 0xF3}
        self.guest.ports = {1: (2, 0, 0, 30), 2: (2, 0, 0, 31), 3: (4, 0, 0, 0), 4: (5, 1, 0, 0)}
        self.store = FakeStore(
            {
                "name": "web",
                f"{VIF}": "",
                f"{VIF}/state": "4",
                f"{VIF}/tx-ring-ref": str(TX_REFERENCE),
                f"{VIF}/rx-ring-ref": str(RX_REFERENCE),
            }
        )
        for reference, gfn in (
            (TX_REFERENCE, TX), (RX_REFERENCE, RX), (BUFFER_REFERENCE, BUFFER),
            (BLOCK_REFERENCE, BLOCK),
        ):  # fmt: skip
            self.guest.grant(reference, gfn)
        self.indices(TX, 7, 7)
        self.indices(RX, 300, 290)
        for slot in range(256):
            self.slot(RX, slot, 8 + slot % 100)
        self.destroyed: list[int] = []
        for module in (dirty, mapping, moment, shortcut):
            monkeypatch.setattr(module, "libraries", lambda: self.xen)
        monkeypatch.setattr(source, "Store", self.store.connect)
        monkeypatch.setattr(toolstack, "destroy", self.destroyed.append)
        # A bound that no test should have to wait for; those that do set their own.
        monkeypatch.setattr(standstill, "_QUIET_BOUND", dict.fromkeys(Kind, 0.005))
        libs: Any = self.xen
        self.domain = Domain(DOMID, libs)
        description = Description("web", "u-u-i-d", DOMID, 2, self.pages, "xen")
        self.source = XenSource(
            self.domain, description, [], [], self.layout, [STORE_GFN, CONSOLE_GFN]
        )
        self.staging = Staging(256)
        self.closed = self.waits = 0

    def indices(self, gfn: int, requests: int, responses: int) -> None:
        """Set a ring's producer indices."""
        self.guest.page(gfn)[:16] = struct.pack("<4I", requests, 1, responses, 1)

    def add_disk(self) -> None:
        """Connect a disk, nothing of which is under way."""
        self.store.set(f"{VBD}/state", "4")
        self.store.set(f"{VBD}/ring-ref", str(BLOCK_REFERENCE))
        self.indices(BLOCK, 40, 40)

    def slot(self, gfn: int, slot: int, reference: int) -> None:
        """Put a request into a receive ring's slot."""
        at = 64 + 8 * (slot % 256)
        self.guest.page(gfn)[at : at + 8] = struct.pack("<HHI", slot % 256, 0, reference)

    def store_ring(self, *indices: int) -> None:
        """Set req_cons, req_prod, rsp_cons and rsp_prod of the xenstore ring."""
        self.guest.page(STORE_GFN)[2048:2064] = struct.pack("<4I", *indices)

    def close_output(self) -> None:
        """What a capture calls before the pause, or in it where the guest has to wait anyhow."""
        assert self.guest.pauses == self.waits
        self.xen.calls.append("close_output")
        self.closed += 1

    def capture(self, then: Callable[[], None] | None = None, **how: int) -> MachineState:
        """One capture; the state that it took.

        :param then: done when the disks' writes are closed
        """
        self.waits = int(bool(how.get("leave_paused")) or self.guest.pauses > 0)

        def close_writes() -> None:
            assert self.guest.pauses == 1
            self.xen.calls.append("close_writes")
            if then is not None:
                then()

        self.source.capture(
            self.staging,
            self.close_output,
            close_writes,
            leave_paused=bool(how.get("leave_paused")),
            keep=how.get("keep", 0),
        )
        return MachineState.from_bytes(self.staging.state)

    def refused(self, reason: str) -> None:
        """A capture finds no quiet moment, and the guest runs on."""
        self.guest.write(DATA, b"kept")
        with pytest.raises(NotQuiescent, match=reason):
            self.capture()
        assert self.guest.pauses == 0

    def copies(self) -> dict[int, bytes]:
        """Guest frame -> contents of what the last capture copied; no frame comes twice."""
        staging = self.staging
        frames = list(staging.gfns[: staging.count])
        assert len(set(frames)) == len(frames)
        return {
            gfn: bytes(staging.data[at * PAGE_SIZE : (at + 1) * PAGE_SIZE])
            for at, gfn in enumerate(frames)
        }


def with_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests to come have :data:`HOLE`; what is in there is no RAM."""
    for module in (mapping, source, shell, host):
        monkeypatch.setattr(module, "MMIO_HOLE", HOLE)
    monkeypatch.setattr(mapping, "_PIECE", len(HOLE))


def tracked(monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A guest that is tracked, its first copy done."""
    made = Rig(monkeypatch)
    made.source.track()
    assert sum(len(batch) for batch in made.source.base_round()) == made.pages
    made.xen.calls.clear()
    return made
