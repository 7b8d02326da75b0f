# SPDX-License-Identifier: Apache-2.0
"""The comparison's parts that need no Xen: what is computed, and the guest's loads themselves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO, cast
from xml.etree import ElementTree

import pytest

from bench import client, comparison, failovers, meters, picture, roundtrip, samples, tables, ways
from bench.cases import Case, Load
from bench.gaps import Gaps, middle
from bench.samples import Sample
from vagrant.demolib.verdict import Cut, Resume
from vagrant.lablib.errors import LabError
from vagrant.lablib.guest import compile_program
from vagrant.lablib.lab import Lab
from vagrant.lablib.ssh import Result

MS = 1_000_000
# ---- gaps ----


def bucket(nanoseconds: int) -> int:
    """As the guest's program has it, by another way: exponent and the four bits after the first."""
    exponent = len(bin(nanoseconds)) - 3
    return exponent * 16 + int(bin(nanoseconds)[3:7], 2)


def seen(*milliseconds: float) -> Gaps:
    gaps = [int(ms * MS) for ms in milliseconds]
    return Gaps(Counter(bucket(gap) for gap in gaps), max(gaps))


@pytest.mark.parametrize("gap", [32768, 40000, 999_999, 5_800_000, 123_456_789, 2_000_000_000])
def test_the_middle_of_a_bucket_is_close_to_what_is_in_it(gap: int) -> None:
    assert middle(bucket(gap)) == pytest.approx(gap, rel=1 / 32)


def test_the_stalls_are_the_longest_gaps_as_many_as_there_were_checkpoints() -> None:
    gaps = seen(*[0.1] * 500, *[6.0] * 6, *[9.0] * 3, 20.0)
    assert gaps.stall_ms(0.5, 10) == pytest.approx(6, rel=0.04)
    assert gaps.stall_ms(0.8, 10) == pytest.approx(9, rel=0.04)
    assert gaps.stall_ms(0.99, 10) == 20
    assert gaps.stall_ms(0.5, 1) == 20
    # Were there more of them, they would be among the short ones.
    assert gaps.stall_ms(0.5, 100) == pytest.approx(0.1, rel=0.04)


@pytest.mark.parametrize("checkpoints", [0, 4])
def test_nothing_is_said_of_stalls_that_nobody_saw(checkpoints: int) -> None:
    assert seen(1, 2, 3).stall_ms(0.5, checkpoints) is None


def test_gaps_of_several_rounds_are_put_together() -> None:
    whole = Gaps.merge([seen(0.5, 5), seen(0.5, 7)])
    assert whole.counts[bucket(MS // 2)] == 2
    assert whole.longest == 7 * MS
    assert whole.away_ms == pytest.approx(12, rel=0.04)


# ---- samples ----


def sample(way: str, case: str = "rr-1", **values: object) -> Sample:
    plain = Sample(
        way=way,
        case=case,
        unit="answers",
        seconds=10.0,
        worked=8.0,
        work=80.0,
        latencies=[],
        gaps=None,
        checkpoints=0,
        wire=0,
        cpu=(1.0, 0.5),
        free=(100 << 20, 200 << 20),
        pause=None,
        stages={},
    )
    return replace(plain, **values)  # type: ignore[arg-type]


def table(*given: Sample) -> samples.Table:
    return samples.merge(given)


def test_stalls_are_those_of_the_checkpoints_made_while_the_guest_looked() -> None:
    # 10 in 10 s are 8 in the 8 s for which it looked: the eighth longest gap is the shortest stall.
    gaps = seen(*[0.1] * 50, *[4.0] * 2, *[6.0] * 8)
    assert sample("kemari", gaps=gaps, checkpoints=10).stall(0.0) == pytest.approx(6, rel=0.04)
    assert sample("kemari", gaps=gaps, checkpoints=0.2).stall(0.5) is None


def test_an_unprotected_guest_has_gaps_as_well() -> None:
    # Five checkpoints in 10 s are two in the 4 s for which the unprotected guest looked.
    plain = sample("unprotected", gaps=seen(1.0, 2.0, 3.0, 9.0), worked=4.0)
    kemari = sample("kemari", gaps=seen(*[20.0] * 9), checkpoints=5)
    assert plain.gaps_like(kemari, 0.0) == pytest.approx(3, rel=0.04)
    assert plain.gaps_like(sample("idle"), 0.5) is None
    shown = tables.tables(table(plain, kemari))
    cells = [cell.strip() for cell in shown.splitlines()[-1].split("|")]
    assert (cells[5], cells[6]) == ("20.4 / 20.0", "9.0 / 9.0")  # in buckets, but for the longest


def test_rounds_are_added_up() -> None:
    (one,) = table(
        sample("kemari", latencies=[1, 2], pause=3.0, checkpoints=10, wire=10, gaps=seen(1)),
        sample(
            "kemari", latencies=[3], pause=6.0, checkpoints=20, wire=30, free=(90 << 20, 210 << 20)
        ),
        sample("kemari", seconds=0.0, work=0.0, cpu=(0.0, 0.0), stages={"ack": 3.0}),
    ).values()
    assert one.stages == {"ack": 3.0}
    assert (one.seconds, one.work, one.wire, list(one.latencies)) == (20, 160, 40, [1, 2, 3])
    assert (one.cpu, one.free) == ((2.0, 1.0), (90 << 20, 200 << 20))
    assert one.pause == 5
    assert one.gaps == seen(1)


def test_a_ratio_is_taken_against_the_interval_that_is_best_for_the_other() -> None:
    found = samples.ratios(
        table(
            sample("kemari", latencies=[10.0], wire=1000),
            sample("xl-remus-25", latencies=[300.0], wire=9000),
            sample("xl-remus-200", latencies=[200.0], wire=5000),
        )
    )
    assert found["latency_ratio_p90"] == 20
    assert found["wire_ratio_rr"] == 0.2


def test_processor_time_is_that_beyond_an_unprotected_guest_for_each_checkpoint() -> None:
    found = samples.ratios(
        table(
            sample("unprotected", cpu=(1.0, 0.0)),
            sample("kemari", cpu=(2.0, 1.0), checkpoints=100),
            sample("xl-remus-100", cpu=(4.0, 1.0), checkpoints=20),
        )
    )
    assert found["dom0_cpu_ratio"] == pytest.approx((2 / 100) / (4 / 20))


def test_bytes_of_a_writer_are_counted_for_each_page_that_it_could_write() -> None:
    found = samples.ratios(
        table(
            sample("kemari", "write-sequential", wire=4000, work=10),
            # Seen for twice as long as the work took: the bytes of half of that time count.
            sample("xl-remus-100", "write-sequential", wire=4000, work=5, seconds=20.0),
        )
    )
    assert found["wire_ratio_incompressible"] == 1


def test_an_answer_is_held_against_what_it_cannot_do_without() -> None:
    given = [
        sample("unprotected", latencies=[2.0, 3.0, 9.0]),
        sample("kemari", latencies=[18.0, 20.0, 50.0], pause=2.0, checkpoints=9),
    ]
    given[1] = replace(given[1], stages={"wait": 7.0, "encode": 1.0})
    found = samples.limit(table(*given), 4.0)
    assert found is not None
    assert found.total == 12.0
    assert found.ratio == pytest.approx(20 / 12)
    assert "= 12.0 ms; measured: 20.0 ms, 1.67 times that" in str(found)
    assert samples.limit(table(*given[:1]), 4.0) is None
    assert samples.limit(table(given[0], replace(given[1], stages={})), 4.0) is None


def test_what_was_not_measured_is_null_in_the_closing_line() -> None:
    line = tables.closing(dict.fromkeys(comparison.KEYS) | samples.ratios({}))
    assert json.loads(line) == dict.fromkeys(comparison.KEYS)
    assert tables.closing({"a": 1.23456, "b": None, "c": 7}) == '{"a":1.235,"b":null,"c":7}'


def test_a_table_has_a_row_for_each_way() -> None:
    shown = tables.tables(
        table(
            sample("unprotected", latencies=[2.0, 4.0, 6.0]),
            sample("kemari", work=40.0, checkpoints=55, free=(96 << 20, 190 << 20), wire=20480),
        )
    )
    unprotected, kemari = shown.splitlines()[-2:]
    assert [cell.strip() for cell in kemari.split("|")[1:-1]] == [
        *("kemari", "5.0", "0.50", "-", "-", "-", "-", "5.5", "2", "10 + 5", "4 + 10"),
    ]
    assert "4.0 / 6.0 / 6.0" in unprotected


def test_the_picture_has_a_line_for_each_way_where_its_values_belong() -> None:
    found = picture.panels(
        table(
            sample("unprotected", latencies=[10.0]),
            sample("kemari-timer-25", latencies=[10.0] * 5 + [100.0] * 4 + [1000.0]),
            sample("xl-remus-25", "idle", gaps=seen(300.0), checkpoints=1.25),
        )
    )
    assert [[row.way for row in panel.rows] for panel in found] == [
        ["unprotected", "kemari-timer-25"],
        ["xl-remus-25"],
    ]
    drawn = ElementTree.fromstring(picture.draw(found))
    circles = drawn.findall("{http://www.w3.org/2000/svg}circle")
    places = [float(circle.get("cx", "")) for circle in circles]
    left, right = picture.LEFT, picture.WIDTH - picture.RIGHT
    assert places[:6] == [*([left] * 3), (left + right) / 2, right, right]
    assert picture.draw([]).count("<circle") == 0


def test_the_closing_line_has_the_keys_that_were_agreed_in_their_order() -> None:
    wanted = """
        stall_ratio_p50 stall_ratio_p99 latency_ratio_p90
        wire_ratio_rr wire_ratio_kv wire_ratio_incompressible kv_throughput_vs_timer25
        zero_vs_memcpy compare_vs_memcpy delta_gb_per_s apply_gb_per_s
        dom0_cpu_ratio failover_minus_heartbeat_s latency_over_model
    """
    assert list(comparison.KEYS) == wanted.split()


def test_failovers_are_counted_from_their_own_cut() -> None:
    cuts = [Cut(0, 10), Cut(20, 30), Cut(40, 50)]
    resumes = [Resume(11.5, ()), Resume(None, ()), Resume(51.25, ())]
    seconds = failovers.durations(cuts, resumes)
    assert seconds == [1.5, 1.25]
    assert failovers.beyond_heartbeat(seconds) == 0.375
    assert failovers.beyond_heartbeat([]) is None


# ---- what the hosts tell ----

HOST = """Name                                        ID   Mem VCPUs\tState\tTime(s)
Domain-0                                     0   900     1     r-----      42.7
MemAvailable:     712345 kB
"""


def test_a_hosts_meters_are_read() -> None:
    assert meters.parse_host(HOST) == (42.7, 712345 << 10)
    link = [{"ifname": "a-repl", "stats64": {"rx": {"bytes": 5}, "tx": {"bytes": 7}}}]
    assert meters.parse_link(json.dumps(link)) == 12


@pytest.mark.parametrize("text", ["", HOST.replace("Domain-0", "demo"), HOST.replace("42.7", "?")])
def test_meters_that_tell_something_else_are_refused(text: str) -> None:
    with pytest.raises(LabError, match="cannot be read"):
        meters.parse_host(text)
    with pytest.raises(LabError, match="cannot be read"):
        meters.parse_link(text)


class HereLab:
    """Its hosts are this machine."""

    def ssh(self, host: str, command: str) -> Result:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
        return Result(done.returncode, done.stdout, done.stderr)


def test_the_links_round_trip_is_measured() -> None:
    assert 0 < roundtrip.measure(cast(Lab, HereLab()), "127.0.0.1") < 1000


def test_a_round_trip_that_nobody_answers_is_not_guessed() -> None:
    class Dumb(HereLab):
        def ssh(self, host: str, command: str) -> Result:
            return Result(0, "", "")

    with pytest.raises(LabError, match="expected a number"):
        roundtrip.measure(cast(Lab, Dumb()))


def status(**values: object) -> str:
    guest = {
        "protected": True,
        "state": "protected",
        "why": "",
        "statistics": {
            "checkpoints": 12,
            "pause_ms": {"p50": 4.5, "mean": 5.0},
            "stages_ms": {"encode": {"p50": 0.9, "p99": 3.0}},
        },
    }
    return json.dumps({"ok": True, "result": [guest | values]})


def test_checkpoints_are_those_of_the_protected_guest() -> None:
    assert ways.parse_status(status()) == ways.State(12, 60.0, {"encode": 0.9})
    with pytest.raises(LabError, match=r"unprotected \(the link broke\)"):
        ways.parse_status(status(protected=False, state="unprotected", why="the link broke"))
    with pytest.raises(LabError, match="cannot be read"):
        ways.parse_status('{"ok": true, "result": []}')


# ---- the guest's loads, on this machine ----


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest's program."""
    path = tmp_path_factory.mktemp("loads") / "load"
    path.write_bytes(compile_program("load", "-lz"))
    path.chmod(0o755)
    return path


@contextmanager
def serving(program: Path, log: Path) -> Iterator[tuple[int, TextIO]]:
    """Its service; the port, and what it takes for its kernel's log."""
    os.mkfifo(log)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    process = subprocess.Popen([program, str(port), log])
    try:
        with log.open("w") as records:
            while process.poll() is None:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                except ConnectionRefusedError:
                    continue
                break
            yield port, records
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def loads(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of the service."""
    with serving(program, tmp_path_factory.mktemp("log") / "kmsg") as (port, _):
        yield port


def ask(port: int, line: str) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as service:
        return client.ask(service, line)


@pytest.mark.parametrize("pattern", ["sequential", "random", "same", "zero"])
def test_the_writer_writes_and_counts_its_gaps(pattern: str, loads: int) -> None:
    pages, longest, *buckets = ask(loads, f"write 0.2 1000 1 {pattern}").split()
    gaps = Gaps.parse(longest, buckets)
    # As many as the rate has it, fewer only if this machine stood still at the end.
    assert int(pages) <= 201
    assert int(pages) >= 200 - gaps.longest / MS
    if gaps.counts:
        assert max(middle(bucket) for bucket in gaps.counts) == pytest.approx(
            gaps.longest, rel=1 / 16
        )


def test_a_writer_without_a_rate_only_reads_the_clock(loads: int) -> None:
    assert ask(loads, "write 0.05 0 1 same").split()[0] == "0"


def test_text_is_compressed(loads: int) -> None:
    assert int(ask(loads, "compress 0.05")) % (64 << 10) == 0


def test_bulk_data_arrives_in_both_directions(loads: int) -> None:
    with socket.create_connection(("127.0.0.1", loads), timeout=60) as service:
        assert client.bulk_send(service, 0.05) > 0
    with socket.create_connection(("127.0.0.1", loads), timeout=60) as service:
        taken = client.bulk_receive(service, 0.05)
    assert taken > 0
    assert taken % client.BLOCK == 0


def test_what_is_no_command_is_refused(loads: int) -> None:
    for line in ("write 1 1 1 sideways", "write 1 1 0 same", "dance"):
        with pytest.raises(client.Refused, match="error unknown command"):
            ask(loads, line)


def test_the_guests_own_suspends_are_counted(program: Path, tmp_path: Path) -> None:
    with serving(program, tmp_path / "kmsg") as (port, records):
        records.write("6,400,1,-;something else\n")
        records.flush()
        assert ask(port, "suspends") == "0"
        records.write("6,401,1,-;Freezing user space processes\n")
        records.flush()
        assert ask(port, "suspends 1") == "1"


# ---- the run ----


class FakeLab:
    """Does nothing, and notes what was asked of it."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.asked: list[str] = []

    def reset(self) -> None:
        self.asked.append("reset")

    def guest_start(self, host: str) -> None:
        self.asked.append(f"guest on {host}")


class FakeWay:
    """A protection that makes ten checkpoints between two looks; or one that never begins."""

    def __init__(self, name: str, fails: bool = False) -> None:
        self.name = name
        self._fails = fails
        self._made = 0

    def begin(self, lab: Lab, folder: Path) -> None:
        if self._fails:
            raise LabError("It would not begin.")

    def look(self, lab: Lab, folder: Path) -> ways.State:
        self._made += 10
        return ways.State(self._made, 4.0 * self._made)

    def end(self, lab: Lab) -> None:
        cast(FakeLab, lab).asked.append(f"end of {self.name}")


def work(lab: Lab, folder: Path, seconds: float, watch: meters.Watch) -> Load:
    """Does two pieces a second."""
    watch.mark()
    watch.mark()
    return Load(seconds, 2 * seconds)


def test_every_way_has_a_guest_of_its_own_and_one_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = [meters.Reading(10.0 * n, 100 * n, (n, n), (1, 1)) for n in range(8)]
    monkeypatch.setattr(meters, "read", lambda lab: readings.pop(0))
    lab = FakeLab(tmp_path)
    case = Case("work", "pieces", work)
    run = comparison.Comparison(
        cast(Lab, lab), [FakeWay("one"), FakeWay("two", fails=True)], [case], 4.0
    )
    run.round(0)
    run.round(1)
    each = ["reset", "guest on a"]
    assert lab.asked == [
        *(*each, "end of one", *each, "end of two"),
        *(*each, "end of two", *each, "end of one"),
    ]
    assert run.failures == ["two: It would not begin."] * 2
    assert [(s.way, s.rate, s.seconds, s.wire, s.cpu, s.pause) for s in run.samples] == [
        ("one", 2.0, 10.0, 100, (1, 1), 4.0)
    ] * 2
