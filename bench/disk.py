#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the way through the disk's server costs, on any Linux: ``docs/disk.md``, Cost.

fio does the same to a file itself, to nbdkit's own file plug-in, to ours, and to ours while every
change is written down and read, by turns; figures are medians, and ratios to the file itself.  The
kernel's nbd driver and blkback are not in it.  Needs nbdkit and fio.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import diskbuffer  # noqa: E402
from diskbuffer.disk import DiskBuffer  # noqa: E402

#: Name -> (what fio does, bytes of a request, requests under way).
JOBS = {
    "sequential write": ("write", "256k", 8),
    "sequential read": ("read", "256k", 8),
    "random write": ("randwrite", "4k", 16),
    "random read": ("randread", "4k", 16),
}
WAYS = ("file", "nbdkit", "ours", "ours, replicated")


def fio(job: tuple[str, str, int], target: list[str], seconds: float) -> float:
    """Requests per second."""
    what, size, depth = job
    argv = ["fio", "--name=job", f"--rw={what}", f"--bs={size}", f"--iodepth={depth}"]
    argv += [
        f"--runtime={seconds}",
        "--time_based",
        "--output-format=json",
        "--randseed=1",
        *target,
    ]
    done = subprocess.run(argv, capture_output=True, check=False, text=True)
    if done.returncode != 0:
        raise SystemExit(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
    (result,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    rate: float = result["write" if "write" in what else "read"]["iops"]
    return rate


@contextmanager
def served(folder: Path, *plugin: str) -> Iterator[list[str]]:
    """Serve by nbdkit; how fio reaches it."""
    socket, pid = folder / "nbd", folder / "pid"
    for path in (socket, pid):
        path.unlink(missing_ok=True)
    subprocess.run(
        ["nbdkit", "--unix", socket, "--pidfile", pid, *plugin],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while not (pid.exists() and pid.read_text()):
        threading.Event().wait(0.01)
    process = os.pidfd_open(int(pid.read_text()))
    try:
        yield ["--ioengine=nbd", f"--uri=nbd+unix:///?socket={socket}"]
    finally:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        select.select([process], [], [], 60)
        os.close(process)


@contextmanager
def replicated(folder: Path) -> Iterator[None]:
    """Read the stream as a daemon would, and forget it."""
    stop = threading.Event()
    ready = threading.Event()

    async def read() -> None:
        disk = DiskBuffer(folder)
        await disk.open()
        pair, peer = str(uuid.uuid4()), str(uuid.uuid4())
        await disk.begin(pair=pair, peer=peer, generation=1, differing=None)
        ready.set()
        while not stop.is_set():
            async for _batch in disk.read(disk.position()):
                pass
            await asyncio.sleep(0.005)
        await disk.teardown()

    reader = threading.Thread(target=lambda: asyncio.run(read()))
    reader.start()
    if not ready.wait(30):
        raise SystemExit("the stream could not be opened")
    try:
        yield
    finally:
        stop.set()
        reader.join()


def measure(folder: Path, way: str, job: tuple[str, str, int], seconds: float) -> float:
    """One figure."""
    target = folder / "disk.img"
    if way == "file":
        return fio(job, ["--ioengine=libaio", f"--filename={target}"], seconds)
    if way == "nbdkit":
        with served(folder, "file", f"file={target}") as how:
            return fio(job, how, seconds)
    ours = [str(diskbuffer.plugin()), f"target={target}", f"dir={folder}"]
    with served(folder, *ours, f"bitmap={folder / 'state' / 'bitmap'}") as how:
        if way == "ours":
            return fio(job, how, seconds)
        with replicated(folder):
            return fio(job, how, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="where the file is made")
    parser.add_argument("--size", type=int, default=512, help="of the file, MiB")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="kemari-disk-", dir=given.folder) as name:
        folder = Path(name)
        (folder / "state").mkdir()
        target = folder / "disk.img"
        (folder / "state" / "target").write_text(f"{target}\n")
        with target.open("wb") as file:
            for _ in range(given.size):
                file.write(os.urandom(1 << 20))
        for title, job in JOBS.items():
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(given.turns):
                for way in WAYS:
                    rates[way].append(measure(folder, way, job, given.seconds))
            medians = {way: statistics.median(rates[way]) for way in WAYS}
            results[title] = medians
            shown = ", ".join(
                f"{way} {rate:,.0f}/s ({rate / medians['file']:.2f})"
                for way, rate in medians.items()
            )
            print(f"{title} of {job[1]}: {shown}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
