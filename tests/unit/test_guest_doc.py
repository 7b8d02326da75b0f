# SPDX-License-Identifier: Apache-2.0
"""The document's table of symbols is the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from checkpoint.guest.clocksource import READERS
from checkpoint.guest.kallsyms import Symbols
from checkpoint.guest.linux import read_layout
from tests.unit.guest_kernel import Options, build

DOCUMENT = Path(__file__).parents[2] / "docs" / "guest-kernel.md"


def test_each_symbol_looked_up_is_in_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    every = Symbols.all

    def noted(self: Symbols, name: str) -> list[int]:
        asked.add(name)
        return every(self, name)

    monkeypatch.setattr(Symbols, "all", noted)
    for fifo in (False, True):
        kernel = build(Options(fifo=fifo, vsyscall=True))
        read_layout(kernel.memory, kernel.registers)
    # The second version is only asked for where it is not the first.
    asked |= {"gnttab_v2_ops"}
    text = DOCUMENT.read_text("utf-8")
    table = text[text.index("| symbol |") : text.index("If several variables")]
    cells = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(\w+)`", cells)) == asked - set(READERS)
