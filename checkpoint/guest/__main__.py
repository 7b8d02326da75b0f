# SPDX-License-Identifier: Apache-2.0
"""Prints what this package reads out of an image of a guest's memory, for diagnosis.

::

    python3 -m checkpoint.guest DUMP --cr3 0x2a78000 --lstar 0xffffffffa5a00080 [--cr4 0x6f0]

DUMP holds the bytes of guest RAM from physical address 0 on.
"""

from __future__ import annotations

import argparse
import json
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoint.errors import CheckpointError
from checkpoint.guest.clock import clock_shifts, timekeeping_at_rest
from checkpoint.guest.events import event_pages, grant_frames
from checkpoint.guest.layout import LinuxLayout
from checkpoint.guest.linux import Registers, read_kernel, read_layout, release
from checkpoint.guest.memory import PhysicalMemory, RamView
from checkpoint.guest.xenstore import read_watches, xenstore_at_rest


def _number(text: str) -> int:
    return int(text, 0)


def _show(memory: PhysicalMemory, layout: LinuxLayout) -> None:
    at_rest = timekeeping_at_rest(memory, layout)
    print(json.dumps(layout.to_json(), indent=1))
    print(f"timekeeping at rest: {at_rest}, xenstore at rest: {xenstore_at_rest(memory, layout)}")
    print("grant frames in use:", ", ".join(map(hex, grant_frames(memory, layout))))
    print("event pages:", ", ".join(map(hex, event_pages(memory, layout))) or "two-level ABI")
    for path, token in read_watches(memory, layout):
        print(f"watch {token} {path}")
    for write in clock_shifts(memory, layout, 0):
        print(f"clock {write.pa:#x} {write.what}")


def main(words: Sequence[str] | None = None) -> int:
    """The program; its exit status is 1 for a guest that cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python3 -m checkpoint.guest",
        description="Print what can be read of a Linux guest's kernel in an image of its memory.",
    )
    parser.add_argument("dump", type=Path, help="image of guest RAM")
    parser.add_argument("--cr3", type=_number, required=True)
    parser.add_argument("--lstar", type=_number, required=True)
    parser.add_argument("--cr4", type=_number, default=0)
    parser.add_argument("--kernel", action="store_true", help="only find the kernel, on any host")
    arguments = parser.parse_args(words)
    with arguments.dump.open("rb") as file:
        memory = RamView(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        registers = [Registers(arguments.cr3, arguments.cr4, arguments.lstar)]
        try:
            if arguments.kernel:
                kernel = read_kernel(memory, registers)
                print(f"Linux {release(kernel)}, {len(kernel.symbols)} symbols")
            else:
                _show(memory, read_layout(memory, registers))
        except CheckpointError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
