# SPDX-License-Identifier: Apache-2.0
"""Lays out a small Linux kernel in memory: page tables, symbols, types, and Xen's places.

As real ones do, it has an image in one piece in the window of ``__START_KERNEL_map`` and a direct
map of all memory; unlike them it has no code.  What is found in it can be compared with what was
put there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from checkpoint.guest.linux import Registers
from checkpoint.guest.memory import RamView

PAGE = 4096
RAM = 8 << 20
IMAGE_PA = 4 << 20
IMAGE_SIZE = 2 << 20
DIRECT = 0xFFFF_8880_0000_0000
RODATA = 0x40000
DATA = 0x100000
HEAP = 0x10_0000
RELEASE = "6.1.0-synthetic-amd64"
PERCPU_AREA = 0x20_0000
"""Physical address of CPU 0's per-CPU area; each CPU has 64 KiB."""

STRUCT, UNION, TYPEDEF, INT, PTR, ARRAY, ENUM, CONST, FUNC_PROTO = 4, 5, 8, 1, 2, 3, 6, 10, 13


def align(value: int) -> int:
    return (value + 7) & ~7


class Types:
    """Writes BTF."""

    def __init__(self) -> None:
        self.text = bytearray(b"\0")
        self.body = bytearray()
        self.count = 0
        self.u32 = self.add("unsigned int", INT, 4, struct.pack("<I", 32))
        self.u64 = self.add("u64", INT, 8, struct.pack("<I", 64))
        self.pointer = self.add("", PTR, 0)

    def name(self, text: str) -> int:
        if not text:
            return 0
        at = self.text.find(b"\0" + text.encode() + b"\0")
        if at >= 0:
            return at + 1
        self.text += text.encode() + b"\0"
        return len(self.text) - len(text) - 1

    def add(self, name: str, kind: int, value: int, tail: bytes = b"", count: int = 0) -> int:
        self.body += struct.pack("<III", self.name(name), kind << 24 | count, value) + tail
        self.count += 1
        return self.count

    def struct(
        self, name: str, size: int, members: Sequence[tuple[str, int, int]], kind: int = STRUCT
    ) -> int:
        """``members`` are (name, type, byte offset)."""
        rows = [struct.pack("<III", self.name(text), of, at * 8) for text, of, at in members]
        return self.add(name, kind, size, b"".join(rows), len(rows))

    def array(self, of: int, length: int) -> int:
        return self.add("", ARRAY, 0, struct.pack("<III", of, self.u32, length))

    def bytes(self) -> bytes:
        header = struct.pack(
            "<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.body), len(self.body), len(self.text)
        )
        return header + bytes(self.body) + bytes(self.text)


def kernel_types(*, tk_data: bool = False, vdso: bool = True, realtime: bool = False) -> Types:
    """The types that the engine asks for, as large and as laid out as in Linux 6.12."""
    types = Types()
    types.add("xen_irq_type", ENUM, 4, struct.pack("<Ii", types.name("IRQT_UNBOUND"), 0), 1)
    types.add("", FUNC_PROTO, types.u32, struct.pack("<II", 0, types.u64), 1)
    types.add("", CONST, types.u64)
    u32, u64, pointer = types.u32, types.u64, types.pointer
    seqcount = types.struct("seqcount_raw_spinlock", 4, [("seqcount", u32, 0)])
    seq = types.add("seqcount_raw_spinlock_t", TYPEDEF, seqcount)
    base = types.struct(
        "tk_read_base", 56, [("clock", pointer, 0), ("mask", u64, 8), ("cycle_last", u64, 16)]
    )
    const_base = types.add("", CONST, base)
    keeper = types.struct("timekeeper", 280, [("tkr_mono", base, 0), ("tkr_raw", const_base, 56)])
    types.struct("tk_fast", 120, [("seq", u32, 0), ("base", types.array(base, 2), 8)])
    types.struct("mutex", 32, [("rtmutex" if realtime else "owner", u64, 0)])
    types.struct("clocksource", 200, [("read", pointer, 0), ("name", pointer, 56)])
    if vdso:
        inner = types.struct("", 16, [("cycle_last", u64, 0), ("cycles", u64, 8)])
        types.struct("vdso_data", 248, [("seq", u32, 0), ("clock_mode", u32, 4), ("", inner, 8)])
    if tk_data:
        members = [("seq", seq, 0), ("timekeeper", keeper, 8), ("shadow_timekeeper", keeper, 288)]
        types.struct("tk_data", 576, [*members, ("lock", u32, 568)])
    return types


@dataclass
class Options:
    """What kernel to lay out.

    :ivar order: of the symbol tables: "6.1-first" has no sorted names, "6.1" has them before the
        tokens, "6.4" is the order since then
    """

    order: str = "6.4"
    absolute_percpu: bool = True
    la57: bool = False
    isolated: bool = False
    image_va: int = 0xFFFF_FFFF_8A00_0000
    cpus: int = 2
    fifo: bool = True
    clocksource: str = "xen"
    tk_data: bool = False
    vdso: bool = True
    vsyscall: bool = False
    realtime: bool = False
    fillers: int = 700
    watches: Sequence[str] = ("control/shutdown", "/local/domain/0/backend/vif/3/0/state")
    without: Sequence[str] = ()
    twice: Sequence[str] = ()


@dataclass
class GuestKernel:
    """A laid-out kernel; :func:`build` makes one.

    :ivar ram: guest RAM
    :ivar names: (type, name, address) of each symbol, in the order of the table
    """

    options: Options
    ram: bytearray
    names: list[tuple[str, str, int]] = field(default_factory=list)
    cr3: int = 0
    user_cr3: int = 0

    @property
    def memory(self) -> RamView:
        return RamView(memoryview(self.ram))

    @property
    def registers(self) -> list[Registers]:
        cr4 = 1 << 12 if self.options.la57 else 0
        return [Registers(self.cr3, cr4, self.lstar)]

    @property
    def lstar(self) -> int:
        return self.symbol("entry_SYSCALL_64")

    def symbol(self, name: str) -> int:
        return [address for _, other, address in self.names if other == name][-1]

    def pa(self, va: int) -> int:
        if va >= self.options.image_va:
            return va - self.options.image_va + IMAGE_PA
        return va - DIRECT

    def image_pa(self, offset: int) -> int:
        return IMAGE_PA + offset

    def percpu(self, name: str, cpu: int) -> int:
        """Physical address of a per-CPU symbol."""
        area = PERCPU_AREA + cpu * 0x10000
        if self.options.absolute_percpu:
            return area + self.symbol(name)
        return area + self.symbol(name) - self.symbol("__per_cpu_start")

    def poke(self, where: str | int, *values: int, size: int = 8) -> None:
        """Store numbers at a symbol or physical address."""
        pa = self.pa(self.symbol(where)) if isinstance(where, str) else where
        for value in values:
            self.ram[pa : pa + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            pa += size

    def peek(self, where: str | int, size: int = 8) -> int:
        pa = self.pa(self.symbol(where)) if isinstance(where, str) else where
        return int.from_bytes(self.ram[pa : pa + size], "little")

    def text(self, pa: int, text: str) -> None:
        self.ram[pa : pa + len(text) + 1] = text.encode() + b"\0"


def compress(names: Iterable[str]) -> tuple[list[bytes], list[bytes]]:
    """(the 256 tokens, each name as tokens); ``names`` begin with their type letter."""
    rows = [name.encode() for name in names]
    used = set(b"".join(rows)) | set(b"0123456789")
    tokens = [bytes([value]) if value in used else b"" for value in range(256)]
    pieces = [b"filler_", b"function", b"Tfiller_", b"xen_", b"_time", b"clock", b"data"]
    free = [value for value in range(256) if value not in used]
    for value, piece in zip(free, sorted(pieces, key=len, reverse=True), strict=False):
        tokens[value] = piece
        rows = [row.replace(piece, b"\xff\xff" + bytes([value])) for row in rows]
        rows = [row.replace(b"\xff\xff", b"") for row in rows]
    return tokens, rows


def symbol_tables(kernel: GuestKernel) -> bytes:
    """The tables of scripts/kallsyms.c in the order asked for."""
    options = kernel.options
    tokens, rows = compress(kind + name for kind, name, _ in kernel.names)
    count = len(kernel.names)
    base = options.image_va
    names, markers = bytearray(), []
    for index, row in enumerate(rows):
        if not index & 255:
            markers.append(len(names))
        size = len(row)
        names += bytes([size] if size < 128 else [size & 127 | 128, size >> 7]) + row
    offsets = []
    for _, _, address in kernel.names:
        if not options.absolute_percpu:
            offsets.append(address - base)
        else:
            offsets.append(address if address < 1 << 31 else base - 1 - address)
    order = sorted(range(count), key=lambda index: (kernel.names[index][1].encode(), index))
    starts, table = [], b""
    for token in tokens:
        starts.append(len(table))
        table += token + b"\0"
    code = "i" if options.absolute_percpu else "I"
    blocks = {
        "num": struct.pack("<I", count),
        "names": bytes(names),
        "markers": struct.pack(f"<{len(markers)}I", *markers),
        "tokens": table,
        "index": struct.pack("<256H", *starts),
        "offsets": struct.pack(f"<{count}{code}", *offsets),
        "base": struct.pack("<Q", base),
        "seqs": b"".join(index.to_bytes(3, "big") for index in order),
    }
    layouts = {
        "6.1-first": "offsets base num names markers tokens index",
        "6.1": "offsets base num names markers seqs tokens index",
        "6.4": "num names markers tokens index offsets base seqs",
    }
    parts = [blocks[name] for name in layouts[options.order].split()]
    return b"".join(part.ljust(align(len(part)), b"\0") for part in parts)


def _entry(ram: bytearray, table: int, index: int, value: int) -> None:
    struct.pack_into("<Q", ram, table + 8 * index, value)


def _map(kernel: GuestKernel) -> None:
    """Page tables: the direct map by one 1 GiB page, the image by 2 MiB and 4 KiB pages."""
    options, ram = kernel.options, kernel.ram
    top = kernel.pa(kernel.symbol("init_top_pgt"))
    free = iter(range(0x1000, 0x20000, PAGE))
    root = top
    if options.la57:
        root = next(free)
        _entry(ram, top, 511, root | 3)
        _entry(ram, top, DIRECT >> 48 & 511, root | 3)
    direct = next(free)
    _entry(ram, root, DIRECT >> 39 & 511, direct | 3)
    _entry(ram, direct, 0, 0x83)
    upper, middle, lower = next(free), next(free), next(free)
    _entry(ram, root, 511, upper | 3)
    _entry(ram, upper, options.image_va >> 30 & 511, middle | 3)
    slot = options.image_va >> 21 & 511
    _entry(ram, middle, slot, lower | 3)
    for page in range(IMAGE_SIZE // PAGE):
        _entry(ram, lower, page, IMAGE_PA + page * PAGE | 0x8000_0000_0000_0003)
    kernel.cr3 = top | 0x18
    kernel.user_cr3 = top + PAGE | 0x800
    if options.isolated:
        user_upper, user_middle, user_lower = next(free), next(free), next(free)
        _entry(ram, top + PAGE, 511, user_upper | 3)
        if options.la57:
            user_root, user_upper = user_upper, next(free)
            _entry(ram, user_root, 511, user_upper | 3)
        _entry(ram, user_upper, options.image_va >> 30 & 511, user_middle | 3)
        _entry(ram, user_middle, slot, user_lower | 3)
        for page in range(16):
            _entry(ram, user_lower, page, IMAGE_PA + page * PAGE | 3)


# name: (type letter, offset in the image)
_SYMBOLS = {
    "_text": ("T", 0),
    "entry_SYSCALL_64": ("T", 0x80),
    "pvclock_clocksource_read": ("T", 0x200),
    "pvclock_resume": ("T", 0x280),
    "xen_clocksource_read": ("t", 0x300),
    "xen_sched_clock": ("t", 0x340),
    "linux_banner": ("D", RODATA),
    "evtchn_ops_2l": ("d", RODATA + 0x800),
    "evtchn_ops_fifo": ("d", RODATA + 0x880),
    "gnttab_v1_ops": ("d", RODATA + 0x900),
    "gnttab_v2_ops": ("d", RODATA + 0x980),
    "__start_BTF": ("R", RODATA + 0x1000),
    "init_top_pgt": ("D", DATA),
    "__per_cpu_offset": ("D", DATA + 0x2000),
    "nr_cpu_ids": ("D", DATA + 0x2400),
    "__cpu_possible_mask": ("D", DATA + 0x2410),
    "xen_domain_type": ("D", DATA + 0x2420),
    "HYPERVISOR_shared_info": ("D", DATA + 0x2428),
    "xen_auto_xlat_grant_frames": ("B", DATA + 0x2430),
    "nr_grant_frames": ("b", DATA + 0x2450),
    "gnttab_interface": ("b", DATA + 0x2458),
    "evtchn_ops": ("B", DATA + 0x2460),
    "event_array_pages": ("d", DATA + 0x2470),
    "event_array": ("d", DATA + 0x2480),
    "xb_write_list": ("D", DATA + 0x2900),
    "xs_reply_list": ("D", DATA + 0x2910),
    "xs_response_mutex": ("D", DATA + 0x2920),
    "xs_state_users": ("b", DATA + 0x2948),
    "watches": ("d", DATA + 0x2950),
    "xen_clock": ("d", DATA + 0x2960),
    "xen_sched_clock_offset": ("d", DATA + 0x2968),
    "timekeeper_lock": ("B", DATA + 0x2970),
    "timekeeping_suspended": ("D", DATA + 0x2974),
    "watchdog_reset_pending": ("b", DATA + 0x2978),
    "curr_clocksource": ("b", DATA + 0x2980),
    "last_value": ("b", DATA + 0x2988),
    "xen_clocksource": ("d", DATA + 0x2A00),
    "clocksource_tsc": ("d", DATA + 0x2B00),
    "tk_core": ("b", DATA + 0x2C00),
    "shadow_timekeeper": ("b", DATA + 0x3000),
    "tk_fast_mono": ("d", DATA + 0x3200),
    "tk_fast_raw": ("d", DATA + 0x3300),
    "_vdso_data": ("D", DATA + 0x4080),
}
_PERCPU = {
    "__per_cpu_start": 0,
    "xen_vcpu_id": 0x100,
    "xen_vcpu": 0x108,
    "xen_vcpu_info": 0x140,
    "xen_runstate": 0x180,
    "old_runstate_time": 0x1C0,
    "cpu_control_block": 0x1E0,
    "cpu_queue": 0x200,
}


def build(options: Options | None = None) -> GuestKernel:
    """Lay out a kernel, with everything at rest."""
    options = options or Options()
    kernel = GuestKernel(options, bytearray(RAM))
    image = options.image_va
    # A per-CPU symbol is an offset, or since Linux 6.15 an address like any other.
    percpu = 0 if options.absolute_percpu else image + 0x1F0000
    types = kernel_types(
        tk_data=options.tk_data, vdso=options.vdso, realtime=options.realtime
    ).bytes()
    rows = [("A" if options.absolute_percpu else "D", n, percpu + at) for n, at in _PERCPU.items()]
    rows += [(kind, name, image + at) for name, (kind, at) in _SYMBOLS.items()]
    rows.append(("R", "__stop_BTF", image + RODATA + 0x1000 + len(types)))
    rows += [("d", name, image + 0x30000 + i * 8) for i, name in enumerate(options.twice)]
    for i in range(options.fillers):
        name = f"filler_function_{'long_' * 30 * (i == 5)}{i:x}"
        rows.append(("T" if i % 3 else "t", name, image + 0x1000 + i * 16))
    rows.sort(key=lambda row: row[2])
    kernel.names = rows
    _map(kernel)
    _fill(kernel)
    kernel.names = [row for row in rows if row[1] not in options.without]
    at = IMAGE_PA + RODATA + 0x1000
    for block in (types, symbol_tables(kernel)):
        kernel.ram[at : at + len(block)] = block
        at += align(len(block))
    return kernel


def _fill(kernel: GuestKernel) -> None:
    """Set Xen's variables as a booted PVH guest has them."""
    options, image = kernel.options, kernel.options.image_va
    kernel.text(kernel.pa(kernel.symbol("linux_banner")), f"Linux version {RELEASE} (builder)")
    kernel.poke("nr_cpu_ids", options.cpus, size=4)
    kernel.poke("__cpu_possible_mask", (1 << options.cpus) - 1)
    kernel.poke("xen_domain_type", 2, size=4)
    kernel.poke("HYPERVISOR_shared_info", DIRECT + 0x30000)
    frames = 0x31000
    kernel.poke(frames, 0x7FFF, 0x7FFE, 0x7FFD, 0x7FFC)
    kernel.poke("xen_auto_xlat_grant_frames", DIRECT + frames, 4)
    kernel.poke("nr_grant_frames", 2, size=4)
    kernel.poke("gnttab_interface", kernel.symbol("gnttab_v1_ops"))
    kernel.poke("evtchn_ops", kernel.symbol(f"evtchn_ops_{'fifo' if options.fifo else '2l'}"))
    if options.fifo:
        kernel.poke("event_array_pages", 1, size=4)
        kernel.poke("event_array", DIRECT + 0x40000)
    for cpu in range(options.cpus):
        area = PERCPU_AREA + cpu * 0x10000
        start = 0 if options.absolute_percpu else image + 0x1F0000
        offsets = kernel.pa(kernel.symbol("__per_cpu_offset"))
        kernel.poke(offsets + 8 * cpu, DIRECT + area - start)
        kernel.poke(kernel.percpu("xen_vcpu_id", cpu), cpu, size=4)
        kernel.poke(kernel.percpu("xen_vcpu", cpu), DIRECT + kernel.percpu("xen_vcpu_info", cpu))
        if options.fifo:
            block = DIRECT + 0x50000 + cpu * PAGE
            kernel.poke(kernel.percpu("cpu_control_block", cpu), block)
    for head in ("xb_write_list", "xs_reply_list"):
        kernel.poke(head, kernel.symbol(head), kernel.symbol(head))
    previous = kernel.symbol("watches")
    for index, path in enumerate(options.watches):
        entry = 0x60000 + index * 0x100
        kernel.text(entry + 0x80, path)
        kernel.poke(kernel.pa(previous), DIRECT + entry)
        kernel.poke(entry + 16, DIRECT + entry + 0x80)
        previous = DIRECT + entry
    kernel.poke(kernel.pa(previous), kernel.symbol("watches"))
    _fill_clock(kernel)


def _fill_clock(kernel: GuestKernel) -> None:
    options = kernel.options
    for symbol, name in (("xen_clocksource", "xen"), ("clocksource_tsc", "tsc")):
        text = kernel.pa(kernel.symbol(symbol)) + 0x80
        kernel.text(text, name)
        kernel.poke(text - 0x80 + 56, kernel.symbol(symbol) + 0x80)
    symbol = {"xen": "xen_clocksource", "tsc": "clocksource_tsc"}[options.clocksource]
    current = kernel.symbol(symbol)
    kernel.poke("curr_clocksource", current)
    core = kernel.pa(kernel.symbol("tk_core"))
    shadow = core + 288 if options.tk_data else kernel.pa(kernel.symbol("shadow_timekeeper"))
    bases = [core + 8, core + 64, shadow, shadow + 56]
    for fast in ("tk_fast_mono", "tk_fast_raw"):
        at = kernel.pa(kernel.symbol(fast))
        kernel.poke(at, 7, size=4)
        bases += [at + 8, at + 64]
    for base in bases:
        kernel.poke(base, current, (1 << 64) - 1, 5_000_000_000)
    kernel.poke(core, 1234, size=4)
    kernel.poke("last_value", 5_100_000_000)
    kernel.poke("xen_sched_clock_offset", 4_000_000_000)
    vdso = kernel.pa(kernel.symbol("_vdso_data"))
    for at in (vdso, vdso + 248):
        mode = {"xen": 2 * options.vsyscall, "tsc": 1}[options.clocksource]
        kernel.poke(at, 40, mode, size=4)
        kernel.poke(at + 8, 5_000_000_000)
    if options.vsyscall:
        kernel.poke("xen_clock", DIRECT + 0x70000)
        kernel.poke(0x70000, *[0x0101_0101_0101_0101] * 8)
