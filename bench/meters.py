# SPDX-License-Identifier: Apache-2.0
"""What the hosts spent: processor time of Dom0, its memory, and bytes on the replication link."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vagrant.lablib.errors import LabError
from vagrant.lablib.lab import Lab
from vagrant.lablib.network import HOSTS, tap

# Xen's own account of Dom0, and what its kernel has left.
_COMMAND = "xl list 0 && grep ^MemAvailable: /proc/meminfo"


@dataclass(frozen=True, slots=True)
class Reading:
    """All meters at one time.

    :ivar at: seconds of this machine's CLOCK_MONOTONIC
    :ivar wire: bytes that the replication link has carried, both directions
    :ivar cpu: seconds of processor that each Dom0 has used
    :ivar free: bytes of memory that each Dom0 has left
    """

    at: float
    wire: int
    cpu: tuple[float, float]
    free: tuple[int, int]


class Watch:
    """The meters at the begin and at the end of a workload.

    :ivar readings: in the order in which they were taken
    """

    def __init__(self, lab: Lab) -> None:
        self.readings: list[Reading] = []
        self._lab = lab

    def mark(self) -> float:
        """Read the meters; when that was, as :attr:`Reading.at`.

        :raises LabError: as :func:`read` does
        """
        self.readings.append(read(self._lab))
        return self.readings[-1].at


def read(lab: Lab) -> Reading:
    """Read all of them.

    :raises LabError: a host has no power, or tells something else
    """
    at = time.monotonic()
    # First what takes no time; an emulated host takes a second to tell.
    link = lab.run_in_net(["ip", "-statistics", "-json", "link", "show", tap(HOSTS[0], "repl")])
    with ThreadPoolExecutor() as pool:
        texts = list(pool.map(lambda name: lab.ssh(name, _COMMAND).stdout, HOSTS))
    (cpu_a, free_a), (cpu_b, free_b) = (parse_host(text) for text in texts)
    return Reading(at, parse_link(link.stdout), (cpu_a, cpu_b), (free_a, free_b))


def parse_host(text: str) -> tuple[float, int]:
    """Processor seconds and free bytes, as the command on a host tells them.

    :raises LabError: the text is something else
    """
    try:
        _, domain, memory = text.strip().splitlines()
        name, domid, *_, seconds = domain.split()
        label, kib, unit = memory.split()
        if (name, domid, label, unit) == ("Domain-0", "0", "MemAvailable:", "kB"):
            return float(seconds), int(kib) << 10
    except ValueError:
        pass
    raise LabError("A host's meters cannot be read; expected `xl list 0` and MemAvailable.", text)


def parse_link(text: str) -> int:
    """Bytes of both directions, out of ``ip -statistics -json link show``.

    :raises LabError: the text is something else
    """
    try:
        (link,) = json.loads(text)
        counted = link["stats64"]
        return int(counted["rx"]["bytes"]) + int(counted["tx"]["bytes"])
    except (ValueError, KeyError, TypeError):
        raise LabError("The link's counters cannot be read; expected JSON of ip.", text) from None
