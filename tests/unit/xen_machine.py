# SPDX-License-Identifier: Apache-2.0
"""A processor that knows the revive stub's instructions and no other, and a Xen that it calls.

The encodings are those of the Intel SDM volume 2; hypercalls go by registers as Xen has them for
32-bit guests (number in eax, arguments in ebx, ecx, edx).  Ports are handed out as Xen does: the
lowest one that is free.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

EAX, ECX, EDX, EBX, EBP = 0, 1, 2, 3, 5
VMCALL, VMMCALL = b"\x0f\x01\xc1", b"\x0f\x01\xd9"
DOMID_SELF = 0x7FF0
PER_VCPU_VIRQS = {0, 1, 7, 13}
#: sched_op, SCHEDOP_yield: the numbers in Xen's public headers.
YIELD = (29, 0)
STEPS = 100_000


@dataclass
class Port:
    """An event channel as the hypercalls made it."""

    kind: str
    detail: int
    vcpu: int = 0


@dataclass
class Hypervisor:
    """The calls that the stub may make.

    :ivar ports: what exists; those of the toolstack from the beginning
    :ivar made: every hypercall: (number, command, argument structure)
    :ivar refusing: commands of event-channel operations that fail, with their error
    """

    vcpus: int = 4
    ports: dict[int, Port] = field(default_factory=dict)
    made: list[tuple[int, int, bytes]] = field(default_factory=list)
    refusing: dict[int, int] = field(default_factory=dict)

    def call(self, memory: bytearray, base: int, number: int, words: tuple[int, int, int]) -> int:
        """One hypercall with its three arguments; structures are in the guest's ``memory``."""
        command, second, third = words
        if number == 24:
            assert command == 10
            at = third - base
            self.made.append((number, command, struct.pack("<I", second) + memory[at : at + 16]))
            return 0 if second < self.vcpus else -errno.ENOENT
        at = second - base
        size = {1: 12, 3: 4, 4: 4, 5: 24, 6: 8, 7: 8, 8: 8, 11: 24, 12: 8, 23: 8}[command]
        argument = memory[at : at + size]
        self.made.append((number, command, bytes(argument)))
        if number == 34:
            assert command == 23
            return 0
        assert number == 32
        if command in self.refusing:
            return -self.refusing[command]
        return self._event(command, memory, at, argument)

    def _event(self, command: int, memory: bytearray, at: int, argument: bytearray) -> int:
        words = struct.unpack(f"<{len(argument) // 4}I", argument)
        if command == 1:
            virq, vcpu, _port = words
            if virq not in PER_VCPU_VIRQS and vcpu:
                return -errno.EINVAL
            for port in self.ports.values():
                if port.kind == "virq" and (port.detail, port.vcpu) == (virq, vcpu):
                    return -errno.EEXIST
            return self._make(memory, at + 8, Port("virq", virq, vcpu))
        if command == 3:
            return 0 if self.ports.pop(words[0], None) else -errno.EINVAL
        if command == 5:
            domid, port = struct.unpack_from("<HxxI", argument)
            assert domid == DOMID_SELF
            return 0 if port in self.ports else -errno.EINVAL
        if command == 4:
            return 0 if words[0] in self.ports else -errno.EINVAL
        if command == 6:
            domid, remote = struct.unpack_from("<HH", argument)
            assert domid == DOMID_SELF
            return self._make(memory, at + 4, Port("unbound", remote))
        if command == 7:
            return self._make(memory, at + 4, Port("ipi", 0, words[0]))
        if command == 8:
            found = self.ports.get(words[0])
            if found is None or found.kind == "ipi" or words[1] >= self.vcpus:
                return -errno.EINVAL
            if found.kind == "virq" and found.detail in PER_VCPU_VIRQS:
                return -errno.EINVAL
            found.vcpu = words[1]
        return 0

    def _make(self, memory: bytearray, at: int, port: Port) -> int:
        if port.kind != "unbound" and port.vcpu >= self.vcpus:
            return -errno.ENOENT
        number = next(n for n in range(1, len(self.ports) + 2) if n not in self.ports)
        self.ports[number] = port
        struct.pack_into("<I", memory, at, number)
        return 0


def run(
    memory: bytearray, base: int, hypervisor: Hypervisor, *, instruction: bytes = VMCALL
) -> None:
    """Run the stub in ``memory`` at ``base`` until it only yields.

    :param instruction: the hypercall instruction that this processor has
    """
    registers = [0] * 8
    at, equal = 0, False

    def fetch(count: int) -> bytes:
        nonlocal at
        at += count
        return bytes(memory[at - count : at])

    def signed() -> int:
        return int.from_bytes(fetch(1), "little", signed=True)

    for _ in range(STEPS):
        here = at
        opcode = fetch(1)
        if opcode in (b"\xbd", b"\xb8"):
            registers[opcode[0] & 7] = int.from_bytes(fetch(4), "little")
        elif opcode == b"\x31":
            assert fetch(1) == b"\xdb"
            registers[EBX] = 0
        elif opcode in (b"\x8b", b"\x89"):
            (modrm,) = fetch(1)
            assert modrm >> 6 == 1
            assert modrm & 7 == EBP
            place = registers[EBP] + signed() - base
            which = modrm >> 3 & 7
            if opcode == b"\x8b":
                (registers[which],) = struct.unpack_from("<I", memory, place)
            else:
                struct.pack_into("<I", memory, place, registers[which])
        elif opcode == b"\x83":
            (modrm,) = fetch(1)
            value = signed() & 0xFFFFFFFF
            which, operation = modrm & 7, modrm >> 3 & 7
            assert modrm >> 6 == 3
            if operation == 7:
                equal = registers[which] == value
            else:
                assert operation == 0
                registers[which] = (registers[which] + value) & 0xFFFFFFFF
        elif opcode == b"\x74":
            distance = signed()
            at += distance if equal else 0
        elif opcode == b"\xeb":
            distance = signed()
            at += distance
        elif opcode == b"\x0f":
            assert opcode + fetch(2) == instruction, "an instruction that this processor lacks"
            words = (registers[EBX], registers[ECX], registers[EDX])
            if (registers[EAX], registers[EBX]) == YIELD:
                return
            result = hypervisor.call(memory, base, registers[EAX], words)
            registers[EAX] = result & 0xFFFFFFFF
        elif opcode == b"\xc7":
            assert fetch(1) == b"\x05"
            address, value = struct.unpack("<II", fetch(8))
            struct.pack_into("<I", memory, address - base, value)
        else:
            raise AssertionError(f"opcode {opcode.hex()} at {here:#x}")
    raise AssertionError("the stub does not end")


def toolstack_ports(numbers: Iterable[int]) -> dict[int, Port]:
    """Event channels that exist before the stub runs."""
    return {number: Port("unbound", 0) for number in numbers}
