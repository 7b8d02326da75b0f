# SPDX-License-Identifier: Apache-2.0
"""What the command line says in words."""

from __future__ import annotations

from typing import Any

import pytest

from kemari.copying import DiskCopy, Progress
from kemari.render import progress_line, protected, statuses

MIB = 1 << 20


def figures(*disks: DiskCopy, **changes: Any) -> dict[str, Any]:
    """What the daemon tells of a first copy."""
    return Progress(list(disks), seconds=3.2, **changes).as_json()


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (figures(), "begins, 3 s"),
        (figures(DiskCopy("xvda", 0, 0)), "disk xvda: 100 %, 0 of 0 MiB, 3 s"),
        (
            figures(DiskCopy("xvda", 2048 * MIB, 1948 * MIB)),
            "disk xvda:   4 %, 100 of 2048 MiB, 3 s",
        ),
        (
            figures(
                DiskCopy("xvda", 8 * MIB, 0),
                DiskCopy("xvdb", 8 * MIB, 2 * MIB),
                DiskCopy("xvdc", 8 * MIB, 8 * MIB),
            ),
            "disk xvdb:  75 %, 6 of 8 MiB, 1 more to copy, 3 s",
        ),
        (
            figures(DiskCopy("xvda", 8 * MIB, 0), round=2, done=64, total=256, wire_bytes=MIB),
            "round 2:  25 % of 256 pages, 1.0 MiB sent, 3 s",
        ),
    ],
)
def test_the_first_copy_is_told_disk_by_disk_and_then_by_rounds(
    told: dict[str, Any], line: str
) -> None:
    assert progress_line(told) == line
    assert len(line) <= 72, "more than the command line overwrites"


def test_the_status_tells_how_far_each_disk_is() -> None:
    status = {
        "guest": "web",
        "role": "primary",
        "state": "copying",
        "protected": False,
        "peer": "b",
        "host": "a",
        "generation": 3,
        "since": 0.0,
        "why": "first copy under way",
        "progress": figures(DiskCopy("xvda", 8 * MIB, 0), DiskCopy("xvdb", 8 * MIB, 2 * MIB)),
    }
    lines = statuses([status]).splitlines()
    assert "  first copy  disk xvda: 100 %, 8 of 8 MiB" in lines
    assert "              disk xvdb:  75 %, 6 of 8 MiB" in lines
    assert lines[-1] == "              3 s"


def test_the_status_has_a_line_for_each_disk() -> None:
    disk = {"vdev": "xvda", "target": "/dev/vg0/web", "unconfirmed": 3 * MIB, "waits": 2}
    status = {
        "guest": "web",
        "role": "primary",
        "state": "protected",
        "protected": True,
        "peer": "b",
        "host": "a",
        "generation": 3,
        "since": 0.0,
        "why": "b holds a complete copy",
        "progress": figures(DiskCopy("xvda", 8 * MIB, 0)),
        "disks": [disk | {"errors": 0}],
    }
    last = statuses([status]).splitlines()[-1]
    assert last.startswith("  disk        xvda (/dev/vg0/web): 3.0 MiB not yet on the")
    assert last.endswith(", 2 waits, 0 errors")


def test_what_was_copied_is_told_in_the_end() -> None:
    status = {"guest": "web", "peer": "b", "protected": True}
    memory = status | {"progress": figures(wire_bytes=MIB)}
    assert protected(memory) == "web is protected to b (first copy 1.0 MiB in 3.2 s)"
    both = status | {"progress": figures(DiskCopy("xvda", 8 * MIB, 0), wire_bytes=MIB)}
    assert "(first copy 1.0 MiB of memory, 8.0 MiB of disks in 3.2 s)" in protected(both)
