# SPDX-License-Identifier: Apache-2.0
"""What a protected guest does to its protection, and what wrong requests get."""

from __future__ import annotations

import asyncio
import errno
import gc
import mmap
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from checkpoint.driver import Captured, Staging
from checkpoint.errors import HypervisorError, LogTaken
from checkpoint.memory import MemorySource
from kemari.errors import KemariError, NoSuchProtection, PeerUnreachable, Refused
from tests.unit.kemari_pair import Pair, await_true


def _start_and_fail(pair: Pair) -> None:
    with pytest.raises(KemariError):
        pair.protect()


# ---- The guest and its output ----


def test_restless_guest_is_captured_later(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.a.hypervisor.restless = 5
        pair.talk(3)
        pair.check_answers()
        assert pair.a.status("web")["statistics"]["not_quiescent"] >= 5


def test_a_dirty_log_that_somebody_takes_ends_the_protection_until_it_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``xl save -c`` does; with it a checkpoint would have missed pages."""
    monkeypatch.setattr("kemari.daemon.AGAIN", 0.05)
    taken = threading.Event()

    def taken_at(point: str) -> None:
        if taken.is_set() and point in ("capture", "open_source"):
            raise LogTaken

    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        pair.a.hypervisor.reached = taken_at
        taken.set()
        pair.talk(1)  # it waits for its answer, which no checkpoint may let out
        await_true(lambda: not pair.b.hypervisor.shells, "b removed the copy")
        assert not pair.a.status("web")["protected"]
        (said,) = [e for e in pair.a.request("log", domain="web") if e["event"] == "standby-lost"]
        assert "a checkpoint failed: another program uses the guest's dirty log" in said["text"]
        await_true(
            lambda: "still UNPROTECTED: another program" in pair.a.request("log")[-1]["text"],
            "that it cannot be protected again is said",
        )
        taken.clear()
        await_true(lambda: pair.a.status("web")["protected"], "web is protected again")
        pair.talk(3)
        pair.a.power_cut()
        pair.talk(3)
        pair.check_answers()


def test_a_guest_that_cannot_even_be_looked_at_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else ends its protection: its output would stay held for ever."""
    broken = threading.Event()

    def fail(point: str) -> None:
        if point == "capture" and broken.is_set():
            raise HypervisorError("xc_domain_getinfo", errno.EFAULT)

    def alive(_source: MemorySource) -> bool:
        if broken.is_set():
            raise HypervisorError("xc_domain_getinfo", errno.EPERM)
        return True

    monkeypatch.setattr(MemorySource, "alive", alive)
    with Pair(tmp_path, resume=False) as pair:
        pair.protect()
        pair.a.hypervisor.reached = fail
        broken.set()
        pair.talk(3)
        pair.check_answers()
        (said,) = [e for e in pair.a.request("log", domain="web") if e["event"] == "standby-lost"]
        assert "a checkpoint failed: xc_domain_getinfo" in said["text"]
        assert "web" in pair.a.hypervisor.guests


def test_a_capture_that_fails_late_closes_its_output_once(tmp_path: Path) -> None:
    """What the guest sends between two attempts at an epoch waits for the epoch after it."""
    with Pair(tmp_path) as pair:
        pair.protect()
        for turn in range(1, 6):
            pair.a.hypervisor.restless_late = turn
            pair.talk(3)
        pair.a.power_cut()
        pair.talk(3)
        pair.check_answers()


def test_what_is_sent_between_two_attempts_at_the_final_epoch_leaves_with_it(
    tmp_path: Path,
) -> None:
    with Pair(tmp_path, interval_ms=20_000) as pair:
        pair.protect()
        pair.talk(3)
        attempts: list[int] = []

        def reached(point: str) -> None:
            if point == "capture":
                attempts.append(1)
                if len(attempts) == 2:
                    for number in range(3, 6):
                        pair.guest.request(number)

        machine = pair.a.daemon.protections["web"].machine if pair.a.daemon else None
        assert machine
        await_true(lambda: machine.captured == machine.acked, "no epoch is on its way")
        pair.a.hypervisor.restless_late = 1
        pair.a.hypervisor.reached = reached
        pair.a.request("failover", domain="web")
        assert len(attempts) == 2
        assert [host for host, *_ in pair.answers()] == ["a"] * 6
        pair.check_answers()


def test_what_takes_a_while_does_not_stop_the_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture that has to find out about changed devices first runs beside the event loop."""
    captured_in: set[str] = set()
    capture = MemorySource.capture

    def noted(source: MemorySource, *given: Any, **more: Any) -> Captured:
        captured_in.add(threading.current_thread().name)
        return capture(source, *given, **more)

    monkeypatch.setattr(MemorySource, "capture", noted)
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        loop_thread = captured_in.copy()
        monkeypatch.setattr(MemorySource, "prepared", lambda _source: False)
        pair.talk(1)
        captured_in.clear()
        pair.talk(3)
        assert not captured_in & loop_thread
        pair.check_answers()


def test_a_guest_that_never_rests_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kemari.cycle.CAPTURE_LIMIT", 0.3)
    with Pair(tmp_path, resume=False) as pair:
        pair.protect()
        pair.a.hypervisor.restless = 1 << 30
        pair.talk(3)
        pair.check_answers()
        assert "no usable pause point" in pair.a.status("web")["why"]
        await_true(lambda: not pair.b.hypervisor.shells, "the shell is gone")


def test_a_wedged_standby_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It beats, but acknowledges nothing and answers nothing: output must not wait for ever."""
    monkeypatch.setattr("kemari.cycle.ACK_LIMIT", 0.5)
    monkeypatch.setattr("kemari.endings.RESTART_PATIENCE", 1.0)
    with Pair(tmp_path, resume=False) as pair:
        pair.protect()
        pair.talk(3)
        assert pair.b.daemon
        session = next(iter(pair.b.daemon.sessions.values()))

        async def wedged(*_: object) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(session, "committed", wedged)
        pair.talk(3)
        pair.check_answers()
        assert "no acknowledgement" in pair.a.status("web")["why"]
        assert "web" not in pair.b.hypervisor.guests


def test_staging_grows_with_the_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kemari.cycle.STAGING_PAGES", 2)
    with Pair(tmp_path) as pair:
        pair.protect()
        for page in range(1, 60):
            pair.guest.write(page, b"changed")
        pair.talk(3)
        pair.a.power_cut()
        pair.talk(3)
        pair.check_answers()
        survivor = pair.running()
        assert survivor is not None
        assert survivor.memory[59 * 4096 : 59 * 4096 + 7] == b"changed"


def test_a_guest_whose_changes_do_not_fit_into_dom0_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its output must not wait for ever for a buffer that Dom0 has no memory for."""

    class Small(Staging):
        def __init__(self, capacity: int) -> None:
            if capacity > 8:
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
            super().__init__(capacity)

    monkeypatch.setattr("kemari.cycle.STAGING_PAGES", 8)
    monkeypatch.setattr("kemari.cycle.Staging", Small)
    monkeypatch.setattr(MemorySource, "prepared", lambda _source: False)
    with Pair(tmp_path, resume=False) as pair:
        pair.protect()
        for page in range(1, 60):
            pair.guest.write(page, b"changed")
        pair.talk(3)
        pair.check_answers()
        assert "no memory for 32 pages: Cannot allocate memory" in pair.a.status("web")["why"]


def test_what_a_protection_took_of_memory_is_given_back_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: a garbage collection may come too late for Dom0."""
    taken: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    class Seen(mmap.mmap):
        def __init__(self, _: int, size: int, **__: object) -> None:
            if size > mmap.PAGESIZE:
                taken.add(self)

    def in_use() -> int:
        return sum(not each.closed for each in taken)

    monkeypatch.setattr(mmap, "mmap", Seen)
    with Pair(tmp_path, resume=False) as pair:
        gc.disable()
        try:
            pair.protect()
            pair.talk(3)
            assert in_use() >= 2  # the reference and the staging buffer
            pair.a.request("stop", domain="web")
            await_true(lambda: in_use() == 0, "no buffer is left")
        finally:
            gc.enable()


def test_full_buffer_stalls_the_guest_and_is_counted(tmp_path: Path) -> None:
    with Pair(tmp_path, buffer_limit=64, interval_ms=20_000) as pair:
        pair.protect()
        pair.fabric.delay = 0.05
        for number in range(200):
            pair.guest.request(number)
            threading.Event().wait(0.001)
        await_true(lambda: len(pair.answers()) == 200, "all answers")
        pair.check_answers()
        figures = pair.a.status("web")["statistics"]
        assert figures["stalls"] > figures["late"]


def test_how_long_output_waits_for_its_capture_is_counted(tmp_path: Path) -> None:
    with Pair(tmp_path, interval_ms=60_000) as pair:
        pair.protect()
        pair.talk(1)
        pair.fabric.delay = 0.05
        for number in range(1, 100):
            pair.guest.request(number)
            threading.Event().wait(0.002)
        await_true(lambda: len(pair.answers()) == 100, "all answers")
        # What is sent while an epoch is on its way, there and back again, waits for the next one.
        stages = pair.a.status("web")["statistics"]["stages_ms"]
        assert stages["wait"]["p99"] > 20


def test_a_guest_that_outpaces_its_standby_waits_for_it_and_not_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kemari.throttle.LATE", 0.1)  # 0.2 s
    monkeypatch.setattr("kemari.throttle.SMALL", 0)
    with Pair(tmp_path, heartbeat_ms=2000, interval_ms=60_000, on_standby_loss="hold") as pair:
        pair.protect()
        pair.talk(3)
        before = pair.a.status("web")["statistics"]["late"]
        pair.fabric.delay = 0.15  # there, and back again
        pair.talk(3)
        figures = pair.a.status("web")["statistics"]
        assert figures["late"] == figures["stalls"] >= before + 3
        pair.guest.request(6)
        await_true(lambda: pair.guest.paused, "the guest waits again")
        pair.b.power_cut()
        await_true(lambda: pair.a.state("web") == "holding", "output stays held")
        assert not pair.guest.paused


def test_a_guest_whose_output_stays_held_is_stalled_before_frames_are_lost(tmp_path: Path) -> None:
    with Pair(tmp_path, buffer_limit=2000, on_standby_loss="hold") as pair:
        pair.protect(interval_ms=60_000)
        pair.talk(3)
        machine = pair.a.daemon.protections["web"].machine if pair.a.daemon else None
        assert machine
        await_true(lambda: machine.captured == machine.acked, "no epoch is on its way")
        pair.b.power_cut()
        await_true(lambda: pair.a.state("web") == "holding", "output stays held")
        sent = [3]

        def stalled() -> bool:
            pair.guest.request(sent[0])
            sent[0] += 1
            return pair.guest.paused

        await_true(stalled, "the guest is paused")
        assert len(pair.answers()) == 3
        pair.a.request("stop", domain="web", force=True)
        await_true(lambda: len(pair.answers()) == sent[0], "all answers")
        pair.check_answers()


def test_guest_that_shuts_down_ends_its_protection(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect()
        pair.talk(3)
        pair.a.hypervisor.destroy_domain("web")
        await_true(lambda: "guest-gone" in pair.a.events("web"), "a has noticed")
        await_true(lambda: not pair.b.hypervisor.shells, "b removed the shell")
        await_true(lambda: "ended" in pair.a.events("web"), "a has cleaned up")
        assert not pair.a.network.buffers
        assert "unprotected" not in pair.a.events("web")
        assert "web" not in pair.b.hypervisor.guests


def test_guest_that_has_shut_down_is_protected_no_more_though_its_domain_stays(
    tmp_path: Path,
) -> None:
    with Pair(tmp_path, resume=True) as pair:
        pair.protect()
        pair.talk(3)
        pair.guest.shut_down = True
        await_true(lambda: "ended" in pair.a.events("web"), "a has noticed and cleaned up")
        (said,) = [each for each in pair.a.request("log") if each["event"] == "guest-gone"]
        assert said["text"] == "web is gone or has shut down; its protection ends"
        await_true(lambda: not pair.b.hypervisor.shells, "b removed the shell")
        assert pair.a.state("web") == ""
        assert "web" in pair.a.hypervisor.guests, "what is left of it is its administrator's"
        assert not pair.a.network.buffers
        pair.a.power_cut()
        assert "web" not in pair.b.hypervisor.guests


def test_the_clock_goes_on(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.guest.clock_offset_ns = 10**15
        pair.protect()
        pair.talk(3)
        pair.a.power_cut()
        pair.talk(1)
        survivor = pair.running()
        assert survivor is not None
        jump = abs(survivor.clock_offset_ns - 10**15)
        assert jump < 0.25e9, f"the clock jumped by {jump / 1e6} ms"


def test_interval_only(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.protect(interval_only=True, interval_ms=200)
        pair.guest.request(0)
        assert pair.answers() == []
        await_true(lambda: len(pair.answers()) == 1, "released by the timer's checkpoint")


# ---- Wrong inputs ----


def test_refusals(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        with pytest.raises(KemariError, match="Domain nope does not exist"):
            pair.a.request("start", domain="nope", standby="b")
        with pytest.raises(KemariError, match="not an address"):
            pair.a.request("start", domain="web", standby="b c")
        address = str(pair.a.config.listen[0])
        with pytest.raises(KemariError, match="this host itself"):
            pair.a.request("start", domain="web", standby=address)
        with pytest.raises(Refused, match="interval_ms is 1; expected 10 to 60000"):
            pair.protect(interval_ms=1)
        with pytest.raises(Refused, match="not an operation"):
            pair.a.request("dance")
        with pytest.raises(NoSuchProtection):
            pair.a.request("stop", domain="web")
        with pytest.raises(NoSuchProtection):
            pair.a.request("failover", domain="web")
        with pytest.raises(NoSuchProtection):
            pair.a.request("status", domain="web")
        pair.protect()
        with pytest.raises(Refused, match="protected already"):
            pair.protect(interval_ms=70)
        assert pair.protect()["generation"] == 1
        with pytest.raises(Refused, match="runs on a"):
            pair.b.request("failover", domain="web")
        pair.talk(3)
        pair.check_answers()


def test_standby_without_memory(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.b.hypervisor.memory_pages = 10
        with pytest.raises(KemariError, match="needs 64 pages, 10 are free"):
            pair.protect()
        pair.talk(3)
        pair.check_answers()
        await_true(lambda: not pair.a.network.buffers, "the buffer is gone")
        pair.b.hypervisor.memory_pages = 100
        pair.protect()


def test_standby_with_a_domain_of_that_name(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.b.hypervisor.boot("web")
        with pytest.raises(KemariError, match="a domain named web exists on b"):
            pair.protect()


def test_standby_unreachable(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.b.power_cut()
        with pytest.raises(PeerUnreachable, match="No kemarid answers"):
            pair.protect()


def test_standby_lost_during_the_first_copy(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        calls = iter(range(100))

        def reached(point: str) -> None:
            if point == "copy_live" and next(calls) == 1:
                pair.b.power_cut()

        pair.a.hypervisor.reached = reached
        with pytest.raises(KemariError):
            pair.protect()
        pair.talk(3)
        pair.check_answers()
        await_true(lambda: not pair.a.network.buffers, "the buffer is gone")


@pytest.mark.parametrize("where", ["track", "copy_live"])
def test_stop_during_the_first_copy(tmp_path: Path, where: str) -> None:
    with Pair(tmp_path) as pair:
        reached, go = threading.Event(), threading.Event()

        def wait(point: str) -> None:
            if point == where:
                reached.set()
                go.wait(60)

        pair.a.hypervisor.reached = wait
        starting = threading.Thread(target=_start_and_fail, args=(pair,), daemon=True)
        starting.start()
        assert reached.wait(60)
        stopping = threading.Thread(target=pair.a.request, args=("stop",), kwargs={"domain": "web"})
        stopping.start()
        go.set()
        stopping.join(60)
        starting.join(60)
        await_true(lambda: not pair.b.hypervisor.shells, "b removed the shell")
        pair.talk(3)
        pair.check_answers()
