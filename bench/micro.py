#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How fast the loops over guest pages are, on any Linux: ``docs/performance.md``.

Each loop is timed against memcpy of the same bytes, by turns in one run, the median of several
repetitions; so are the compressors, the checksum and the framing.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lz4.block
import zstandard

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import traces  # noqa: E402
from checkpoint import native  # noqa: E402
from checkpoint.codec import Decoder, Encoder  # noqa: E402
from checkpoint.driver import PAGE_SIZE, Staging  # noqa: E402
from checkpoint.wire import FrameType, Parser, encode_frame  # noqa: E402

HERE = Path(__file__).resolve().parent
RECORDED = HERE / "traces"
#: As ``setup.py`` has them, which is what users get.
FLAGS = ("-O3", "-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-function")


@dataclass(frozen=True, slots=True)
class Speed:
    """What a loop came to.

    :ivar rate: bytes of pages a nanosecond, which is GB/s, at the median
    :ivar ratio: the same over memcpy's
    :ivar made: bytes that came out, over bytes of pages; 0 where nothing is made
    """

    rate: float
    ratio: float
    made: float


def compile_loops(folder: Path, *flags: str) -> Path:
    """The program ``bench/loops.c``.

    :raise subprocess.CalledProcessError: the compiler refused
    """
    program = folder / "loops"
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run(
        [
            *compiler,
            *FLAGS,
            *flags,
            f"-I{ROOT / 'checkpoint'}",
            str(HERE / "loops.c"),
            "-o",
            str(program),
        ],
        check=True,
    )
    return program


def native_loops(program: Path, plain: Path, repetitions: int) -> dict[str, Speed]:
    """Time the loops of ``bench/loops.c``; before that, whether they do what they should.

    :raise subprocess.CalledProcessError: they do not
    """
    subprocess.run([str(program), "check", str(plain)], check=True, stdout=subprocess.DEVNULL)
    argv = [str(program), "time", str(plain), str(repetitions)]
    lines = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split("\n")
    took: dict[str, list[int]] = {}
    made: dict[str, int] = {}
    pages = 0
    for line in lines[:-1]:
        name, nanoseconds, out, count = line.split()
        took.setdefault(name, []).append(int(nanoseconds))
        made[name], pages = int(out), int(count)
    return _speeds(took, made, pages * PAGE_SIZE)


def _speeds(
    took: dict[str, list[int]], made: dict[str, int], size: int, unit: float = 0.0
) -> dict[str, Speed]:
    median = {name: statistics.median(times) for name, times in took.items()}
    unit = unit or median["memcpy"]
    return {
        name: Speed(size / time, unit / time, made.get(name, 0) / size)
        for name, time in median.items()
    }


def python_loops(trace: traces.Trace, repetitions: int, memcpy: float) -> dict[str, Speed]:
    """Time what Python calls: compressors, checksum, framing, and an epoch from pages to pages.

    :param memcpy: its rate on the same trace
    """
    epochs = [_staged(epoch) for epoch in trace.epochs if epoch]
    before = [_before(trace, number) for number in range(len(trace.epochs)) if trace.epochs[number]]
    bodies = _bodies(trace, epochs, before)
    size = trace.changes * PAGE_SIZE
    took: dict[str, list[int]] = {}
    made: dict[str, int] = {}

    def timed(name: str, work: Callable[[], int]) -> None:
        begin = time.perf_counter_ns()
        result = work()
        took.setdefault(name, []).append(time.perf_counter_ns() - begin)
        made[name] = result

    zstd = zstandard.ZstdCompressor(level=1)
    framed = [b"".join(encode_frame(FrameType.PAGES, body, epoch=1)[0]) for body in bodies]
    for _ in range(repetitions):
        timed("lz4 of deltas", lambda: sum(len(lz4.block.compress(body)) for body in bodies))
        timed("zstd of deltas", lambda: sum(len(zstd.compress(body)) for body in bodies))
        timed("crc32 of deltas", lambda: sum(zlib.crc32(body) & 0 for body in bodies))
        timed("framing", lambda: _frame(bodies))
        timed("parsing", lambda: _parse(framed))
        encoder, decoder, memory = _ends(trace, before)
        timed("code and apply", lambda: _encode(encoder, epochs, decoder, memory))  # noqa: B023
    return _speeds(took, made, size, size / memcpy)


def _staged(epoch: Sequence[traces.Change]) -> Staging:
    staging = Staging(len(epoch))
    for place, (gfn, _old, new) in enumerate(epoch):
        staging.gfns[place] = gfn
        staging.data[place * PAGE_SIZE : (place + 1) * PAGE_SIZE] = new
    staging.count = len(epoch)
    return staging


def _before(trace: traces.Trace, number: int) -> Staging:
    return _staged([(gfn, old, old) for gfn, old, _new in trace.epochs[number]])


def _bodies(
    trace: traces.Trace, epochs: Sequence[Staging], before: Sequence[Staging]
) -> list[bytes]:
    """Payloads, not compressed, of every epoch."""
    encoder = Encoder(trace.pages, compression="none")
    found: list[bytes] = []
    for old, new in zip(before, epochs, strict=True):
        list(encoder.encode(old))
        found += [coded.payload for coded in encoder.encode(new)]
    return found


def _frame(bodies: Sequence[bytes]) -> int:
    return sum(len(encode_frame(FrameType.PAGES, body, epoch=1)[0][0]) for body in bodies)


def _parse(framed: Sequence[bytes]) -> int:
    parser = Parser()
    return sum(frame.size for data in framed for frame in parser.feed(data))


def _ends(trace: traces.Trace, before: Sequence[Staging]) -> tuple[Encoder, Decoder, memoryview]:
    encoder, decoder = Encoder(trace.pages), Decoder(trace.pages)
    memory = Staging(trace.pages).data
    seen: set[int] = set()
    for staging in before:
        for coded in encoder.encode(staging):
            decoder.apply(decoder.verify(coded.flags, coded.payload), memory)
        seen.update(staging.gfns[: staging.count])
    return encoder, decoder, memory


def _encode(
    encoder: Encoder, epochs: Sequence[Staging], decoder: Decoder, memory: memoryview
) -> int:
    used = 0
    for staging in epochs:
        for coded in encoder.encode(staging):
            used += len(coded.payload)
            decoder.apply(decoder.verify(coded.flags, coded.payload), memory)
    return used


def show(name: str, trace: traces.Trace, speeds: dict[str, Speed]) -> None:
    """A table for one trace."""
    print(f"\n{name}: {trace.changes:,} pages in {len(trace.epochs)} epochs")
    print(f"  {'loop':<16} {'GB/s':>8} {'memcpy = 1':>11} {'made':>7}")
    for loop, speed in speeds.items():
        made = f"{speed.made:7.3f}" if 0 < speed.made != 1 else ""
        print(f"  {loop:<16} {speed.rate:8.2f} {speed.ratio:11.2f} {made}")


def processor() -> str:
    """What this machine's processor calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="micro", description="Speed of the page loops.")
    parser.add_argument("--repetitions", type=int, default=15, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--trace", action="append", type=Path, metavar="FILE", help="others than those at hand"
    )
    args = parser.parse_args(argv)
    if native.BACKEND != "native":
        print("micro: the compiled loops are not built; `python3 setup.py build_ext --inplace`")
        return 1
    paths = args.trace or sorted(RECORDED.glob("*.trace"))
    found = {path.stem: traces.load(path) for path in paths}
    found |= {name: traces.synthetic(name) for name in traces.SYNTHETIC}
    print(f"{processor()}, Python {platform.python_version()}, {args.repetitions} repetitions")
    results: dict[str, dict[str, Speed]] = {}
    with tempfile.TemporaryDirectory(prefix="kemari-bench-") as folder:
        program = compile_loops(Path(folder))
        for name, trace in found.items():
            plain = Path(folder) / "trace"
            plain.write_bytes(trace.plain())
            speeds = native_loops(program, plain, args.repetitions)
            speeds |= python_loops(trace, args.repetitions, speeds["memcpy"].rate)
            show(name, trace, speeds)
            results[name] = speeds
    print()
    print(json.dumps(closing(results), separators=(",", ":")))
    return 0


def closing(results: dict[str, dict[str, Speed]]) -> dict[str, Any]:
    """The line of JSON: the issue's figures on QEMU's own examples, and all of them by trace."""
    examples = results["synthetic-qemu-examples"]
    return {
        "zero_vs_memcpy": round(examples["zero"].ratio, 2),
        "compare_vs_memcpy": round(examples["compare"].ratio, 2),
        "delta_gb_per_s": round(examples["delta"].rate, 2),
        "apply_gb_per_s": round(examples["apply"].rate, 2),
        "xbzrle_gb_per_s": round(examples["xbzrle"].rate, 2),
        "traces": {
            name: {loop: round(speed.rate, 2) for loop, speed in speeds.items()}
            for name, speeds in results.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
