#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a reference smaller than the guest costs: bytes on the wire and time of the encoder.

A guest of 128 MiB writes 128 bytes at a time to pages that Zipf's law chooses: the page of rank r
with a chance of 1/r, so that a few are written again and again and most hardly ever.  Counted is
the second half of the epochs: at first a reference holds what was copied last, which is nothing
special.  The recorded traces have too few pages for a reference to be too small.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint.codec import Encoder
from checkpoint.driver import PAGE_SIZE, Staging

PAGES: Final = 32768
EPOCHS: Final = 800
WRITTEN: Final = 512
WRITE: Final = 128
PERCENT: Final = (5, 10, 25, 50, 100)


def first_copy(content: bytearray) -> Iterator[Staging]:
    """All of the guest, as the first copy has it."""
    for first in range(0, PAGES, WRITTEN):
        yield _staged(content, range(first, first + WRITTEN))


def epochs(content: bytearray, chance: random.Random) -> Iterator[Staging]:
    """Epochs of a guest that writes by Zipf's law; each is made when it is asked for."""
    ranks = list(range(PAGES))
    chance.shuffle(ranks)
    weights = list(itertools.accumulate(1 / rank for rank in range(1, PAGES + 1)))
    for _ in range(EPOCHS):
        written = sorted(set(chance.choices(ranks, cum_weights=weights, k=WRITTEN)))
        for gfn in written:
            at = gfn * PAGE_SIZE + chance.randrange(PAGE_SIZE - WRITE)
            content[at : at + WRITE] = chance.randbytes(WRITE)
        yield _staged(content, written)


def _staged(content: bytearray, gfns: range | list[int]) -> Staging:
    staging = Staging(len(gfns))
    for place, gfn in enumerate(gfns):
        staging.gfns[place] = gfn
        page = content[gfn * PAGE_SIZE : (gfn + 1) * PAGE_SIZE]
        staging.data[place * PAGE_SIZE : (place + 1) * PAGE_SIZE] = page
    staging.count = len(gfns)
    return staging


def measure(percent: int) -> tuple[int, float, int]:
    """(payload bytes of all epochs, seconds that encoding them took, pages that went whole)."""
    chance = random.Random(1)
    content = bytearray(chance.randbytes(PAGES * PAGE_SIZE))
    encoder = Encoder(PAGES, reference_pages=PAGES * percent // 100)
    for staging in first_copy(content):
        list(encoder.encode(staging))
    before, seconds = encoder.figures.copy(), 0.0
    for number, staging in enumerate(epochs(content, chance)):
        if number == EPOCHS // 2:
            before, seconds = encoder.figures.copy(), 0.0
        began = time.perf_counter()
        list(encoder.encode(staging))
        seconds += time.perf_counter() - began
    after = encoder.figures
    return after.coded_bytes - before.coded_bytes, seconds, after.raw - before.raw


def main() -> None:
    """Print a table, and one line of JSON."""
    found = {percent: measure(percent) for percent in PERCENT}
    whole_bytes, whole_seconds, _ = found[100]
    print(f"{'reference':>9} {'bytes':>7} {'time':>6} {'whole pages':>12}")
    for percent, (size, seconds, raw) in found.items():
        ratios = f"{size / whole_bytes:>7.2f} {seconds / whole_seconds:>6.2f}"
        print(f"{percent:>7} % {ratios} {raw:>12,}")
    print(json.dumps({f"wire_at_{p}": round(found[p][0] / whole_bytes, 3) for p in PERCENT}))


if __name__ == "__main__":
    main()
