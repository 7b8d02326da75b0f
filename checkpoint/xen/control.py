# SPDX-License-Identifier: Apache-2.0
"""One domain through libxenctrl: pause, vCPU context, parameters, clocks, grant and event tables.

Every method is one library call or hypercall unless it says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from checkpoint.driver import PAGE_SIZE
from checkpoint.errors import HypervisorError
from checkpoint.xen.libs import Libraries, check, ffi, libraries, lowlevel_xc

#: xen/include/public/hvm/params.h
HVM_PARAM_CALLBACK_IRQ = 0
HVM_PARAM_STORE_PFN = 1
HVM_PARAM_STORE_EVTCHN = 2
HVM_PARAM_CONSOLE_PFN = 17
HVM_PARAM_CONSOLE_EVTCHN = 18

#: xen/include/public/memory.h
XENMAPSPACE_SHARED_INFO = 0
XENMAPSPACE_GRANT_TABLE = 1

#: xen/include/public/domctl.h, XEN_DOMINF_*
_DYING, _HVM, _SHUTDOWN, _PAUSED, _HAP = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 8
#: there, where the guest's reason for its shutdown is; SHUTDOWN_suspend of sched.h
_REASON_SHIFT, _REASON_MASK, _SUSPEND = 16, 0xFF, 2


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """What ``xc_domain_getinfolist`` says of a domain, as far as used here.

    :ivar suspended: it has shut down to be saved (``xl save``), and may be resumed
    """

    domid: int
    dying: bool
    hvm: bool
    shutdown: bool
    suspended: bool
    paused: bool
    hap: bool
    pages: int
    shared_info_gfn: int
    vcpus: int


@dataclass(frozen=True, slots=True)
class TscInfo:
    """A domain's time-stamp counter: arguments of ``xc_domain_set_tsc_info``.

    :ivar khz: the frequency that the guest was told, kHz
    """

    mode: int
    nsec: int
    khz: int
    incarnation: int


class Domain:
    """A domain of this host by its number."""

    def __init__(self, domid: int, libs: Libraries | None = None) -> None:
        self.domid = domid
        self.libs = libs or libraries()
        self._xc: Any = self.libs.xc
        self._xch: Any = self.libs.xch

    def info(self) -> DomainInfo | None:
        """The domain's state, or None when no domain of this number exists."""
        raw: Any = ffi.new("xc_domaininfo_t *")
        found = check(
            self._xc.xc_domain_getinfolist(self._xch, self.domid, 1, raw), "xc_domain_getinfolist"
        )
        if found < 1 or raw.domain != self.domid:
            return None
        flags = raw.flags
        return DomainInfo(
            domid=self.domid,
            dying=bool(flags & _DYING),
            hvm=bool(flags & _HVM),
            shutdown=bool(flags & _SHUTDOWN),
            suspended=bool(flags & _SHUTDOWN) and flags >> _REASON_SHIFT & _REASON_MASK == _SUSPEND,
            paused=bool(flags & _PAUSED),
            hap=bool(flags & _HAP),
            pages=raw.tot_pages,
            shared_info_gfn=raw.shared_info_frame,
            vcpus=raw.max_vcpu_id + 1,
        )

    def pause(self) -> None:
        """Stop every vCPU; returns when none runs.  Pauses nest in Xen's counter."""
        check(self._xc.xc_domain_pause(self._xch, self.domid), "xc_domain_pause")

    def unpause(self) -> None:
        """Undo one :meth:`pause`."""
        check(self._xc.xc_domain_unpause(self._xch, self.domid), "xc_domain_unpause")

    def destroy(self) -> None:
        """Destroy the domain in Xen; the toolstack's leftovers are not its matter."""
        check(self._xc.xc_domain_destroy(self._xch, self.domid), "xc_domain_destroy")

    def max_gfn(self) -> int:
        """The highest guest frame number ever mapped."""
        out = ffi.new("xen_pfn_t *")
        check(self._xc.xc_domain_maximum_gpfn(self._xch, self.domid, out), "xc_domain_maximum_gpfn")
        return int(out[0])

    def context_size(self) -> int:
        """Bytes that the domain's save records can have; depends only on its configuration."""
        return check(
            self._xc.xc_domain_hvm_getcontext(self._xch, self.domid, ffi.NULL, 0),
            "xc_domain_hvm_getcontext",
            "size",
        )

    def get_context(self) -> bytes:
        """The HVM save records of vCPUs and platform devices (``hvm/save.h``); two calls.

        :class:`checkpoint.xen.moment.Moment` does it for checkpoints.
        """
        size = self.context_size()
        buffer = ffi.new("uint8_t[]", size)
        used = check(
            self._xc.xc_domain_hvm_getcontext(self._xch, self.domid, buffer, size),
            "xc_domain_hvm_getcontext",
        )
        return bytes(ffi.buffer(buffer, used))

    def set_context(self, context: bytes) -> None:
        """Load HVM save records; vCPUs with a CPU record come up."""
        buf = ffi.new("uint8_t[]", context)
        check(
            self._xc.xc_domain_hvm_setcontext(self._xch, self.domid, buf, len(context)),
            "xc_domain_hvm_setcontext",
        )

    def get_param(self, param: int) -> int:
        """HVM parameter ``param`` (``hvm/params.h``)."""
        out = ffi.new("uint64_t *")
        check(
            self._xc.xc_hvm_param_get(self._xch, self.domid, param, out),
            "xc_hvm_param_get",
            f"parameter {param}",
        )
        return int(out[0])

    def set_param(self, param: int, value: int) -> None:
        """Set HVM parameter ``param``."""
        check(
            self._xc.xc_hvm_param_set(self._xch, self.domid, param, value),
            "xc_hvm_param_set",
            f"parameter {param}",
        )

    def add_to_physmap(self, space: int, index: int, gfn: int) -> None:
        """Place a page of Xen's (shared info, grant table) at guest frame ``gfn``."""
        check(
            self._xc.xc_domain_add_to_physmap(self._xch, self.domid, space, index, gfn),
            "xc_domain_add_to_physmap",
            f"space {space} index {index}",
        )

    def tsc_info(self) -> TscInfo:
        """How the guest sees the time-stamp counter."""
        mode, khz, inc = ffi.new("uint32_t *"), ffi.new("uint32_t *"), ffi.new("uint32_t *")
        nsec = ffi.new("uint64_t *")
        check(
            self._xc.xc_domain_get_tsc_info(self._xch, self.domid, mode, nsec, khz, inc),
            "xc_domain_get_tsc_info",
        )
        return TscInfo(mode[0], nsec[0], khz[0], inc[0])

    def cpu_policy(self) -> tuple[bytes, bytes]:
        """The CPUID leaves and MSRs that the guest was given.

        :return: arrays of ``xen_cpuid_leaf_t`` and ``xen_msr_entry_t``, as in the migration stream
        """
        guest = self.libs.guest
        leaves, msrs = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        check(guest.xc_cpu_policy_get_size(self._xch, leaves, msrs), "xc_cpu_policy_get_size")
        leaf_buf = ffi.new("xen_cpuid_leaf_t[]", leaves[0])
        msr_buf = ffi.new("xen_msr_entry_t[]", msrs[0])
        policy = guest.xc_cpu_policy_init()
        if policy == ffi.NULL:
            raise HypervisorError("xc_cpu_policy_init", ffi.errno)
        try:
            check(
                guest.xc_cpu_policy_get_domain(self._xch, self.domid, policy),
                "xc_cpu_policy_get_domain",
            )
            check(
                guest.xc_cpu_policy_serialise(self._xch, policy, leaf_buf, leaves, msr_buf, msrs),
                "xc_cpu_policy_serialise",
            )
        finally:
            guest.xc_cpu_policy_destroy(policy)
        return (
            bytes(ffi.buffer(leaf_buf, leaves[0] * ffi.sizeof("xen_cpuid_leaf_t"))),
            bytes(ffi.buffer(msr_buf, msrs[0] * ffi.sizeof("xen_msr_entry_t"))),
        )


def host_khz() -> int:
    """Frequency of this host's time-stamp counter as Xen calibrated it, kHz."""
    return int(lowlevel_xc().physinfo()["cpu_khz"])


def free_pages() -> int:
    """Pages that Xen could give to a new domain now (free and waiting to be scrubbed)."""
    info = lowlevel_xc().physinfo()
    return int(info["free_memory"] + info["scrub_memory"]) * 1024 // PAGE_SIZE


def list_domids() -> list[int]:
    """Numbers of all domains but Dom0 that are not dying."""
    libs = libraries()
    found: list[int] = []
    batch: Any = ffi.new("xc_domaininfo_t *")
    first = 1
    while check(libs.xc.xc_domain_getinfolist(libs.xch, first, 1, batch), "xc_domain_getinfolist"):
        if not batch.flags & _DYING:
            found.append(batch.domain)
        first = batch.domain + 1
    return found
