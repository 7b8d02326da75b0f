# SPDX-License-Identifier: Apache-2.0
"""The output buffer on the kernel of a real Dom0.

The checks themselves run there: tests/lab/netbuffer_checks.py, with the project as it is
installed.  They have a network namespace of their own and touch neither guests nor the host.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import pytest

_PROGRAM = Path(__file__).with_name("netbuffer_checks.py")
_CHECKS = [
    line.split("(")[0].removeprefix("def check_")
    for line in _PROGRAM.read_text().splitlines()
    if line.startswith("def check_")
]


class _Result(Protocol):
    status: int
    stdout: str
    stderr: str


class _Lab(Protocol):
    def ssh(
        self,
        name: str,
        command: str,
        *,
        check: bool = True,
        timeout: float = 300,
        stdin: bytes = b"",
    ) -> _Result: ...


@pytest.fixture(scope="module")
def results(lab: _Lab) -> dict[str, dict[str, Any]]:
    """What each check on host a said."""
    done = lab.ssh("a", "python3 - 2>&1", check=False, timeout=1200, stdin=_PROGRAM.read_bytes())
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"check"')]
    found = {said["check"]: said for said in map(json.loads, lines)}
    assert found, f"the checks did not run: exit status {done.status}: {done.stdout[-4000:]}"
    return found


@pytest.mark.parametrize("check", _CHECKS)
def test_in_dom0(results: dict[str, dict[str, Any]], check: str) -> None:
    assert check in results, f"not run; these were: {', '.join(results)}"
    said = results[check]
    print(said)
    assert said["ok"], said["error"]


def test_closing_and_releasing_is_cheap(results: dict[str, dict[str, Any]]) -> None:
    """Well under a millisecond at the median, even where every instruction is emulated."""
    assert results["cost"]["close_us_p50_p99"][0] < 1000, results["cost"]
    assert results["cost"]["release_us_p50_p99"][0] < 1000, results["cost"]
