# SPDX-License-Identifier: Apache-2.0
"""This host's Xen: finding guests, checking what protection needs, building shells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoint.driver import PAGE_SIZE, Description, Disk, Nic
from checkpoint.errors import CheckpointError, UnsupportedGuest
from checkpoint.guest.layout import LinuxLayout
from checkpoint.guest.linux import Registers, read_layout
from checkpoint.xen import control, shell, toolstack
from checkpoint.xen.context import Context
from checkpoint.xen.control import (
    HVM_PARAM_CONSOLE_EVTCHN,
    HVM_PARAM_CONSOLE_PFN,
    HVM_PARAM_STORE_EVTCHN,
    HVM_PARAM_STORE_PFN,
    Domain,
)
from checkpoint.xen.dirty import DirtyLog, left_behind, switch_off
from checkpoint.xen.frontends import revived_node
from checkpoint.xen.libs import libraries
from checkpoint.xen.mapping import MMIO_HOLE, Mapping, PresentRam, end_of_ram, map_ram
from checkpoint.xen.source import XenSource
from checkpoint.xen.store import Store
from checkpoint.xen.versions import RELEASES

#: parameters that libxc's own save path carries (hvm/params.h): store, ioreq pages, rings, VM86
#: TSS, console, ACPI, Viridian, identity page table, generation id, ioreq servers, FIP width, MCA
_CARRIED_PARAMS = (1, 5, 6, 27, 28, 29, 37, 17, 19, 9, 12, 34, 32, 33, 36, 38)

#: where the domain builder puts what is not RAM: ACPI tables (libxl_x86_acpi.c) up to the special
#: pages (xg_dom_x86.c)
_BUILDER = range(MMIO_HOLE.start, 0xFF000)
#: pages that it puts there at most; measured: 12
_BUILDER_PAGES = 256


#: the hotplug script of disks whose writes are replicated (dom0-tools)
DISK_SCRIPT = "block-kemari"


class XenHost:
    """Implements :class:`checkpoint.driver.Hypervisor` on Xen."""

    name = "xen"

    def __init__(self) -> None:
        """:raise UnsupportedGuest: not a Dom0 of a supported Xen"""
        self.release = libraries().release
        self._sources: dict[int, XenSource] = {}

    # ---- Section: domains ----

    def domains(self) -> list[tuple[int, str]]:
        store = Store()
        try:
            return [(domid, _name(store, domid)) for domid in control.list_domids()]
        finally:
            store.close()

    def domain_exists(self, name: str) -> bool:
        return any(found == name for _domid, found in self.domains())

    def domain_uuid(self, name: str) -> str:
        store = Store()
        try:
            return _vm(store, name)[1].rpartition("/")[2]
        finally:
            store.close()

    def incarnation(self, name: str) -> str:
        store = Store()
        try:
            domid, path = _vm(store, name)
            # The number alone may come again: Xen does not count the numbers that it was given
            # (xen/common/domctl.c, XEN_DOMCTL_createdomain), as for a shell.
            began = store.read(f"{path}/start_time") if path else None
            return f"{domid} since {began}" if began else ""
        finally:
            store.close()

    def recover(self, name: str) -> None:
        for domid, found in self.domains():
            if found == name:
                domain = Domain(domid)
                info = domain.info()
                paused = info is not None and info.paused
                # A daemon that was killed before it could set its mark has left the guest paused.
                if paused or left_behind(domid):
                    switch_off(domid)
                if paused:
                    domain.unpause()

    def settle(self, name: str) -> bool:
        store = Store()
        try:
            for domid in control.list_domids():
                if _name(store, domid) == name != _toolstack_name(store, domid):
                    toolstack.rename(domid, name)
                    return True
        finally:
            store.close()
        return False

    def destroy_domain(self, name: str) -> None:
        toolstack.destroy(self._resolve(name))

    def destroy_shell(self, name: str) -> bool:
        for domid, found in self.domains():
            if found == name + shell.SUFFIX:
                toolstack.destroy(domid)
                return True
        return False

    def create_shell(self, description: Description) -> shell.XenShell:
        if description.driver != self.name:
            raise CheckpointError(
                f"the primary runs the driver {description.driver!r} (expected {self.name!r})"
            )
        theirs = str(description.detail.get("xen"))
        if theirs not in RELEASES or _order(theirs) > _order(self.release.name):
            raise CheckpointError(
                f"the primary runs Xen {theirs} (expected {self.release.name} or an older one: no "
                "Xen takes over a guest from a newer one)"
            )
        if self.domain_exists(description.name):
            raise CheckpointError(
                f"a domain named {description.name!r} exists on the standby (expected none)"
            )
        return shell.create(description)

    def _resolve(self, domain: str) -> int:
        for domid, name in self.domains():
            if domain in (name, str(domid)):
                return domid
        raise UnsupportedGuest(f"no domain {domain!r} on this host (expected a running guest)")

    # ---- Section: preconditions ----

    def open_source(self, domain: str) -> XenSource:
        domid = self._resolve(domain)
        known = self._sources.get(domid)
        if known is not None and known.tracking:
            # The checks below would take its dirty log away, and nobody would notice.
            raise CheckpointError(f"domain {domain!r} is protected (expected one that is not)")
        handle = Domain(domid)
        info = handle.info()
        if info is None or info.dying or info.shutdown:
            raise UnsupportedGuest(f"domain {domain!r} is not running (expected a running guest)")
        config = toolstack.configuration(domid)
        _check_type(domain, config, info)
        pages = _ram_pages(config)
        store = Store()
        try:
            name = _name(store, domid)
            nics = _nics(store, domid)
            disks = _disks(store, domid)
            nodes = store.tree(f"/local/domain/{domid}")
        finally:
            store.close()
        _check_devices(name, config)
        _check_dirty_log(domid, pages)
        detail, layout, special = self._describe(handle, config, pages)
        detail["nics"] = [
            {"devid": nic.devid, "mac": nic.mac, "bridge": nic.bridge} for nic in nics
        ]
        detail["disks"] = [asdict(disk) for disk in disks]
        # What is the same when the guest fails over need not be written then.
        detail["store"] = nodes
        description = Description(
            name=name,
            uuid=str(config["c_info"]["uuid"]),
            domid=domid,
            vcpus=info.vcpus,
            pages=pages,
            driver=self.name,
            detail=detail,
        )
        source = XenSource(handle, description, nics, disks, layout, special)
        self._sources[domid] = source
        return source

    def _describe(
        self, handle: Domain, config: dict[str, Any], pages: int
    ) -> tuple[dict[str, Any], LinuxLayout, list[int]]:
        handle.pause()
        try:
            raw = handle.get_context()
        finally:
            handle.unpause()
        context = Context(raw)
        ram = map_ram(handle.domid, pages)
        try:
            vcpus = [context.vcpu(number) for number in context.vcpus()]
            layout = read_layout(
                PresentRam(ram), [Registers(vcpu.cr3, vcpu.cr4, vcpu.lstar) for vcpu in vcpus]
            )
            _check_kernel(layout)
            holes = [gfn for gfn in ram.holes if gfn not in MMIO_HOLE]
        finally:
            ram.close()
        named = [handle.get_param(HVM_PARAM_STORE_PFN), handle.get_param(HVM_PARAM_CONSOLE_PFN)]
        outside = Mapping(handle.domid, _BUILDER, allow_holes=True)
        try:
            absent = set(outside.holes)
            static = {
                gfn: outside.page(index).hex()
                for index, gfn in enumerate(_BUILDER)
                if index not in absent and gfn not in named
            }
        finally:
            outside.close()
        if len(static) > _BUILDER_PAGES:
            raise UnsupportedGuest(
                f"the guest has {len(static)} pages from frame {_BUILDER.start:#x} on (expected "
                f"its memory to end there, or to go on from frame {MMIO_HOLE.stop:#x} on)"
            )
        cpuid, msrs = handle.cpu_policy()
        tsc = handle.tsc_info()
        detail = {
            "xen": self.release.name,
            "config": config,
            "cpuid": cpuid.hex(),
            "msrs": msrs.hex(),
            "context": raw.hex(),
            "params": {
                str(param): value for param in _CARRIED_PARAMS if (value := handle.get_param(param))
            },
            "ports": [
                handle.get_param(HVM_PARAM_STORE_EVTCHN),
                handle.get_param(HVM_PARAM_CONSOLE_EVTCHN),
            ],
            "tsc": [tsc.mode, tsc.khz, tsc.nsec, tsc.incarnation],
            "holes": holes,
            # shared with xenstored and xenconsoled
            "special": named,
            # ACPI tables, identity page table: written once, by the domain builder
            "static": {str(gfn): page for gfn, page in static.items()},
            "layout": layout.to_json(),
        }
        return detail, layout, named


def _name(store: Store, domid: int) -> str:
    """A domain's name; a shell that was revived counts as the guest, renamed already or not."""
    name = _toolstack_name(store, domid)
    if name.endswith(shell.SUFFIX) and store.read(revived_node(domid)) is not None:
        return name.removesuffix(shell.SUFFIX)
    return name


def _vm(store: Store, name: str) -> tuple[int, str]:
    """(number, "/vm/UUID") of the domain of that name (libxl_create.c); "" if there is none."""
    for domid in control.list_domids():
        if _name(store, domid) == name:
            return domid, store.read(f"/local/domain/{domid}/vm") or ""
    return 0, ""


def _toolstack_name(store: Store, domid: int) -> str:
    return store.read(f"/local/domain/{domid}/name") or ""


def _order(release: str) -> list[int]:
    return [int(part) for part in release.split(".")]


def _check_type(domain: str, config: dict[str, Any], info: control.DomainInfo) -> None:
    kind = config["c_info"].get("type", "pv")
    if kind != "pvh":
        reason = (
            "a PV guest has no dirty log in Xen without shadow paging"
            if kind == "pv"
            else "the state of emulated devices is not captured"
        )
        raise UnsupportedGuest(
            f"domain {domain!r} is a {kind.upper()} guest (expected PVH): {reason}"
        )
    if not info.hap:
        raise UnsupportedGuest(
            f"domain {domain!r} runs without hardware-assisted paging (expected it on)"
        )


def _check_devices(name: str, config: dict[str, Any]) -> None:
    refused = {
        "pcidevs": "a passed-through PCI device",
        "dtdevs": "a passed-through device",
        "vtpms": "a virtual TPM",
        "usbdevs": "a USB device",
        "p9s": "a 9p file system",
        "vfbs": "a virtual framebuffer",
        "vkbs": "a virtual keyboard",
        "vsnds": "a virtual sound card",
        "pvcallsifs": "a PV Calls socket device",
        "channels": "a console channel",
    }
    for key, what in refused.items():
        if config.get(key):
            raise UnsupportedGuest(
                f"domain {name!r} has {what} (expected network devices and disks only)"
            )
    for disk in config.get("disks") or ():
        # Nobody else would carry its writes to the standby.
        if Path(str(disk.get("script") or "")).name != DISK_SCRIPT:
            raise UnsupportedGuest(
                f"disk {disk.get('vdev')} of domain {name!r} is not replicated (expected "
                f"script={DISK_SCRIPT} in its configuration)"
            )


def _check_kernel(layout: LinuxLayout) -> None:
    if layout.grants.version != 1:
        raise UnsupportedGuest(
            f"the guest uses grant table version {layout.grants.version} (expected 1)"
        )


def _check_dirty_log(domid: int, pages: int) -> None:
    log = DirtyLog(domid, pages)
    try:
        log.enable()
    finally:
        log.close()


def _ram_pages(config: dict[str, Any]) -> int:
    """Frames from 0 to the end of RAM.

    A PVH guest's RAM begins at 0, and has a hole below 4 GiB if it reaches that far; what lies in
    there and above is placed by the domain builder or by the guest itself (grant table, frames for
    ballooning) and is handled by name.
    """
    memory = config["b_info"]
    most = int(memory["max_memkb"])
    now = int(memory.get("target_memkb", most))
    if now < most:
        # Frames that Xen would yet populate on demand: to map them all can crash the guest.
        raise UnsupportedGuest(
            f"the guest has {now} KiB of memory and could have {most} KiB (expected memory and "
            "maxmem to be the same)"
        )
    return end_of_ram(most * 1024 // PAGE_SIZE)


def _backends(store: Store, domid: int, device: str) -> Iterator[tuple[int, str]]:
    """(device number, path of its backend) of each device of a kind.

    :raise UnsupportedGuest: a backend is not in Dom0
    """
    base = f"/local/domain/{domid}/device/{device}"
    for devid in sorted(store.children(base), key=int):
        backend = store.read(f"{base}/{devid}/backend") or ""
        if not backend.startswith("/local/domain/0/"):
            raise UnsupportedGuest(
                f"device {device} {devid} has its backend in another domain (expected Dom0)"
            )
        yield int(devid), backend


def _nics(store: Store, domid: int) -> list[Nic]:
    return [
        Nic(
            devid=devid,
            vif=store.read(f"{backend}/vifname") or f"vif{domid}.{devid}",
            mac=store.read(f"{backend}/mac") or "",
            bridge=store.read(f"{backend}/bridge") or "",
        )
        for devid, backend in _backends(store, domid, "vif")
    ]


def _disks(store: Store, domid: int) -> list[Disk]:
    # Nodes of the backend: libxl_disk.c, docs/misc/xenstore-paths.pandoc
    # The word before a target is block-kemari's own.
    return [
        Disk(
            devid=devid,
            vdev=store.read(f"{backend}/dev") or "",
            target=(params := store.read(f"{backend}/params") or "").removeprefix("shared:"),
            writable=store.read(f"{backend}/mode") != "r",
            shared=params.startswith("shared:"),
        )
        for devid, backend in _backends(store, domid, "vbd")
    ]
