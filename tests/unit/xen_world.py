# SPDX-License-Identifier: Apache-2.0
"""Two fake Xen hosts: a guest on the one, and the other's toolstack, processor and xenstored."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from typing import Any

import pytest

from checkpoint.driver import PAGE_SIZE, Description
from checkpoint.xen import (
    control,
    dirty,
    frontends,
    host,
    mapping,
    moment,
    shortcut,
    source,
    toolstack,
)
from checkpoint.xen.context import Context
from checkpoint.xen.host import XenHost
from checkpoint.xen.shell import XenShell
from tests.unit.test_xen_pure import CPU_MEMBERS
from tests.unit.test_xen_stream import Parsed, parse
from tests.unit.xen_fake_store import FakeStore
from tests.unit.xen_fakes import FakeXen, save_file
from tests.unit.xen_guest import CONSOLE_GFN, DOMID, STORE_GFN, VIF, Rig
from tests.unit.xen_machine import VMCALL, VMMCALL, Hypervisor, run, toolstack_ports
from tests.unit.xen_store_ring import RingEnd

ACPI_GFN = 0xFC001
STUB = 0x20
BACKEND = "/local/domain/0/backend/vif/3/0"
#: one tick of the time-stamp counter is one nanosecond of system time
KHZ, MULTIPLIER, SHIFT = 1_000_000, 1 << 31, 1
OLD_TIME, NEW_TIME = 10**15, 10**9


class World:
    """Two hosts; :attr:`xen` is the one on which the code under test runs.

    :ivar machine: the processor's Xen on the standby, as the stub sees it
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rig = Rig(monkeypatch)
        self.primary = self.xen = self.rig.xen
        self.standby = FakeXen()
        self.primary.khz = self.standby.khz = KHZ
        self.store = self.rig.store
        self.config: dict[str, Any] = {
            "c_info": {"type": "pvh", "uuid": "u-u-i-d", "name": "web", "domid": DOMID},
            "b_info": {"max_memkb": self.rig.pages * 4, "target_memkb": self.rig.pages * 4},
        }
        for module in (dirty, mapping, moment, control, host, shortcut):
            monkeypatch.setattr(module, "libraries", lambda: self.xen)
        for module in (source, host, frontends):
            monkeypatch.setattr(module, "Store", lambda: self.store.connect())
        monkeypatch.setattr(control, "lowlevel_xc", lambda: self.xen)
        monkeypatch.setattr(toolstack, "configuration", lambda _domid: self.config)
        monkeypatch.setattr(toolstack, "restore_paused", self.restore)
        self.renamed: list[tuple[int, str]] = []
        monkeypatch.setattr(toolstack, "rename", lambda *names: self.renamed.append(names))
        self._prepare_guest()
        self.streams: list[Parsed] = []
        self.machine = Hypervisor(vcpus=2, ports=toolstack_ports((1, 2)))
        self.ring: RingEnd | None = None
        self.toolstack_params = {2: 1, 18: 2}
        self.stub_runs = 0
        monkeypatch.setattr(os, "sched_yield", self.other_processes)

    def _prepare_guest(self) -> None:
        guest = self.rig.guest
        guest.params = {0: 2 << 56 | 0xF3, 1: STORE_GFN, 17: CONSOLE_GFN, 2: 1, 18: 2, 36: 8}
        guest.places[ACPI_GFN] = len(guest.places)
        guest.page(ACPI_GFN)[:4] = b"RSDP"
        body = self.rig.kernel
        registers = bytearray(save_file((0, 1), tsc=5_000_000))
        for at in (m for m in range(len(registers)) if registers[m : m + 8] in CPU_HEADS):
            (lstar,) = {one.lstar for one in body.registers}
            (cr3,) = {one.cr3 for one in body.registers}
            (cr4,) = {one.cr4 for one in body.registers}
            for name, value in (("cr3", cr3), ("cr4", cr4), ("lstar", lstar)):
                struct.pack_into("<Q", registers, at + 8 + offset_of(name), value)
        guest.context = bytes(registers)
        info = self.rig.layout.cpus[0].vcpu_info
        guest.page(info // PAGE_SIZE)[info % PAGE_SIZE + 32 :][:32] = time_of(OLD_TIME, 4_000_000)
        self.store.nodes |= {
            f"{VIF}/backend": BACKEND,
            f"{VIF}/mac": "aa:bb:cc:dd:ee:ff",
            "control/feature-poweroff": "1",
            "data/note": "caf\xe9",
            "memory/target": "8192",
        }
        self.store.others = {
            f"{BACKEND}/vifname": "vif3.0",
            f"{BACKEND}/mac": "aa:bb:cc:dd:ee:ff",
            f"{BACKEND}/bridge": "xenbr0",
            f"{BACKEND}/state": "2",
        }

    # ---- the standby's toolstack, processor and xenstored ----

    def restore(self, stream: Iterable[bytes]) -> None:
        """Build what a restore stream says, paused."""
        found = parse(stream)
        self.streams.append(found)
        frames = [gfn for batch in found.batches for gfn in batch]
        domid = found.config["c_info"]["domid"]
        ram = [gfn for gfn in frames if gfn < self.rig.pages]
        guest = self.standby.add(
            domid,
            self.rig.pages,
            special=tuple(gfn for gfn in frames if gfn >= self.rig.pages),
            holes=tuple(set(range(self.rig.pages)) - set(ram)),
        )
        guest.pauses = 1
        self.ring = RingEnd(guest.page(STORE_GFN))
        guest.context = found.bodies[9]
        guest.params = found.params | self.toolstack_params
        self.standby.before["xc_domain_unpause"] = self.unpaused
        self.store = FakeStore({"name": "web--kemari", f"{VIF}/backend": BACKEND, VIF: ""})
        self.store.others = {f"{BACKEND}/state": "2"}

    def unpaused(self, *_: object) -> None:
        """The shell's vCPU 0 runs: the stub, or the guest."""
        guest = self.standby.domains[DOMID]
        if Context(guest.context).vcpu(0).rip != STUB * PAGE_SIZE:
            return
        self.stub_runs += 1
        memory = bytearray(b"".join(bytes(guest.page(STUB + page)) for page in range(5)))
        instruction = VMCALL if memory.find(VMCALL) > 0 else VMMCALL
        before = len(self.machine.made)
        run(memory, STUB * PAGE_SIZE, self.machine, instruction=instruction)
        for page in range(5):
            guest.page(STUB + page)[:] = memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        for number, command, argument in self.machine.made[before:]:
            if number == 24:
                vcpu, gfn, offset, _zero = struct.unpack("<IQII", argument)
                place = guest.page(gfn)[offset + 32 : offset + 64]
                place[:] = time_of(NEW_TIME, 4_000_000 + vcpu)
            elif (number, command) == (32, 4):
                assert self.ring is not None
                self.ring.notify()

    def other_processes(self) -> None:
        """What happens while the caller waits."""
        if self.ring is not None:
            self.ring.step()

    # ---- both hosts ----

    def protect(self) -> tuple[Description, XenShell]:
        """The guest is looked at on the primary; the standby builds its shell."""
        self.source = XenHost().open_source("web")
        detail = json.loads(json.dumps(self.source.description.detail))
        description = Description("web", "u-u-i-d", DOMID, 2, self.rig.pages, "xen", detail)
        self.xen = self.standby
        return description, XenHost().create_shell(description)

    def capture(self) -> None:
        """The primary takes one epoch: all pages."""
        kept, self.xen = self.xen, self.primary
        store, self.store = self.store, self.rig.store
        self.source.track()
        self.rig.source = self.source
        self.pages = {gfn: bytes(self.rig.guest.page(gfn)) for gfn in range(self.rig.pages)}
        self.state = self.rig.capture(leave_paused=True).to_bytes()
        self.xen, self.store = kept, store

    def apply(self, made: XenShell) -> None:
        """The standby applies it."""
        for gfn, page in self.pages.items():
            made.memory[gfn * PAGE_SIZE : (gfn + 1) * PAGE_SIZE] = page


def offset_of(register: str) -> int:
    """Where a register is in a CPU record."""
    names = [name for name, _size in CPU_MEMBERS]
    return sum(size for _name, size in CPU_MEMBERS[: names.index(register)])


CPU_HEADS = [struct.pack("<HHI", 2, number, 1032) for number in (0, 1)]


def time_of(system: int, stamp: int) -> bytes:
    """struct vcpu_time_info: ``system`` ns at ``stamp`` ticks."""
    return struct.pack("<IIQQIbB2x", 2, 0, stamp, system, MULTIPLIER, SHIFT, 1)
