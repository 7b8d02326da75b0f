# SPDX-License-Identifier: Apache-2.0
"""Bringing a shell to life: the standby's part of a failover on Xen.

Order: the stub makes the hypercalls that only the guest may make, so that every event-channel port
gets its old number; Xen's pages go where the guest has them; memory, grants and vCPUs are set; the
clock is made to continue; backends attach to the live rings; the guest runs.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from checkpoint.driver import PAGE_SIZE, Description
from checkpoint.errors import ReviveError
from checkpoint.faultpoints import reach
from checkpoint.guest.clock import detach_runstate, shift_clock
from checkpoint.guest.events import settle_fifo
from checkpoint.guest.layout import LinuxLayout
from checkpoint.guest.memory import RamView
from checkpoint.stages import Laps
from checkpoint.xen import rings, stub
from checkpoint.xen.borrowed import borrowed
from checkpoint.xen.context import Context
from checkpoint.xen.control import (
    HVM_PARAM_CALLBACK_IRQ,
    XENMAPSPACE_GRANT_TABLE,
    XENMAPSPACE_SHARED_INFO,
    Domain,
)
from checkpoint.xen.frontends import Frontends
from checkpoint.xen.mapping import GrantFrames, Mapping
from checkpoint.xen.plan import Plan
from checkpoint.xen.state import MachineState
from checkpoint.xen.watches import WatchRequests

log = logging.getLogger(__name__)

#: how long xenstored may take to answer, seconds
_STORE_BOUND = 10.0
#: calls of one run of the stub; there is room for one more, to notify xenstored
_ROUND = stub.MOST_CALLS - 1
#: how long to wait for the first event of a watch that was answered, seconds
_EVENT_BOUND = 1.0

#: struct shared_info (xen.h, 64 bit): 32 vcpu_info of 64 bytes, then pending and mask bits
_PENDING_AT, _MASK_AT, _BITS = 2048, 2560, 512
_VCPU_INFO_SIZE = 64
#: struct vcpu_info: time at 32: version, pad, tsc_timestamp, system_time, mul, shift, flags
_TIME = struct.Struct("<IIQQIbB")
_TIME_AT = 32


def revive(
    domain: Domain,
    description: Description,
    plan: Plan,
    memory: memoryview,
    frontends: Frontends,
    elapsed_ns: int,
    running: Callable[[], None],
) -> None:
    """Run ``domain`` from ``memory`` and the state of ``plan``.

    :param plan: of the whole last epoch
    :param memory: its RAM, holding that epoch
    :param frontends: its devices, as far as they are known
    :param elapsed_ns: time since the capture of that epoch
    :param running: called as soon as it runs
    :raise ReviveError: it cannot run; the domain is paused
    """
    laps = Laps()
    layout, state, vector = plan.layout, plan.state, plan.vector
    ram = RamView(memory)
    context = Context(state.context)
    store_page_gfn, console_page_gfn = description.detail["special"][:2]
    fifo = _FifoPages(ram, layout, plan.fifo_pages)
    infos = {cpu.vcpu: ram.read(cpu.vcpu_info, _VCPU_INFO_SIZE) for cpu in layout.cpus}

    def elapsed() -> int:
        return elapsed_ns + laps.elapsed_ns

    laps.lap("begin")
    reach("revive-stub")
    with _mapped(domain, store_page_gfn) as page:
        _make_calls(domain, context, memory, plan, WatchRequests(page, plan.watches))
        page[:] = state.pages[store_page_gfn]
    with _mapped(domain, console_page_gfn) as page:
        page[:] = state.pages[console_page_gfn]

    laps.lap("stub")
    reach("revive-memory")
    _place_frames(domain, layout, state, memory)
    _shift(domain, layout, ram, (infos[0], context.vcpu(0).tsc), elapsed)
    fifo.settle(state)
    detach_runstate(ram, layout)
    for cpu in layout.cpus:
        _restore_vcpu_info(ram, cpu.vcpu_info, infos[cpu.vcpu])
        if vector is not None:
            context.request_interrupt(cpu.vcpu, vector)
    domain.set_param(HVM_PARAM_CALLBACK_IRQ, state.params[HVM_PARAM_CALLBACK_IRQ])
    _advance_tsc(context, elapsed() * description.detail["tsc"][1] // 10**6)
    laps.lap("memory")
    reach("revive-vcpus")
    domain.set_context(context.to_bytes())
    laps.lap("vcpus")
    reach("revive-backends")
    with frontends.attached(state.store):
        laps.lap("backends")
        reach("revive-unpause")
        domain.unpause()
        running()
    laps.lap("unpause")
    log.info("guest %s runs after %s", description.name, laps)


@contextmanager
def _mapped(domain: Domain, gfn: int) -> Iterator[memoryview]:
    mapping = Mapping(domain.domid, [gfn], writable=True)
    try:
        yield mapping.view
    finally:
        mapping.close()


def _make_calls(
    domain: Domain, context: Context, memory: memoryview, plan: Plan, watches: WatchRequests
) -> None:
    """Make the guest's own calls and set its watches; memory is as before after it."""
    store_port = min(plan.reserved)
    rounds = [plan.calls[at : at + _ROUND] for at in range(0, len(plan.calls), _ROUND)]
    with borrowed(domain, context, memory, intel=plan.intel) as vcpu:
        pending = rounds.pop(0) if rounds else []
        asked = time.monotonic()
        while pending or not watches.done:
            if watches.pump():
                pending = [*pending, stub.send(store_port)]
            elif not pending:
                waited = time.monotonic() - asked
                if watches.answered and waited > _EVENT_BOUND:
                    log.warning("a watch of the guest did not fire when it was set")
                    break
                if waited > _STORE_BOUND:
                    raise ReviveError(
                        "xenstored has not answered the guest's watches "
                        f"(expected it to within {_STORE_BOUND} s)"
                    )
                os.sched_yield()  # xenstored is at work; it sends no event to us
                continue
            vcpu.make(pending)
            pending = rounds.pop(0) if rounds else []
            asked = time.monotonic()


class _FifoPages:
    """The guest's FIFO event pages, if it has the FIFO ABI.

    Xen goes on from what it has linked in them itself, so they are empty while the stub runs; the
    captured contents are joined with Xen's afterwards.
    """

    def __init__(self, ram: RamView, layout: LinuxLayout, pages: list[int]) -> None:
        self._ram, self._layout = ram, layout
        blocks = [cpu.control_block for cpu in layout.cpus if cpu.control_block is not None]
        self._saved = {pa: ram.read(pa, PAGE_SIZE) for pa in [*blocks, *pages]}
        for pa in self._saved:
            ram.write(pa, bytes(PAGE_SIZE))

    def settle(self, state: MachineState) -> None:
        """Put the captured events back, each of them pending."""
        if self._layout.fifo is None:
            return
        live = {pa: self._ram.read(pa, PAGE_SIZE) for pa in self._saved}
        for pa, content in self._saved.items():
            self._ram.write(pa, content)
        raised: dict[int, list[int]] = {cpu.vcpu: [] for cpu in self._layout.cpus}
        for event in state.events:
            if event.vcpu not in raised:
                raise ReviveError(
                    f"event channel {event.port} notifies vCPU {event.vcpu} (expected one that was "
                    "up when protection began)"
                )
            raised[event.vcpu].append(event.port)
        settle_fifo(self._ram, self._layout, live, raised)


def _place_frames(
    domain: Domain, layout: LinuxLayout, state: MachineState, memory: memoryview
) -> None:
    """Put shared_info and the grant table where the guest has them, with their contents."""
    gfn = layout.shared_info // PAGE_SIZE
    content = bytes(memory[gfn * PAGE_SIZE : (gfn + 1) * PAGE_SIZE])
    domain.add_to_physmap(XENMAPSPACE_SHARED_INFO, 0, gfn)
    pending = 0
    for event in state.events:
        pending |= 1 << event.port
    with _mapped(domain, gfn) as page:
        page[_MASK_AT : _MASK_AT + _BITS] = content[_MASK_AT : _MASK_AT + _BITS]
        page[_PENDING_AT : _PENDING_AT + _BITS] = pending.to_bytes(_BITS, "little")
    for index, frame in enumerate(layout.grants.gfns[: len(state.grants)]):
        domain.add_to_physmap(XENMAPSPACE_GRANT_TABLE, index, frame)
    grants = GrantFrames(domain.domid, len(state.grants), writable=True)
    try:
        content = rings.unused_grants(b"".join(state.grants))
        # Entries 0 and 1 are the toolstack's, for the console and xenstore of this host.
        kept = 2 * rings.GRANT.size
        grants.view[kept : len(content)] = content[kept:]
    finally:
        grants.close()


def _restore_vcpu_info(ram: RamView, address: int, captured: bytes) -> None:
    """Give a vCPU its event state back, with every event pending.

    An event that was lost between the hosts is thereby raised again.  The time stays as this
    host's Xen wrote it, but for its version: it goes on from the captured one, so that a vCPU
    that was paused while it read the old time sees a change and reads again.
    """
    info = bytearray(captured[:_TIME_AT])
    info[0] = 1
    info[8:16] = b"\xff" * 8
    ram.write(address, bytes(info))
    (version,) = struct.unpack_from("<I", captured, _TIME_AT)
    ram.write(address + _TIME_AT, struct.pack("<I", (version + 2) & 0xFFFFFFFE))


def _advance_tsc(context: Context, ticks: int) -> None:
    for vcpu in context.vcpus():
        context.set_tsc(vcpu, context.vcpu(vcpu).tsc + ticks)


def _system_time(info: bytes, tsc: int) -> int:
    """Xen's system time in the guest at ``tsc``, ns (struct vcpu_time_info, xen.h)."""
    _version, _pad, stamp, system, multiplier, shift, _flags = _TIME.unpack_from(info, _TIME_AT)
    delta = tsc - stamp
    delta = delta << shift if shift >= 0 else delta >> -shift
    return int(system + (delta * multiplier >> 32))


def _shift(
    domain: Domain,
    layout: LinuxLayout,
    ram: RamView,
    captured: tuple[bytes, int],
    elapsed: Callable[[], int],
) -> None:
    """Make the guest's clocks continue although this host's Xen counts from another start.

    When the stub ran, Xen wrote this host's time into vCPU 0's vcpu_info.

    :param captured: vCPU 0's vcpu_info and time-stamp counter at the capture
    :param elapsed: time since the capture, ns
    """
    tsc_here = Context(domain.get_context()).vcpu(0).tsc
    here = _system_time(ram.read(layout.cpus[0].vcpu_info, _VCPU_INFO_SIZE), tsc_here)
    continued = _system_time(*captured) + elapsed()
    shift_clock(ram, layout, here - continued)
    log.info(
        "the guest's clock moves from %d to %d ms of system time", continued // 10**6, here // 10**6
    )
