# SPDX-License-Identifier: Apache-2.0
"""All checks one after the other: lint, types, documents, speed, unit, property and lab tests.

The last line is ``N passed, N failed``, over all tests and with one for each step that is not a
test; the exit status is 0 only if nothing failed.  A lab test that was skipped counts as failed:
what is for real hosts must have run on them.

Unit tests mostly wait, for what happens in real time.  Beside them runs, with the lowest priority,
what computes (the property tests; the proof, on its virtual clock) or waits for a network (building
the labs' disks); it has ended before a lab is started.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "check"
MINUTES = 60.0


@dataclass(frozen=True, slots=True)
class Count:
    """What a step came to.

    :ivar skipped: tests that did not run, counted neither as passed nor as failed
    """

    passed: int
    failed: int
    skipped: int = 0


def run(argv: list[str], timeout: float, **environment: str) -> int:
    """Run a program with our own output; its exit status, or 124 if it took too long."""
    process = subprocess.Popen(
        argv, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True
    )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        print(f"check: took longer than {timeout / MINUTES:.0f} minutes: {' '.join(argv)}")
        interrupt(process)
        return 124
    except BaseException:
        interrupt(process)
        raise


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """End a program that leads a process group, so that it takes down its lab and tidies up."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def step(*words: str) -> Count:
    """A step that passes or fails as a whole."""
    return whole(run([sys.executable, *words], 10 * MINUTES))


def whole(status: int) -> Count:
    """What a program came to that passes or fails as a whole."""
    return Count(int(status == 0), int(status != 0))


class Beside:
    """A step that runs beside those before it until its turn.

    :param words: what Python runs
    :param count: what it came to, by its exit status
    """

    def __init__(self, name: str, *words: str, count: Callable[[int], Count] = whole) -> None:
        self._log = OUT / f"{name}.log"
        self._words = words
        self._count = count
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin (idempotent)."""
        if self._process is not None:
            return
        with self._log.open("wb") as log:
            # Of this session: where the kernel groups tasks by session, niceness is within one.
            self._process = subprocess.Popen(
                ["nice", "-n", "19", sys.executable, *self._words],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def __call__(self) -> Count:
        """Wait for its end, and print what it said."""
        self.start()
        assert self._process is not None
        try:
            status = self._process.wait(15 * MINUTES)
        except subprocess.TimeoutExpired:
            print(f"check: took longer than 15 minutes: {' '.join(self._words)}")
            status = 124
        self.end()
        sys.stdout.write(self._log.read_text(errors="replace"))
        return self._count(status)

    def end(self) -> None:
        """End it if it still runs (idempotent)."""
        if self._process is not None and self._process.poll() is None:
            interrupt(self._process)


def pytest_words(name: str, *words: str) -> list[str]:
    """What Python runs for a run of pytest that :func:`pytest_count` can read."""
    return ["-m", "pytest", "-ra", f"--junitxml={OUT / name}.xml", *words]


def pytest_count(name: str, status: int, must_run: bool = False) -> Count:
    """What a run of pytest came to.

    :param must_run: whether a skipped test is a failed one
    """
    try:
        suites = list(ElementTree.parse(OUT / f"{name}.xml").iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return Count(0, 1)  # it did not come to its end
    total, failures, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites)
        for key in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    passed = total - failed - skipped
    if must_run:
        failed, skipped = failed + skipped, 0
    if status != 0 and not failed:
        failed = 1  # no tests, an interrupt, a timeout
    return Count(passed, failed, skipped)


def pytest(
    name: str, *words: str, timeout: float, must_run: bool = False, **environment: str
) -> Count:
    """A run of pytest, and what it came to."""
    status = run([sys.executable, *pytest_words(name, *words)], timeout, **environment)
    return pytest_count(name, status, must_run)


def lab_state(suite: str) -> Path:
    """The folder of a suite's lab."""
    return OUT / f"lab-{suite}"


def disk(suite: str) -> Beside:
    """Building the disk of a suite's lab: mostly waiting for packages, where there is none yet."""
    state = lab_state(suite)
    return Beside(f"disk-{suite}", "vagrant/lab", "--state", str(state), "--suite", suite, "build")


def lab(suite: str, *words: str, timeout: float, **environment: str) -> Count:
    """The tests on real Xen, in a lab of their own."""
    state = lab_state(suite)
    try:
        return pytest(
            f"lab-{suite}",
            "-v",
            "--durations=15",
            f"--lab-suite={suite}",
            f"--lab-state={state}",
            *words,
            "tests/lab",
            timeout=timeout,
            must_run=True,
            **environment,
        )
    finally:
        run([sys.executable, "vagrant/lab", "--state", str(state), "down"], 5 * MINUTES)


STEPS: dict[str, Callable[[], Count]] = {
    "lint": lambda: step("-m", "ruff", "check", "--quiet", "."),
    "format": lambda: step("-m", "ruff", "format", "--quiet", "--check", "."),
    "types": lambda: step("-m", "mypy"),
    "docs": lambda: step(".ci/links.py"),
    "instructions": lambda: step("bench/instructions.py"),
    "unit": lambda: pytest("unit", "-q", "tests/unit", timeout=15 * MINUTES),
    "property": Beside(
        "property",
        *pytest_words("property", "-q", "tests/property"),
        count=lambda status: pytest_count("property", status),
    ),
    "prove": Beside("prove", "-m", "tests.prove", "--brief"),
    "disk-bookworm": disk("bookworm"),
    "disk-trixie": disk("trixie"),
    "lab-bookworm": lambda: lab(
        "bookworm",
        "-m",
        "not long and not short",
        timeout=45 * MINUTES,
        KEMARI_LAB_CUTS="1",
        KEMARI_LAB_DISK_CUTS="1",
    ),
    "lab-trixie": lambda: lab("trixie", "-m", "short", timeout=20 * MINUTES, KEMARI_LAB_CUTS="1"),
}
#: Only when asked for by name.
FURTHER: dict[str, Callable[[], Count]] = {
    "lab-long": lambda: lab("bookworm", "-m", "long or short", timeout=6 * 60 * MINUTES),
}


def main() -> int:
    """Run the steps that were asked for, or all."""
    parser = argparse.ArgumentParser(prog="check", description="All checks, or some of them.")
    known = STEPS | FURTHER
    parser.add_argument(
        "steps",
        nargs="*",
        metavar="STEP",
        help=f"{', '.join(STEPS)} (all of these); {', '.join(FURTHER)} (hours)",
    )
    wanted = parser.parse_args().steps or list(STEPS)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        parser.error(f"no step {', '.join(unknown)}; expected {', '.join(known)}")
    OUT.mkdir(parents=True, exist_ok=True)
    for old in OUT.glob("*.xml"):
        old.unlink()
    beside = [each for each in map(known.get, wanted) if isinstance(each, Beside)]
    rows = []
    try:
        for each in beside:
            each.start()
        for name in wanted:
            print(f"---- {name} ----", flush=True)
            began = time.monotonic()
            rows.append((name, known[name](), time.monotonic() - began))
    finally:
        for each in beside:
            each.end()
    print("----")
    for name, count, seconds in rows:
        skipped = f", {count.skipped} skipped" if count.skipped else ""
        print(
            f"{name:<14} {seconds:7.1f} s   {count.passed} passed, {count.failed} failed{skipped}"
        )
    passed = sum(count.passed for _, count, _ in rows)
    failed = sum(count.failed for _, count, _ in rows)
    print(f"{passed} passed, {failed} failed", flush=True)
    return 0 if not failed else 1


if __name__ == "__main__":
    sys.exit(main())
