# SPDX-License-Identifier: Apache-2.0
"""HVM save records: the vCPU and platform state as Xen hands it out.  Pure.

Layout from ``xen/include/public/hvm/save.h`` and ``arch-x86/hvm/save.h``: a record is
``{u16 typecode, u16 instance, u32 length}`` and ``length`` bytes; typecode 0 ends the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from checkpoint.errors import CheckpointError

_RECORD = struct.Struct("<HHI")

END, HEADER, CPU, LAPIC_REGS = 0, 1, 2, 6

#: offsets in struct hvm_hw_cpu: 512 bytes of FPU state, 16 general registers, then these
_RIP = 512 + 16 * 8
_CR0, _CR3, _CR4 = _RIP + 16, _RIP + 32, _RIP + 40
_SEGMENTS = _RIP + 96  # after six debug registers: 8 selectors, 10 limits, 10 bases, 8 rights
_LIMITS, _BASES, _RIGHTS = _SEGMENTS + 32, _SEGMENTS + 72, _SEGMENTS + 152
_SYSENTER = _RIGHTS + 32
_SHADOW_GS = _SYSENTER + 24
_LSTAR = _SHADOW_GS + 16
_EFER = _LSTAR + 32
_TSC = _EFER + 16
_PENDING_EVENT, _PENDING_SIZE = _TSC + 8, 8  # and its error code
_CPU_MIN = _TSC + 8

#: LAPIC interrupt request register: 8 words of 32 vectors, 16 bytes apart (local APIC layout)
_LAPIC_IRR = 0x200


@dataclass(frozen=True, slots=True)
class Vcpu:
    """Registers of one vCPU that Kemari looks at.

    :ivar tsc: what RDTSC would have returned in the guest at the time of the save
    """

    rip: int
    cr0: int
    cr3: int
    cr4: int
    lstar: int
    efer: int
    tsc: int


class Context:
    """A mutable copy of a save file, addressed by (typecode, instance)."""

    def __init__(self, raw: bytes) -> None:
        self.raw = bytearray(raw)
        self._at: dict[tuple[int, int], tuple[int, int]] = {}
        offset = 0
        while True:
            if offset + _RECORD.size > len(raw):
                raise CheckpointError("the HVM save records have no end record")
            code, instance, length = _RECORD.unpack_from(raw, offset)
            offset += _RECORD.size
            if offset + length > len(raw):
                raise CheckpointError(
                    f"HVM save record {code}/{instance} of {length} bytes exceeds its file"
                )
            self._at[code, instance] = (offset, length)
            offset += length
            if code == END:
                break
        self.raw = self.raw[:offset]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._at)

    def vcpus(self) -> list[int]:
        """Numbers of the vCPUs that are up: Xen saves no CPU record for those that are down."""
        return sorted(instance for code, instance in self._at if code == CPU)

    def instruction_pointers_at(self) -> list[int]:
        """Offsets in the file of each vCPU's instruction pointer."""
        return [self._locate(CPU, number)[0] + _RIP for number in self.vcpus()]

    def _locate(self, code: int, instance: int) -> tuple[int, int]:
        try:
            return self._at[code, instance]
        except KeyError:
            raise CheckpointError(f"HVM save record {code}/{instance} is missing") from None

    def vcpu(self, number: int) -> Vcpu:
        """Registers of vCPU ``number``."""
        at, length = self._locate(CPU, number)
        if length < _CPU_MIN:
            raise CheckpointError(f"the CPU record has {length} bytes (expected {_CPU_MIN})")

        def word(offset: int) -> int:
            return int.from_bytes(self.raw[at + offset : at + offset + 8], "little")

        return Vcpu(
            rip=word(_RIP),
            cr0=word(_CR0),
            cr3=word(_CR3),
            cr4=word(_CR4),
            lstar=word(_LSTAR),
            efer=word(_EFER),
            tsc=word(_TSC),
        )

    def set_tsc(self, number: int, value: int) -> None:
        """Set the time-stamp counter that vCPU ``number`` goes on with."""
        at, _length = self._locate(CPU, number)
        struct.pack_into("<Q", self.raw, at + _TSC, value & (1 << 64) - 1)

    def request_interrupt(self, number: int, vector: int) -> None:
        """Make ``vector`` pending in the local APIC of vCPU ``number``."""
        at, _length = self._locate(LAPIC_REGS, number)
        offset = at + _LAPIC_IRR + 16 * (vector >> 5)
        (word,) = struct.unpack_from("<I", self.raw, offset)
        struct.pack_into("<I", self.raw, offset, word | 1 << (vector & 31))

    def only_boot_vcpu(self) -> bytes:
        """A copy in which only vCPU 0 has a CPU record, so that loading it leaves the rest down."""
        out = bytearray()
        for (code, instance), (at, length) in self._at.items():
            if code == CPU and instance:
                continue
            out += _RECORD.pack(code, instance, length) + self.raw[at : at + length]
        return bytes(out)

    def start_flat(self, number: int, entry: int) -> None:
        """Set vCPU ``number`` to run at physical address ``entry``: 32-bit, flat, no paging.

        This is the state in which Xen starts a PVH guest (``docs/misc/pvh.pandoc``), with
        interrupts off.  An event that was on its way to the guest is taken away: Xen would deliver
        it on entry, whatever the flags say.
        """
        at, length = self._locate(CPU, number)
        if length < _CPU_MIN:
            raise CheckpointError(f"the CPU record has {length} bytes (expected {_CPU_MIN})")
        struct.pack_into("<16Q", self.raw, at + 512, *([0] * 16))
        struct.pack_into("<2Q", self.raw, at + _RIP, entry, 2)
        struct.pack_into("<4Q", self.raw, at + _CR0, 0x11, 0, 0, 0)
        # cs ds es fs gs ss tr ldtr (idtr gdtr): flat 4 GiB code and data, a busy 32-bit TSS
        struct.pack_into("<8I", self.raw, at + _SEGMENTS, 8, 16, 16, 0, 0, 16, 0, 0)
        flat = 0xFFFFFFFF
        struct.pack_into("<10I", self.raw, at + _LIMITS, *([flat] * 6), 0x67, 0, 0, 0)
        struct.pack_into("<10Q", self.raw, at + _BASES, *([0] * 10))
        code_seg, data_seg, absent = 0xC9B, 0xC93, 0
        struct.pack_into(
            "<8I", self.raw, at + _RIGHTS,
            code_seg, data_seg, data_seg, data_seg, data_seg, data_seg, 0x8B, absent,
        )  # fmt: skip
        struct.pack_into("<Q", self.raw, at + _EFER, 0)
        if length >= _PENDING_EVENT + _PENDING_SIZE:
            self.raw[at + _PENDING_EVENT : at + _PENDING_EVENT + _PENDING_SIZE] = bytes(
                _PENDING_SIZE
            )

    def to_bytes(self) -> bytes:
        """The file, for ``xc_domain_hvm_setcontext``."""
        return bytes(self.raw)
