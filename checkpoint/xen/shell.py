# SPDX-License-Identifier: Apache-2.0
"""The shell on a Xen standby: the guest's paused, empty twin, and its revival."""

from __future__ import annotations

import copy
import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from checkpoint.driver import Description, Disk, Nic, nothing
from checkpoint.errors import CheckpointError
from checkpoint.guest.layout import LinuxLayout
from checkpoint.guest.memory import RamView
from checkpoint.xen import control, toolstack
from checkpoint.xen.borrowed import rehearse
from checkpoint.xen.context import Context
from checkpoint.xen.control import HVM_PARAM_CONSOLE_EVTCHN, HVM_PARAM_STORE_EVTCHN, Domain
from checkpoint.xen.frontends import Frontends
from checkpoint.xen.mapping import MMIO_HOLE, Mapping, map_ram
from checkpoint.xen.plan import Plan, check_state, make_plan
from checkpoint.xen.revive import revive
from checkpoint.xen.state import MachineState
from checkpoint.xen.stream import shell_stream

log = logging.getLogger(__name__)

#: name of a shell: the guest's own and this, as ``xl migrate`` marks an incoming guest
SUFFIX = "--kemari"
#: clocks within this of each other are the same to NTP, which corrects up to 500 ppm
_CLOCK_TOLERANCE = 250e-6
#: pages that Xen needs for a domain beside its RAM, measured: 1.5 MiB and 1/128 of its RAM
_OVERHEAD_PAGES, _OVERHEAD_SHARE = 2048, 64


class XenShell:
    """Implements :class:`checkpoint.driver.Shell` on Xen."""

    def __init__(
        self, description: Description, domain: Domain, nics: list[Nic], frontends: Frontends
    ) -> None:
        self.nics = nics
        self.disks = [Disk(**disk) for disk in description.detail["disks"]]
        self._description = description
        self._domain = domain
        self._frontends = frontends
        self._gone = False
        #: held while the memory is read for a plan, while that is carried out, and at the end
        self._planning = threading.Lock()
        self._plan: tuple[bytes, Plan] | None = None
        #: the guest runs from it, or it is of no more use: nothing may be prepared any more
        self._over = False
        self._ram = map_ram(domain.domid, description.pages, writable=True)
        missing = set(self._ram.holes).difference(description.detail["holes"], MMIO_HOLE)
        if missing:
            self._ram.close()
            raise CheckpointError(
                f"the shell has no memory at frame {min(missing):#x} (expected some, as the guest "
                "has)"
            )
        self.memory = self._ram.view

    @property
    def domid(self) -> int:
        """Number of the shell domain: the guest's own."""
        return self._domain.domid

    def examine(self, state: bytes) -> None:
        layout = LinuxLayout.from_json(self._description.detail["layout"])
        check_state(self._domain, self._description, layout, MachineState.from_bytes(state))

    def foresee(self, state: bytes) -> None:
        with self._planning:
            if self._over:
                return
            made = self._make_plan(state)
            self._frontends.describe(made.state.store)
            self._plan = (state, made)

    def revive(self, state: bytes, elapsed_ns: int, running: Callable[[], None] = nothing) -> None:
        began = time.monotonic_ns()
        with self._planning:
            self._over = True
            foreseen, made = self._plan or (None, None)
            # The very same: of two epochs of which the states are equal the memory may differ.
            if made is None or foreseen is not state:
                made = self._make_plan(state)
            elapsed_ns += time.monotonic_ns() - began
            revive(
                self._domain,
                self._description,
                made,
                self.memory,
                self._frontends,
                elapsed_ns,
                running,
            )

    def _make_plan(self, state: bytes) -> Plan:
        return make_plan(self._domain, self._description, state, RamView(self.memory))

    def settle(self) -> None:
        self.release_memory()
        toolstack.rename(self._domain.domid, self._description.name)

    def destroy(self) -> None:
        if not self._gone:
            self.release_memory()
            toolstack.destroy(self._domain.domid)
            self._gone = True

    def release_memory(self) -> None:
        """Unmap it; the shell is of no more use to this object (idempotent)."""
        with self._planning:
            self._over = True
            self._plan = None
            self._ram.close()


def create(description: Description) -> XenShell:
    """Build the shell for ``description`` through the toolstack.

    :raise CheckpointError: not enough memory, name or number taken, toolstack failure
    """
    detail: dict[str, Any] = description.detail
    end, holes = description.pages, {*detail["holes"], *MMIO_HOLE}
    pages = end - sum(gfn < end for gfn in holes)
    needed = pages + pages // _OVERHEAD_SHARE + _OVERHEAD_PAGES
    free = control.free_pages()
    if needed > free:
        raise CheckpointError(
            f"the standby has {free // 256} MiB of free memory (expected {needed // 256} MiB)"
        )
    domain = Domain(description.domid)
    if domain.info() is not None:
        raise CheckpointError(
            f"domain number {description.domid} is in use on the standby (expected to be free: a "
            'guest remembers its own; domid_policy="random" in xl.conf draws different ones)'
        )
    config = copy.deepcopy(detail["config"])
    config["c_info"]["name"] = description.name + SUFFIX
    config["c_info"]["domid"] = description.domid
    static = {int(gfn): bytes.fromhex(page) for gfn, page in detail["static"].items()}
    major, minor = (int(part) for part in detail["xen"].split("."))
    toolstack.restore_paused(
        shell_stream(
            config,
            xen=(major, minor),
            gfns=itertools.chain(
                (gfn for gfn in range(min(end, MMIO_HOLE.start)) if gfn not in holes),
                sorted([*static, *detail["special"]]),
                (gfn for gfn in range(MMIO_HOLE.stop, end) if gfn not in holes),
            ),
            cpuid=bytes.fromhex(detail["cpuid"]),
            msrs=bytes.fromhex(detail["msrs"]),
            params={int(key): value for key, value in detail["params"].items()},
            context=Context(bytes.fromhex(detail["context"])).only_boot_vcpu(),
            tsc=_tsc(detail),
        )
    )
    nics = [
        Nic(nic["devid"], f"vif{description.domid}.{nic['devid']}", nic["mac"], nic["bridge"])
        for nic in detail["nics"]
    ]
    try:
        _check_ports(domain, detail["ports"])
        _write_static(description.domid, static)
        frontends = Frontends(description.domid)
        frontends.describe(detail.get("store", {}))
        made = XenShell(description, domain, nics, frontends)
    except BaseException:
        _discard(domain)
        raise
    try:
        rehearse(domain, made.memory, detail["ports"][0])
    except BaseException:
        made.release_memory()
        _discard(domain)
        raise
    return made


def _discard(domain: Domain) -> None:
    """Remove a shell that is of no use; why it is of none is what the administrator has to know."""
    if domain.info() is None:
        return
    try:
        toolstack.destroy(domain.domid)
    except CheckpointError as error:
        log.warning("the shell, domain %d, was not removed: %s", domain.domid, error)


def _check_ports(domain: Domain, expected: list[int]) -> None:
    # A guest knows its event channels by number, and nothing can move these two.
    made = [
        domain.get_param(HVM_PARAM_STORE_EVTCHN),
        domain.get_param(HVM_PARAM_CONSOLE_EVTCHN),
    ]
    if made != expected:
        raise CheckpointError(
            f"the toolstack made the event channels {made} for xenstore and console (expected "
            f"{expected}, as the guest has)"
        )


def _write_static(domid: int, static: dict[int, bytes]) -> None:
    pages = Mapping(domid, list(static), writable=True)
    try:
        for index, content in enumerate(static.values()):
            pages.page(index)[:] = content
    finally:
        pages.close()


def _tsc(detail: dict[str, Any]) -> tuple[int, int, int, int] | None:
    """The guest's clock frequency, if this host's differs so much that Xen must emulate it."""
    mode, khz, nsec, incarnation = detail["tsc"]
    if abs(control.host_khz() - khz) <= khz * _CLOCK_TOLERANCE:
        return None
    log.warning(
        "this host counts %d kHz, the guest's clock %d kHz: Xen will emulate the difference",
        control.host_khz(), khz,
    )  # fmt: skip
    return mode, khz, nsec, incarnation
