# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own parts: traces, the loops that are compared with, ratios."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bench import guest_disk, instructions, micro, traces
from bench.record import record
from checkpoint.memory import MemoryHypervisor
from vagrant.lablib.errors import LabError


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.compile_loops(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("name", traces.SYNTHETIC)
def test_both_deltas_bring_every_page_of_a_trace_to_the_other_side(
    name: str, program: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "trace"
    plain.write_bytes(traces.synthetic(name, changes=300, epochs=3).plain())
    done = subprocess.run([program, "check", plain], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "good\n")


def test_a_saved_trace_is_the_same_when_loaded(tmp_path: Path) -> None:
    trace = traces.synthetic("synthetic-few-words", pages=64, changes=60, epochs=6)
    again = traces.Trace(64, [[(gfn, new, old) for gfn, old, new in each] for each in trace.epochs])
    trace.epochs += again.epochs
    path = tmp_path / "a.trace"
    trace.save(path)
    assert traces.load(path) == trace
    assert trace.changes == 120


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is no trace"):
        traces.load(path)


def test_the_reference_encodes_the_example_of_its_description_as_that_has_it(
    program: Path, tmp_path: Path
) -> None:
    old, new = traces.example()
    plain = tmp_path / "trace"
    plain.write_bytes(traces.Trace(8, [[(3, old, new)]]).plain())
    assert subprocess.run([program, "check", plain], check=False).returncode == 0
    lines = subprocess.run(
        [program, "time", plain, "1"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    made = {line.split()[0]: int(line.split()[2]) for line in lines}
    assert made["xbzrle"] == 24


def test_a_trace_of_a_guest_has_each_page_as_it_was_and_became() -> None:
    hypervisor = MemoryHypervisor(lambda *frame: None)
    guest = hypervisor.boot("web")
    source = hypervisor.open_source("web")
    source.track()
    guest.request(1)
    trace = record(source, epochs=2, interval=0.0)
    source.untrack()
    assert len(trace.epochs) == 2
    assert trace.pages == source.description.pages


def test_the_closing_line_has_the_issues_figures() -> None:
    speed = micro.Speed(2.5, 0.75, 0.0)
    loops = dict.fromkeys(("zero", "compare", "delta", "apply", "xbzrle"), speed)
    line = micro.closing({"synthetic-qemu-examples": loops})
    assert (line["zero_vs_memcpy"], line["delta_gb_per_s"]) == (0.75, 2.5)
    assert line["traces"]["synthetic-qemu-examples"]["apply"] == 2.5


def test_every_counted_loop_has_a_limit() -> None:
    counted = {f"{name}: {loop}" for name, loops in instructions.COUNTED.items() for loop in loops}
    for limits in json.loads(instructions.LIMITS.read_text()).values():
        assert set(limits) == counted


@pytest.mark.parametrize("path", sorted(micro.RECORDED.glob("*.trace")), ids=lambda path: path.stem)
def test_recorded_traces_are_small_and_arrive_by_either_delta(
    path: Path, program: Path, tmp_path: Path
) -> None:
    assert path.stat().st_size < 300 << 10
    trace = traces.load(path)
    assert trace.changes > 100
    plain = tmp_path / "trace"
    plain.write_bytes(trace.plain())
    assert subprocess.run([program, "check", plain], check=False).returncode == 0


def test_a_guest_s_disk_s_figures_come_as_ratios_to_the_raw_one() -> None:
    job = guest_disk.Job("read", "random", "4 KiB", 1)
    line = "ok io requests 100 seconds 2.0 p50_us 1500 p99_us 20000\n"
    raw = guest_disk.Figure.read(line)
    assert raw == guest_disk.Figure(50.0, 1.5, 20.0)
    slow = guest_disk.Figure(10.0, 90.0, 99.0)
    medians = {job: {"raw": raw, "unprotected": raw, "protected": slow}}
    assert "| 50 (1.00) | 50 (1.00) | 10 (0.20) |" in guest_disk.table(medians)
    assert guest_disk.middle([raw, slow, slow]) == slow
    assert job.command("/dev/xvdc", 2.0) == "io /dev/xvdc read random 4096 1 2.0"
    with pytest.raises(LabError, match="expected figures"):
        guest_disk.Figure.read("error io: no such disk\n")
