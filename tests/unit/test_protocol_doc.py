# SPDX-License-Identifier: Apache-2.0
"""docs/protocol.md and the code say the same."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from checkpoint import codec, hello, lifeline, link, network, receiver, wire

TEXT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


def tables() -> list[list[dict[str, str]]]:
    """Every table of the document, as rows of column name to cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE):
        lines = [
            [cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in block.splitlines()
        ]
        found.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return found


def table(*columns: str) -> list[dict[str, str]]:
    """The rows of the first table with exactly these columns."""
    return next(rows for rows in tables() if tuple(rows[0]) == columns)


def test_frame_types() -> None:
    rows = table("type", "name", "from", "on", "epoch", "flags", "payload", "bytes")
    documented = {
        row["name"]: (
            int(row["type"]),
            wire.FrameSpec(
                sender=row["from"].replace(" ", ""),
                roles=row["on"].replace(" ", ""),
                epoch=row["epoch"] == "n",
                flags=int(row["flags"], 16),
                kind=row["payload"],
                least=int(row["bytes"].split(" to ")[0]),
                most=int(row["bytes"].split(" to ")[1]),
            ),
        )
        for row in rows
    }
    assert len(documented) == len(rows)
    assert documented == {kind.name: (kind.value, spec) for kind, spec in wire.SPECS.items()}
    assert set(wire.SPECS) == set(wire.FrameType)


def test_header_layout() -> None:
    rows = table("offset", "size", "field", "meaning")
    letters = {"4": "4s", "1": "B", "2": "H"}
    first, *middle = rows
    layout = "<" + letters[first["size"]]
    for row in middle:
        layout += {"1": "B", "2": "H", "4": "I", "8": "Q"}[row["size"]]
        assert int(row["offset"]) == struct.calcsize(layout) - int(row["size"])
    assert layout == wire.HEADER.format
    names = [row["field"] for row in rows]
    assert names == ["magic", "type", "flags", "reserved", "length", "epoch", "crc32"]
    assert f"header of {wire.HEADER.size} bytes" in TEXT
    assert f"`{wire.MAGIC.decode()}`" in first["meaning"]


def test_error_codes_are_the_ones_in_use() -> None:
    documented = {row["code"].strip("`") for row in table("code", "meaning")}
    sources = "".join(
        Path(module.__file__).read_text()
        for module in (link, network, receiver, lifeline)
        if module.__file__
    )
    used = {code for code in documented if f'"{code}"' in sources}
    assert used == documented


def test_limits() -> None:
    assert f"count: pages in this batch, 1 to {codec.MAX_BATCH_PAGES}" in TEXT
    assert codec.MAX_BATCH_PAGES * 4104 + 8 <= wire.MAX_PAGES
    assert (codec.MAX_BATCH_PAGES + 5) * 4104 + 8 > wire.MAX_PAGES
    assert f"length of the state, 0 to {wire.MAX_STATE}" in TEXT
    assert f"at most {wire.MAX_AGE_NS // 10**9} s" in TEXT
    assert link.BEATS >= 4
    assert network.PLAIN.connect_timeout == 5


def test_names_in_json() -> None:
    for state in lifeline.STATES:
        assert f'"{state}"' in TEXT
    for role in hello.ROLES:
        assert f'"{role}"' in TEXT
    keys = next(row["keys"] for row in table("frame", "keys") if row["frame"] == "HELLO")
    said = hello.Hello("replicate", "a", "1", 1.0).pack() | {"versions": [1]}
    assert set(re.findall(r"`(\w+)`", keys)) == set(said)


def test_versions() -> None:
    assert wire.VERSIONS == (1,)
    assert TEXT.startswith("# The replication protocol, version 1\n")
