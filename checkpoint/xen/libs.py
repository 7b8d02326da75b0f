# SPDX-License-Identifier: Apache-2.0
"""Xen's own libraries, loaded at run time through cffi (ABI mode).

The declarations follow ``xenctrl.h``, ``xenforeignmemory.h``, ``xencall.h`` and
``xendevicemodel.h`` of Xen 4.17 to 4.20.  The libraries are LGPL; they are loaded from the host,
nothing of them is copied here.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import cffi

from checkpoint.errors import HypervisorError, UnsupportedGuest
from checkpoint.xen.versions import Release, running_release

_DECLARATIONS = """
typedef uint64_t xen_pfn_t;
typedef struct xc_interface_core xc_interface;
typedef struct xenforeignmemory_handle xenforeignmemory_handle;
typedef struct xenforeignmemory_resource_handle xenforeignmemory_resource_handle;
typedef struct xencall_handle xencall_handle;
typedef struct xendevicemodel_handle xendevicemodel_handle;
typedef struct xc_cpu_policy xc_cpu_policy_t;
typedef struct { uint32_t leaf, subleaf, a, b, c, d; } xen_cpuid_leaf_t;
typedef struct { uint32_t idx, flags; uint64_t val; } xen_msr_entry_t;

typedef struct xc_hypercall_buffer {
    void *hbuf;
    struct xc_hypercall_buffer *param_shadow;
    int dir;
    void *ubuf;
    size_t sz;
} xc_hypercall_buffer_t;

/* struct xen_domctl_getdomaininfo: the head is the same in 4.17 to 4.20, the rest is room */
typedef struct {
    uint16_t domain, pad1;
    uint32_t flags;
    uint64_t tot_pages, max_pages, outstanding_pages, shr_pages, paged_pages;
    uint64_t shared_info_frame;
    uint64_t cpu_time;
    uint32_t nr_online_vcpus;
    uint32_t max_vcpu_id;
    uint8_t rest[256];
} xc_domaininfo_t;

xc_interface *xc_interface_open(void *logger, void *dombuild_logger, unsigned open_flags);
int xc_interface_close(xc_interface *xch);
int xc_domain_pause(xc_interface *xch, uint32_t domid);
int xc_domain_unpause(xc_interface *xch, uint32_t domid);
int xc_domain_destroy(xc_interface *xch, uint32_t domid);
int xc_domain_getinfolist(xc_interface *xch, uint32_t first, unsigned int max,
                          xc_domaininfo_t *info);
int xc_domain_maximum_gpfn(xc_interface *xch, uint32_t domid, xen_pfn_t *gpfns);
int xc_domain_hvm_getcontext(xc_interface *xch, uint32_t domid, uint8_t *buf, uint32_t size);
int xc_domain_hvm_setcontext(xc_interface *xch, uint32_t domid, uint8_t *buf, uint32_t size);
int xc_hvm_param_set(xc_interface *xch, uint32_t dom, uint32_t param, uint64_t value);
int xc_hvm_param_get(xc_interface *xch, uint32_t dom, uint32_t param, uint64_t *value);
int xc_domain_add_to_physmap(xc_interface *xch, uint32_t domid, unsigned int space,
                             unsigned long idx, xen_pfn_t gpfn);
int xc_domain_get_tsc_info(xc_interface *xch, uint32_t domid, uint32_t *mode, uint64_t *nsec,
                           uint32_t *khz, uint32_t *incarnation);
long long xc_logdirty_control(xc_interface *xch, uint32_t domid, unsigned int sop,
                              xc_hypercall_buffer_t *bitmap, unsigned long pages,
                              unsigned int mode, void *stats);
void *xc__hypercall_buffer_alloc_pages(xc_interface *xch, xc_hypercall_buffer_t *b, int nr);
void xc__hypercall_buffer_free_pages(xc_interface *xch, xc_hypercall_buffer_t *b, int nr);
int xc_cpu_policy_get_size(xc_interface *xch, uint32_t *nr_leaves, uint32_t *nr_msrs);
xc_cpu_policy_t *xc_cpu_policy_init(void);
void xc_cpu_policy_destroy(xc_cpu_policy_t *policy);
int xc_cpu_policy_get_domain(xc_interface *xch, uint32_t domid, xc_cpu_policy_t *policy);
int xc_cpu_policy_serialise(xc_interface *xch, const xc_cpu_policy_t *policy,
                            xen_cpuid_leaf_t *leaves, uint32_t *nr_leaves,
                            xen_msr_entry_t *msrs, uint32_t *nr_msrs);

xenforeignmemory_handle *xenforeignmemory_open(void *logger, unsigned open_flags);
int xenforeignmemory_close(xenforeignmemory_handle *fmem);
void *xenforeignmemory_map(xenforeignmemory_handle *fmem, uint32_t dom, int prot, size_t pages,
                           const xen_pfn_t arr[], int err[]);
void *xenforeignmemory_map2(xenforeignmemory_handle *fmem, uint32_t dom, void *addr, int prot,
                            int flags, size_t pages, const xen_pfn_t arr[], int err[]);
int xenforeignmemory_unmap(xenforeignmemory_handle *fmem, void *addr, size_t pages);
xenforeignmemory_resource_handle *xenforeignmemory_map_resource(
    xenforeignmemory_handle *fmem, uint32_t domid, unsigned int type, unsigned int id,
    unsigned long frame, unsigned long nr_frames, void **paddr, int prot, int flags);
int xenforeignmemory_unmap_resource(xenforeignmemory_handle *fmem,
                                    xenforeignmemory_resource_handle *fres);

xencall_handle *xencall_open(void *logger, unsigned open_flags);
int xencall_close(xencall_handle *xcall);
int xencall2(xencall_handle *xcall, unsigned int op, uint64_t arg1, uint64_t arg2);
void *xencall_alloc_buffer_pages(xencall_handle *xcall, size_t nr_pages);
void xencall_free_buffer_pages(xencall_handle *xcall, void *p, size_t nr_pages);

xendevicemodel_handle *xendevicemodel_open(void *logger, unsigned open_flags);
int xendevicemodel_close(xendevicemodel_handle *dmod);
int xendevicemodel_modified_memory(xendevicemodel_handle *dmod, uint16_t domid,
                                   uint64_t first_pfn, uint32_t nr);

void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset);
"""

ffi = cffi.FFI()
ffi.cdef(_DECLARATIONS)


class Libraries:
    """The loaded libraries and one open handle of each.

    :ivar release: the Xen release they belong to
    :ivar xc: libxenctrl, with ``xch`` its open interface
    :ivar guest: libxenguest
    :ivar fmem: libxenforeignmemory, with ``fmemh``
    :ivar call: libxencall, with ``callh``
    :ivar model: libxendevicemodel, with ``modelh``
    """

    def __init__(self, release: Release) -> None:
        self.release = release
        # cffi's library objects are dynamic: their attributes are the functions declared above.
        self.xc: Any = self._load(release.libxenctrl)
        self.guest: Any = self._load(release.libxenguest)
        self.fmem: Any = self._load("libxenforeignmemory.so.1")
        self.call: Any = self._load("libxencall.so.1")
        self.model: Any = self._load("libxendevicemodel.so.1")
        self.libc: Any = ffi.dlopen(None)
        self.xch = self._open(self.xc.xc_interface_open(ffi.NULL, ffi.NULL, 0), "xc_interface_open")
        self.fmemh = self._open(
            self.fmem.xenforeignmemory_open(ffi.NULL, 0), "xenforeignmemory_open"
        )
        self.callh = self._open(self.call.xencall_open(ffi.NULL, 0), "xencall_open")
        self.modelh = self._open(self.model.xendevicemodel_open(ffi.NULL, 0), "xendevicemodel_open")

    @staticmethod
    def pointer(library: Any, name: str) -> Any:
        """A function of one of them, for native code to call."""
        return getattr(library, name)

    @staticmethod
    def _load(name: str) -> Any:
        try:
            return ffi.dlopen(name)
        except OSError as exc:
            raise UnsupportedGuest(
                f"{name} cannot be loaded (expected Xen's own libraries): {exc}"
            ) from exc

    @staticmethod
    def _open(handle: Any, call: str) -> Any:
        if handle == ffi.NULL:
            raise HypervisorError(call, ffi.errno, "expected to run as root in Dom0")
        return handle


def check(result: int, call: str, detail: str = "") -> int:
    """``result`` of a libxenctrl call, unless it is negative.

    :raise HypervisorError: with the errno that the call left
    """
    if result < 0:
        raise HypervisorError(call, ffi.errno, detail)
    return result


@lru_cache(maxsize=1)
def libraries() -> Libraries:
    """The libraries of the running Xen; opened once per process.

    :raise UnsupportedGuest: no Xen here, or a release that is not supported
    """
    return Libraries(running_release())


@lru_cache(maxsize=1)
def lowlevel_xc() -> Any:
    """Xen's own Python binding (``xen.lowlevel.xc``), which Debian keeps off ``sys.path``."""
    path = libraries().release.python_path
    if path not in sys.path:
        sys.path.append(path)
    try:
        from xen.lowlevel import xc
    except ImportError as exc:
        raise UnsupportedGuest(f"xen.lowlevel cannot be imported from {path}: {exc}") from exc
    return xc.xc()
