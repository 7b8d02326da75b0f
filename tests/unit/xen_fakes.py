# SPDX-License-Identifier: Apache-2.0
"""One Xen host in plain memory, seen through the functions of its libraries.

:class:`FakeXen` stands where ``checkpoint.xen.libs.Libraries`` does.  Guest RAM is a file in
memory, so that a mapping of it is a real one: both sides see what the other writes, and a frame
that is not mapped cannot be touched.  Each call may be made to fail, or to do something first.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import cffi

from checkpoint.xen.libs import ffi

PAGE = 4096
_libc_ffi = cffi.FFI()
_libc_ffi.cdef(
    """
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset);
    int munmap(void *addr, size_t length);
    """
)
_libc: Any = _libc_ffi.dlopen(None)

_SHARED_FIXED = 0x01 | 0x10
_BUCKET = 64  # event channels come in buckets: every port of one is valid, most of them closed
_STATUS = struct.Struct("<HxxIIII4x")
_MULTICALL = struct.Struct("<Qq6Q")
_DOMCTL = struct.Struct("<IIH6xI4xQ")


def memory_at(address: int, size: int) -> memoryview:
    """``size`` bytes of this process at ``address``."""
    return memoryview(ffi.buffer(ffi.cast("char *", address), size)).cast("B")


def save_file(
    vcpus: tuple[int, ...] = (0,), rip: int = 0x1000, tsc: int = 0, down: tuple[int, ...] = ()
) -> bytes:
    """HVM save records as Xen writes them: a header, CPU and LAPIC records, the end.

    :param down: vCPUs that have no CPU record
    """
    out = [struct.pack("<HHI", 1, 0, 24) + bytes(24)]
    for number in vcpus:
        body = bytearray((index * 7 + number) % 251 for index in range(1032))
        struct.pack_into("<Q", body, 640, rip)
        struct.pack_into("<Q", body, 1008, tsc)
        out.append(struct.pack("<HHI", 2, number, len(body)) + body)
    for number in sorted({*vcpus, *down}):
        out.append(struct.pack("<HHI", 6, number, 1024) + bytes(1024))
    out.append(struct.pack("<HHI", 0, 0, 0))
    return b"".join(out)


@dataclass
class FakeDomain:
    """A guest of the fake host.

    :ivar places: guest frame -> page of :attr:`file`; frames that are not in it are holes
    :ivar ports: event channel -> (status, vCPU, first word and second word of the union)
    :ivar logged: frames written since the log was cleaned, as the processor would note it
    :ivar placed: guest frame -> (space, index) of Xen's pages that were put there
    """

    domid: int
    pages: int
    file: int
    ram: mmap.mmap
    places: dict[int, int]
    grants: mmap.mmap
    grants_file: int
    grant_frames: int = 1
    vcpus: int = 2
    flags: int = 0x102
    pauses: int = 0
    context: bytes = b""
    params: dict[int, int] = field(default_factory=dict)
    ports: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    logging: bool = False
    logged: set[int] = field(default_factory=set)
    extra_pages: int = 0
    placed: dict[int, tuple[int, int]] = field(default_factory=dict)

    def page(self, gfn: int) -> memoryview:
        """The memory at a guest frame, as the guest sees it."""
        at = self.places[gfn] * PAGE
        return memoryview(self.ram)[at : at + PAGE]

    def write(self, gfn: int, data: bytes, offset: int = 0) -> None:
        """The guest writes; the log notices."""
        self.page(gfn)[offset : offset + len(data)] = data
        if self.logging:
            self.logged.add(gfn)

    def backend_writes(self, gfn: int, data: bytes, offset: int = 0) -> None:
        """A backend writes through a lasting mapping: the log does not notice."""
        self.page(gfn)[offset : offset + len(data)] = data

    def grant(self, reference: int, gfn: int, flags: int = 1) -> None:
        """Set entry ``reference`` of the grant table: Dom0 may access ``gfn``."""
        self.grants[reference * 8 : reference * 8 + 8] = struct.pack("<HHI", flags, 0, gfn)


class FakeXen:
    """In the place of ``Libraries``.

    :ivar calls: names of the calls made, in order
    :ivar failing: name of a call -> (number of calls that still work, errno)
    :ivar before: name of a call -> what happens first, given the call's arguments
    :ivar mapped: addresses of the foreign mappings that are in use, with their sizes in pages
    :ivar resources: mapped grant tables in use
    """

    def __init__(self) -> None:
        self.domains: dict[int, FakeDomain] = {}
        self.calls: list[str] = []
        self.failing: dict[str, tuple[int, int]] = {}
        self.before: dict[str, Callable[..., object]] = {}
        self.mapped: dict[int, int] = {}
        self.resources: dict[int, int] = {}
        self.buffers: dict[int, Any] = {}
        self.pointers: list[Any] = []
        self.khz = 2_000_000
        self.free_pages = 1 << 20
        self.release = SimpleNamespace(name="4.17", domctl=0x15)
        self.xch = self.fmemh = self.callh = self.modelh = ffi.NULL
        self.xc = self.guest = self.fmem = self.call = self.model = self
        self.libc = _libc

    def __getattr__(self, name: str) -> Any:
        try:
            function = type(self).__dict__["_" + name]
        except KeyError:
            raise AttributeError(name) from None

        def called(*arguments: Any) -> Any:
            self.calls.append(name)
            action = self.before.get(name)
            if action is not None:
                action(*arguments)
            if name in self.failing:
                left, number = self.failing[name]
                self.failing[name] = (left - 1, number)
                if left <= 0:
                    ffi.errno = number
                    return ffi.NULL if name in _POINTERS else -1
            return function(self, *arguments)

        return called

    def pointer(self, _library: Any, name: str) -> Any:
        """One of the calls, for native code; an exception in it makes it fail."""
        function: Any = ffi.callback(_NATIVE[name], getattr(self, name), error=-1)
        self.pointers.append(function)
        return function

    def add(
        self, domid: int, pages: int, special: tuple[int, ...] = (), holes: tuple[int, ...] = ()
    ) -> FakeDomain:
        """A new guest, not paused."""
        frames = [gfn for gfn in range(pages) if gfn not in holes] + list(special)
        file, grants_file = os.memfd_create("ram"), os.memfd_create("grants")
        os.ftruncate(file, (len(frames) + 64) * PAGE)
        os.ftruncate(grants_file, 8 * PAGE)
        domain = self.domains[domid] = FakeDomain(
            domid=domid,
            pages=pages,
            file=file,
            ram=mmap.mmap(file, (len(frames) + 64) * PAGE),
            places={gfn: place for place, gfn in enumerate(frames)},
            grants=mmap.mmap(grants_file, 8 * PAGE),
            grants_file=grants_file,
        )
        for each in (file, grants_file):
            weakref.finalize(domain, os.close, each)
        return domain

    def _find(self, domid: int) -> FakeDomain | None:
        domain = self.domains.get(domid)
        if domain is None:
            ffi.errno = errno.ESRCH
        return domain

    # ---- libxenctrl ----

    def _xc_domain_pause(self, _xch: Any, domid: int) -> int:
        domain = self._find(domid)
        if domain is None:
            return -1
        domain.pauses += 1
        return 0

    def _xc_domain_unpause(self, _xch: Any, domid: int) -> int:
        domain = self._find(domid)
        if domain is None:
            return -1
        if not domain.pauses:
            ffi.errno = errno.EINVAL
            return -1
        domain.pauses -= 1
        return 0

    def _xc_domain_getinfolist(self, _xch: Any, first: int, _most: int, info: Any) -> int:
        later = sorted(domid for domid in self.domains if domid >= first)
        if not later:
            return 0
        domain = self.domains[later[0]]
        raw = memory_at(int(ffi.cast("uintptr_t", info)), 80)
        raw[:] = struct.pack(
            "<HHI7QIIQ", domain.domid, 0, domain.flags | (8 if domain.pauses else 0),
            len(domain.places) + domain.extra_pages, 1 << 20, 0, 0, 0, 0xABC, 0,
            domain.vcpus, domain.vcpus - 1, 0,
        )  # fmt: skip
        return 1

    def _xc_domain_hvm_getcontext(self, _xch: Any, domid: int, buffer: Any, size: int) -> int:
        domain = self.domains[domid]
        if buffer == ffi.NULL:
            return len(domain.context)
        if size < len(domain.context):
            ffi.errno = errno.ENOSPC
            return -1
        ffi.buffer(buffer, size)[: len(domain.context)] = domain.context
        return len(domain.context)

    def _xc_domain_hvm_setcontext(self, _xch: Any, domid: int, buffer: Any, size: int) -> int:
        self.domains[domid].context = bytes(ffi.buffer(buffer, size))
        return 0

    def _xc_hvm_param_get(self, _xch: Any, domid: int, param: int, value: Any) -> int:
        value[0] = self.domains[domid].params.get(param, 0)
        return 0

    def _xc_hvm_param_set(self, _xch: Any, domid: int, param: int, value: int) -> int:
        self.domains[domid].params[param] = value
        return 0

    def _xc_domain_get_tsc_info(
        self, _xch: Any, _domid: int, mode: Any, nsec: Any, khz: Any, incarnation: Any
    ) -> int:
        mode[0], nsec[0], khz[0], incarnation[0] = 2, 123, self.khz, 1
        return 0

    def physinfo(self) -> dict[str, Any]:
        """As ``xen.lowlevel.xc`` answers; memory in KiB."""
        return {"cpu_khz": self.khz, "free_memory": 4 * self.free_pages, "scrub_memory": 4 * 30}

    def _xc_domain_maximum_gpfn(self, _xch: Any, domid: int, out: Any) -> int:
        out[0] = max(self.domains[domid].places)
        return 0

    def _xc_domain_add_to_physmap(
        self, _xch: Any, domid: int, space: int, index: int, gfn: int
    ) -> int:
        domain = self.domains[domid]
        domain.placed[gfn] = (space, index)
        if space == 0:
            # Xen's page takes the place of what was there; mappings made before keep the old one.
            domain.places[gfn] = os.fstat(domain.file).st_size // PAGE - 1
        return 0

    # ---- the dirty log ----

    def _xc__hypercall_buffer_alloc_pages(self, _xch: Any, buffer: Any, pages: int) -> Any:
        memory = ffi.new("uint8_t[]", pages * PAGE)
        self.buffers[int(ffi.cast("uintptr_t", memory))] = memory
        buffer.hbuf = memory
        return ffi.cast("void *", memory)

    def _xc__hypercall_buffer_free_pages(self, _xch: Any, buffer: Any, _pages: int) -> None:
        del self.buffers[int(ffi.cast("uintptr_t", buffer.hbuf))]

    def _xc_logdirty_control(
        self,
        _xch: Any,
        domid: int,
        operation: int,
        buffer: Any,
        pages: int,
        _mode: int,
        _stats: Any,
    ) -> int:
        domain = self._find(domid)
        if domain is None:
            return -1
        buffer = ffi.cast("xc_hypercall_buffer_t *", buffer)
        if operation == 2:
            if domain.logging:
                ffi.errno = errno.EINVAL
                return -1
            domain.logging = True
            domain.logged.clear()
            return 0
        if operation == 0:
            domain.logging = False
            domain.logged.clear()
            return 0
        # Xen does not ask whether the log is on.
        size = -(-pages // 8)
        bitmap = bytearray(size)
        for gfn in domain.logged:
            if gfn < pages:
                bitmap[gfn // 8] |= 1 << gfn % 8
        if operation == 11:
            domain.logged.clear()
        ffi.buffer(buffer.hbuf, size)[:] = bytes(bitmap)
        return pages

    def _xendevicemodel_modified_memory(
        self, _handle: Any, domid: int, first: int, count: int
    ) -> int:
        domain = self._find(domid)
        if domain is None:
            return -1
        if domain.logging:
            domain.logged |= {gfn for gfn in range(first, first + count) if gfn in domain.places}
        return 0

    # ---- libxenguest ----

    def _xc_cpu_policy_get_size(self, _xch: Any, leaves: Any, msrs: Any) -> int:
        leaves[0], msrs[0] = 5, 4
        return 0

    def _xc_cpu_policy_init(self) -> Any:
        policy = ffi.new("char[]", 16)
        self.buffers[int(ffi.cast("uintptr_t", policy))] = policy
        return ffi.cast("xc_cpu_policy_t *", policy)

    def _xc_cpu_policy_destroy(self, policy: Any) -> None:
        del self.buffers[int(ffi.cast("uintptr_t", policy))]

    def _xc_cpu_policy_get_domain(self, _xch: Any, _domid: int, _policy: Any) -> int:
        return 0

    def _xc_cpu_policy_serialise(
        self, _xch: Any, _policy: Any, leaves: Any, nr_leaves: Any, msrs: Any, nr_msrs: Any
    ) -> int:
        leaves[0].leaf, leaves[1].d = 7, 9
        msrs[0].idx, msrs[0].val = 0xCE, 1 << 40
        nr_leaves[0], nr_msrs[0] = 2, 1
        return 0

    # ---- libxenforeignmemory ----

    def _xenforeignmemory_map2(
        self, _handle: Any, domid: int, address: Any, prot: int, _flags: int, pages: int,
        frames: Any, errors: Any,
    ) -> Any:  # fmt: skip
        domain = self.domains[domid]
        base = int(ffi.cast("uintptr_t", address))
        self.mapped.setdefault(base, pages)
        for index in range(pages):
            place = domain.places.get(frames[index])
            errors[index] = 0 if place is not None else -errno.EINVAL
            if place is not None:
                at = _libc_ffi.cast("void *", base + index * PAGE)
                _libc.mmap(at, PAGE, prot, _SHARED_FIXED, domain.file, place * PAGE)
        return address

    def _xenforeignmemory_unmap(self, _handle: Any, address: Any, pages: int) -> int:
        base = int(ffi.cast("uintptr_t", address))
        for start in [at for at in self.mapped if base <= at < base + pages * PAGE]:
            del self.mapped[start]
        return int(_libc.munmap(_libc_ffi.cast("void *", base), pages * PAGE))

    def _xenforeignmemory_map_resource(
        self, _handle: Any, domid: int, kind: int, ident: int, frame: int, frames: int,
        address: Any, prot: int, _flags: int,
    ) -> Any:  # fmt: skip
        assert (kind, ident, frame) == (1, 0, 0)
        domain = self.domains[domid]
        null = _libc_ffi.NULL
        where = _libc.mmap(null, frames * PAGE, prot, 0x01, domain.grants_file, 0)
        base = int(_libc_ffi.cast("uintptr_t", where))
        address[0] = ffi.cast("void *", base)
        self.resources[base] = frames
        return ffi.cast("xenforeignmemory_resource_handle *", base)

    def _xenforeignmemory_unmap_resource(self, _handle: Any, resource: Any) -> int:
        base = int(ffi.cast("uintptr_t", resource))
        return int(_libc.munmap(_libc_ffi.cast("void *", base), self.resources.pop(base) * PAGE))

    # ---- libxencall ----

    def _xencall_alloc_buffer_pages(self, _handle: Any, pages: int) -> Any:
        memory = ffi.new("uint8_t[]", pages * PAGE)
        self.buffers[int(ffi.cast("uintptr_t", memory))] = memory
        return ffi.cast("void *", memory)

    def _xencall_free_buffer_pages(self, _handle: Any, memory: Any, _pages: int) -> None:
        del self.buffers[int(ffi.cast("uintptr_t", memory))]

    def _xencall2(self, _handle: Any, operation: int, entries: int, count: int) -> int:
        assert operation == 13
        for index in range(count):
            raw = memory_at(entries + index * _MULTICALL.size, _MULTICALL.size)
            op, _result, command, pointer, *_rest = _MULTICALL.unpack(raw)
            calls = {32: self._event_op, 20: self._grant_op, 12: self._memory_op}
            if op == 36:
                result = self._domctl(command)
            elif op == 41:
                result = self._dm_op(command, pointer, _rest[0])
            else:
                result = calls[op](command, pointer)
            struct.pack_into("<q", raw, 8, result)
        return 0

    def _domctl(self, pointer: int) -> int:
        """As if the control library had been asked: noted, made to fail and so on by its names."""
        raw = memory_at(pointer, 144)  # struct xen_domctl, which Xen reads and writes as a whole
        command, version, domid, size, buffer = _DOMCTL.unpack_from(raw)
        if version != self.release.domctl:
            return -errno.EACCES
        if domid not in self.domains:
            return -errno.ESRCH
        if command == 3:
            result = self.xc_domain_pause(ffi.NULL, domid)
        elif command == 4:
            result = self.xc_domain_unpause(ffi.NULL, domid)
        else:
            assert command == 33
            target = ffi.cast("uint8_t *", buffer)
            result = self.xc_domain_hvm_getcontext(ffi.NULL, domid, target, size)
            if result >= 0:
                struct.pack_into("<I", raw, 16, result)
        return -ffi.errno if result < 0 else 0

    def _dm_op(self, domid: int, count: int, pointer: int) -> int:
        assert count == 2
        where, size, extents, length = struct.unpack("<4Q", memory_at(pointer, 32))
        assert (size, length) == (72, 16)  # struct xen_dm_op and one extent
        operation, extent_count, opaque = struct.unpack_from("<I4xII", memory_at(where, size))
        assert (operation, extent_count, opaque) == (11, 1, 0)
        pages, padding, first = struct.unpack("<IIQ", memory_at(extents, length))
        assert padding == 0
        result = self.xendevicemodel_modified_memory(ffi.NULL, domid, first, pages)
        return -ffi.errno if result < 0 else 0

    def _memory_op(self, command: int, pointer: int) -> int:
        assert command == 3
        (domid,) = struct.unpack("<H", memory_at(pointer, 2))
        domain = self.domains.get(domid)
        return -errno.ESRCH if domain is None else len(domain.places) + domain.extra_pages

    def _event_op(self, command: int, pointer: int) -> int:
        assert command == 5
        raw = memory_at(pointer, _STATUS.size)
        domid, port, *_rest = _STATUS.unpack(raw)
        domain = self.domains.get(domid)
        if domain is None:
            return -errno.ESRCH
        if port >= -(-(max(domain.ports, default=0) + 1) // _BUCKET) * _BUCKET:
            return -errno.EINVAL
        status, vcpu, first, second = domain.ports.get(port, (0, 0, 0, 0))
        if status == -1:
            return -errno.EACCES
        raw[:] = struct.pack("<HxxIIIII", domid, port, status, vcpu, first, second)
        return 0

    def _grant_op(self, command: int, pointer: int) -> int:
        assert command == 6
        raw = memory_at(pointer, 16)
        (domid,) = struct.unpack_from("<H", raw)
        domain = self.domains.get(domid)
        found = (domain.grant_frames, 64, 0) if domain else (0, 0, -2)
        raw[:] = struct.pack("<HxxIIhxx", domid, *found)
        return 0


_NATIVE = {
    "xencall2": "int(void *, unsigned int, uint64_t, uint64_t)",
    "xc_logdirty_control":
        "long long(void *, uint32_t, unsigned int, void *, unsigned long, unsigned int, void *)",
}  # fmt: skip
_POINTERS = {
    "xc__hypercall_buffer_alloc_pages",
    "xc_cpu_policy_init",
    "xenforeignmemory_map2",
    "xenforeignmemory_map_resource",
    "xencall_alloc_buffer_pages",
}
