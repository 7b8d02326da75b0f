# SPDX-License-Identifier: Apache-2.0
"""The program that prints what is read of a guest's kernel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoint.guest.__main__ import main
from checkpoint.guest.layout import LinuxLayout
from checkpoint.guest.linux import read_layout
from tests.unit.guest_kernel import RELEASE, GuestKernel, Options, build


def words(kernel: GuestKernel, tmp_path: Path) -> list[str]:
    dump = tmp_path / "dump"
    dump.write_bytes(kernel.ram)
    cr4 = kernel.registers[0].cr4
    return [str(dump), "--cr3", hex(kernel.cr3), "--cr4", hex(cr4), "--lstar", hex(kernel.lstar)]


def test_the_layout_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = build(Options(la57=True))
    assert main(words(kernel, tmp_path)) == 0
    text = capsys.readouterr().out
    layout, end = json.JSONDecoder().raw_decode(text)
    assert LinuxLayout.from_json(layout) == read_layout(kernel.memory, kernel.registers)
    rest = text[end:]
    assert "timekeeping at rest: True, xenstore at rest: True" in rest
    assert "grant frames in use: 0x7fff, 0x7ffe" in rest
    assert "event pages: 0x40000" in rest
    assert "watch FFFF888000060000 control/shutdown" in rest
    assert rest.count("cycle_last") == 8


def test_a_kernel_that_does_not_run_on_xen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = build(Options(fifo=False))
    kernel.poke("xen_domain_type", 0, size=4)
    arguments = words(kernel, tmp_path)
    assert main(arguments) == 1
    assert "does not use Xen's interfaces" in capsys.readouterr().err
    assert main([*arguments, "--kernel"]) == 0
    assert capsys.readouterr().out == f"Linux {RELEASE}, {len(kernel.names)} symbols\n"
