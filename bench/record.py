#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Record a page trace of a real guest; runs as root in the Dom0 that has it.

The guest is paused as for a checkpoint, every so often, and what changed since the last time is
kept, as it was and as it became.  It must not be protected meanwhile: a guest has one dirty log.
In the lab::

    vagrant/lab up && vagrant/lab guest start a
    vagrant/lab ssh a 'mkdir -p bench && cat > bench/traces.py' < bench/traces.py
    vagrant/lab ssh a 'cat > bench/record.py' < bench/record.py
    vagrant/lab ssh a 'PYTHONPATH=. python3 bench/record.py demo out.trace'
    vagrant/lab ssh a 'base64 out.trace' | base64 -d > bench/traces/NAME.trace
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.traces import PAGE, Change, Trace
from checkpoint.driver import Source, Staging
from checkpoint.errors import CheckpointError, NotQuiescent
from checkpoint.xen.host import XenHost


def record(source: Source, epochs: int, interval: float) -> Trace:
    """Watch a guest that is tracked.

    :param interval: seconds between two checkpoints
    """
    pages = source.description.pages
    last, staging = Staging(pages), Staging(pages)
    for gfns in source.base_round():
        source.copy_live(gfns, staging)
        for place, gfn in enumerate(gfns):
            last.data[gfn * PAGE : (gfn + 1) * PAGE] = _page(staging, place)
    trace = Trace(pages)
    # The first one has what changed during the copy, torn: it only brings the copy up to date.
    while len(trace.epochs) <= epochs:
        time.sleep(interval)
        try:
            source.capture(staging, lambda: None, lambda: None)
        except NotQuiescent:
            continue
        epoch: list[Change] = []
        for place in sorted(range(staging.count), key=staging.gfns.__getitem__):
            gfn, new = staging.gfns[place], bytes(_page(staging, place))
            epoch.append((gfn, bytes(last.data[gfn * PAGE : (gfn + 1) * PAGE]), new))
            last.data[gfn * PAGE : (gfn + 1) * PAGE] = new
        trace.epochs.append(epoch)
    del trace.epochs[0]
    return trace


def _page(staging: Staging, place: int) -> memoryview:
    return staging.data[place * PAGE : (place + 1) * PAGE]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="record", description="Record a guest's page trace.")
    parser.add_argument("domain")
    parser.add_argument("file", type=Path)
    parser.add_argument("--epochs", type=int, default=24, metavar="N", help="(%(default)s)")
    parser.add_argument("--interval", type=float, default=40, metavar="MS", help="(%(default)s)")
    args = parser.parse_args(argv)
    try:
        source = XenHost().open_source(args.domain)
        source.track()
        try:
            trace = record(source, args.epochs, args.interval / 1000)
        finally:
            source.untrack()
    except CheckpointError as error:
        print(f"record: {error}", file=sys.stderr)
        return 1
    trace.save(args.file)
    print(f"{trace.changes} pages in {len(trace.epochs)} epochs, {args.file.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
