# SPDX-License-Identifier: Apache-2.0
"""Dom0's share of the processors, as the kernel's own figures have it."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.xen.processors import Processors


def write(path: Path, busy: int, idle: int, steal: int) -> None:
    # user nice system idle iowait irq softirq steal guest guest_nice
    path.write_text(f"cpu  {busy} 0 0 {idle} 7 0 0 {steal} 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n")


def test_stolen_is_the_share_of_wanted_time_since_the_last_look(tmp_path: Path) -> None:
    stat, now = tmp_path / "stat", [100.0]
    write(stat, busy=1000, idle=5000, steal=900)
    processors = Processors(stat, lambda: now[0])
    assert processors.stolen() == 0.0
    write(stat, busy=1060, idle=5020, steal=940)
    now[0] += 0.5
    assert processors.stolen() == 0.0  # too early to look again
    now[0] += 0.5
    assert processors.stolen() == pytest.approx(0.4)
    now[0] += 0.9
    assert processors.stolen() == pytest.approx(0.4)
    write(stat, busy=1160, idle=5020, steal=940)
    now[0] += 0.1
    assert processors.stolen() == 0.0


def test_a_host_that_wanted_nothing_waited_for_nothing(tmp_path: Path) -> None:
    stat, now = tmp_path / "stat", [100.0]
    write(stat, busy=1000, idle=5000, steal=900)
    processors = Processors(stat, lambda: now[0])
    now[0] += 5.0
    assert processors.stolen() == 0.0


def test_this_kernel_has_the_figures() -> None:
    assert 0.0 <= Processors().stolen() <= 1.0
