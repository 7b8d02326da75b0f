#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What an epoch costs by the size of the guest, with the same number of dirty pages.

The guest is synthetic: address space of its size, of which only the dirty pages have memory, and a
dirty log with a bit for each page, as Xen gives it.  Measured is what Dom0 does with that on both
sides: find and copy the dirty pages, code them, and on the other side verify and apply them.  What
Xen does to hand its log over is not in it.
"""

from __future__ import annotations

import json
import mmap
import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import native
from checkpoint.codec import Decoder, Encoder, sparse
from checkpoint.driver import PAGE_SIZE, Staging

GIB: Final = (0.125, 1, 4, 16, 64)
#: Pages of each epoch, as many as in the recorded trace, and bytes that change in each of them.
DIRTY: Final = 347
CHANGE: Final = 128
EPOCHS: Final = 200


class Cost(NamedTuple):
    """Microseconds of an epoch's parts, medians.

    :ivar stage: from the dirty log to copies of the pages; the guest is paused for this
    :ivar code: from these to payloads
    :ivar apply: from payloads to the standby's memory
    :ivar copy: for comparison, copying as many pages from one place to another
    """

    stage: float
    code: float
    apply: float
    copy: float


class Guest:
    """Memory and dirty log of a guest of so many pages, of which some are written in each epoch."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.memory = sparse(pages * PAGE_SIZE)
        self.bitmap = bytearray((pages + 63) // 64 * 8)
        self._chance = random.Random(1)
        self._written = sorted(self._chance.sample(range(pages), DIRTY))
        for gfn in self._written:
            self.bitmap[gfn // 8] |= 1 << gfn % 8
            at = gfn * PAGE_SIZE
            self.memory[at : at + PAGE_SIZE] = self._chance.randbytes(PAGE_SIZE)

    def write(self) -> None:
        """Change something in each of these pages."""
        for gfn in self._written:
            at = gfn * PAGE_SIZE + self._chance.randrange(PAGE_SIZE - CHANGE)
            self.memory[at : at + CHANGE] = self._chance.randbytes(CHANGE)


def measure(pages: int) -> Cost:
    """Epochs of a guest of that size, after one that is not counted."""
    guest, standby = Guest(pages), sparse(pages * PAGE_SIZE)
    staging, nothing = Staging(DIRTY), array("Q")
    encoder, decoder = Encoder(pages), Decoder(pages)
    ram, shell = memoryview(guest.memory), memoryview(standby)
    source, target = bytes(DIRTY * PAGE_SIZE), bytearray(DIRTY * PAGE_SIZE)
    times: dict[str, list[int]] = {name: [] for name in Cost._fields}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter_ns()
        result = work()
        times[name].append(time.perf_counter_ns() - began)
        return result

    def stage() -> int:
        return native.stage(
            ram, guest.bitmap, pages, nothing, 0, nothing, staging.gfns, 0, staging.data
        )

    def apply(payloads: list[Any]) -> None:
        for coded in payloads:
            decoder.apply(decoder.verify(coded.flags, coded.payload), shell)

    for _ in range(1 + EPOCHS):
        guest.write()
        staging.count = timed("stage", stage)
        payloads = timed("code", lambda: list(encoder.encode(staging)))
        timed("apply", lambda: apply(payloads))  # noqa: B023
        timed("copy", lambda: target.__setitem__(slice(None), source))
    encoder.close()
    return Cost(*(statistics.median(times[name][1:]) / 1000 for name in Cost._fields))


def main() -> int:
    """Print a table, and one line of JSON."""
    if native.BACKEND != "native":
        print("sizes: the compiled loops are not built; `python3 setup.py build_ext --inplace`")
        return 1
    found = {size: measure(int(size * (1 << 30)) // PAGE_SIZE) for size in GIB}
    small = found[GIB[0]]
    print(f"{DIRTY} dirty pages, {mmap.PAGESIZE} bytes each; microseconds")
    print(f"{'guest GiB':>9} {'log KiB':>8} {'stage':>7} {'code':>7} {'apply':>7} {'all':>6}")
    for size, cost in found.items():
        whole = (cost.stage + cost.code + cost.apply) / (small.stage + small.code + small.apply)
        log = size * (1 << 30) / PAGE_SIZE / 8 / 1024
        print(
            f"{size:>9g} {log:>8,.0f} {cost.stage:>7.0f} {cost.code:>7.0f} {cost.apply:>7.0f} "
            f"{whole:>6.2f}"
        )
    last = found[GIB[-1]]
    figures = {
        "stage_64gib_vs_128mib": round(last.stage / small.stage, 2),
        "code_64gib_vs_128mib": round(last.code / small.code, 2),
        "apply_64gib_vs_128mib": round(last.apply / small.apply, 2),
        "stage_vs_memcpy_128mib": round(small.stage / small.copy, 2),
        "stage_vs_memcpy_64gib": round(last.stage / last.copy, 2),
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
