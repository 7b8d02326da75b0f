# SPDX-License-Identifier: Apache-2.0
"""The output buffer on the kernel of a real Dom0.

The checks themselves run there, with the project as it is installed: netbuffer_checks.py in
network namespaces of its own, so that it touches neither guests nor the host; netbuffer_ring.py
with a real guest and its netback.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from vagrant.lablib.guest import NAME as GUEST
from vagrant.lablib.lab import Lab
from vagrant.lablib.network import GUEST_IPV4

_HERE = Path(__file__).parent
_PROGRAM = [_HERE / f"netbuffer_{part}.py" for part in ("checks", "faults", "world")]
_RING = _HERE / "netbuffer_ring.py"
_CHECKS = [
    line.split("(")[0].removeprefix("def check_")
    for path in _PROGRAM
    for line in path.read_text().splitlines()
    if line.startswith("def check_")
]


@pytest.fixture(scope="module")
def quiet_lab(lab: Lab) -> Lab:
    """The lab with both hosts up and nothing protected, once for all tests here."""
    lab.reset()
    return lab


@pytest.fixture(scope="module")
def results(quiet_lab: Lab) -> dict[str, dict[str, Any]]:
    """What each check on host a said."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in _PROGRAM:
            archive.add(path, f"tests/lab/{path.name}")
    there = "d=$(mktemp -d) && tar -xf - -C $d && cd $d && python3 -m tests.lab.netbuffer_checks"
    done = quiet_lab.ssh("a", there, check=False, timeout=1200, stdin=packed.getvalue())
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"check"')]
    found = {said["check"]: said for said in map(json.loads, lines)}
    assert found, f"the checks did not run: exit status {done.status}: {done.stderr[-4000:]}"
    return found


@pytest.mark.parametrize("check", _CHECKS)
def test_in_dom0(results: dict[str, dict[str, Any]], check: str) -> None:
    assert check in results, f"not run; these were: {', '.join(results)}"
    said = results[check]
    print(said)
    assert said["ok"], said["error"]


def test_closing_and_releasing_is_little_more_than_a_question_to_the_kernel(
    results: dict[str, dict[str, Any]],
) -> None:
    """In proportion, because a busy emulator is slow at everything."""
    cost = results["cost"]
    bound = 5 * cost["bare_us_p50_p99"][0] + 1000
    assert cost["close_us_p50_p99"][0] < bound, cost
    assert cost["release_us_p50_p99"][0] < bound, cost


@pytest.fixture(scope="module")
def vif(quiet_lab: Lab) -> str:
    """The network interface of a guest that runs, unprotected, on host a."""
    quiet_lab.guest_start("a")
    return f"vif{quiet_lab.ssh('a', f'xl domid {GUEST}').stdout.strip()}.0"


def ring(lab: Lab, vif: str, mode: str) -> dict[str, Any]:
    done = lab.ssh("a", f"python3 - {vif} {GUEST_IPV4} {mode}", stdin=_RING.read_bytes())
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(said)
    return said


@pytest.mark.long
def test_with_a_tap_held_frames_keep_no_slot_of_the_guests_ring(lab: Lab, vif: str) -> None:
    said = ring(lab, vif, "tap")
    assert said["held"] >= 5
    assert said["got"] == ["1", "2", "3", "4", "5"]
    assert said["while_held"] == 0, "netback has not answered frames that are held"


@pytest.mark.long
def test_without_a_tap_they_would(lab: Lab, vif: str) -> None:
    """The hazard is real, so that the test above shows its cure and not its absence."""
    said = ring(lab, vif, "bare")
    assert said["got"] == ["1", "2", "3", "4", "5"]
    assert said["while_held"] >= 5
    assert said["after"] == 0
