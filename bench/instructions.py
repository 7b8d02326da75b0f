#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Whether a page loop has come to need more instructions than it did: counted by callgrind.

Counts do not depend on how busy the machine is, so that a tenth more is a fact and not noise.  They
do depend on the compiler and on the processor's vector units; ``bench/instructions.json`` has them
for those that were tried, and others get a wide margin.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import traces  # noqa: E402
from bench.micro import HERE, compile_loops  # noqa: E402

#: Trace -> loops that are counted on it.
COUNTED: Final = {
    "synthetic-qemu-examples": ("compare", "delta", "verify", "apply", "scan", "stage"),
    "synthetic-few-words": ("delta", "apply"),
    "synthetic-zeroed": ("zero", "delta"),
}
CHANGES: Final = 512
#: How much more is too much, with a compiler that the counts are known of, and with others.
MARGIN: Final = 1.10
OTHERS: Final = 1.60
LIMITS: Final = HERE / "instructions.json"
_SUMMARY = re.compile(r"^(?:summary|totals):\s*(\d+)", re.MULTILINE)


def environment() -> str:
    """What counts depend on, as a key of the file of limits."""
    compiler = os.environ.get("CC", "cc").split()
    version = subprocess.run(
        [*compiler, "-dumpversion"], check=True, capture_output=True, text=True
    ).stdout.strip()
    flags = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split()
    return f"cc {version.partition('.')[0]}, {'avx2' if 'avx2' in flags else 'plain'}"


def count(program: Path, trace: Path, loop: str, folder: Path) -> int:
    """Instructions within one loop.

    :raise subprocess.CalledProcessError: valgrind or the program failed
    """
    out = folder / "callgrind.out"
    subprocess.run(
        [
            "valgrind",
            "-q",
            "--tool=callgrind",
            f"--callgrind-out-file={out}",
            f"--toggle-collect=measured_{loop}",
            str(program),
            "once",
            str(trace),
            loop,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found = _SUMMARY.search(out.read_text())
    if found is None or int(found[1]) == 0:
        raise SystemExit(f"instructions: callgrind counted nothing in {loop}")
    return int(found[1])


def count_all() -> dict[str, float]:
    """Instructions a page, by "trace: loop"."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="kemari-bench-") as name:
        folder = Path(name)
        program = compile_loops(folder, "-g")
        for kind, loops in COUNTED.items():
            plain = folder / "trace"
            plain.write_bytes(traces.synthetic(kind, changes=CHANGES).plain())
            for loop in loops:
                total = count(program, plain, loop, folder)
                found[f"{kind}: {loop}"] = round(total / CHANGES, 1)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit status is 1 if a loop needs too many."""
    parser = argparse.ArgumentParser(prog="instructions", description="Instructions of the loops.")
    parser.add_argument("--write", action="store_true", help="make today's counts the known ones")
    args = parser.parse_args(argv)
    known: dict[str, dict[str, float]] = json.loads(LIMITS.read_text())
    here, found = environment(), count_all()
    if args.write:
        LIMITS.write_text(json.dumps(known | {here: found}, indent=2, sort_keys=True) + "\n")
    margin = MARGIN if here in known else OTHERS
    limits = known.get(here) or known[sorted(known)[0]]
    worse = 0
    print(f"{here}: at most {margin:.2f} times the known count")
    for name, value in found.items():
        limit = limits.get(name)
        bad = limit is not None and value > limit * margin
        worse += bad
        said = "new" if limit is None else f"known {limit:9.1f}"
        print(
            f"  {name:<34} {value:9.1f} instructions a page, {said}{'   TOO MANY' if bad else ''}"
        )
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
