# SPDX-License-Identifier: Apache-2.0
"""Who is dead: the judgement from several paths, with times put in by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kemari.liveness import BEATS, REPLICATION, Verdict, Watch

TIMEOUT = 1.0
PACE = TIMEOUT / BEATS


def run(watch: Watch, until: float, **last: float) -> list[Verdict]:
    """Tick whenever it is due; each path beats until its time in ``last``."""
    verdicts = []
    beat = 0
    while (now := watch.due) <= until + PACE / 2:
        while (beat + 1) * PACE <= now:
            beat += 1
            for path, end in last.items():
                if beat * PACE <= end:
                    watch.heard(path, beat * PACE)
        verdicts.append(watch.tick(now))
    return verdicts


def test_a_beating_host_lives() -> None:
    assert set(run(Watch(TIMEOUT, 0), 10, replication=10)) == {Verdict.ALIVE}


@given(st.floats(0, 10))
def test_silence_on_the_only_path_is_death_when_the_timeout_ends(last: float) -> None:
    """Not a beat later: the world waits for the guest."""
    watch = Watch(TIMEOUT, 0)
    verdict = Verdict.ALIVE
    while verdict is not Verdict.DEAD:
        now = watch.due
        watch.heard(REPLICATION, min(now, last))
        verdict = watch.tick(now)
    assert last + TIMEOUT <= now <= last + TIMEOUT + PACE / 100


@given(
    jitter=st.floats(0, PACE),
    lag=st.floats(0, PACE),
)
def test_a_power_cut_is_death_whichever_path_fell_silent_last(jitter: float, lag: float) -> None:
    """Never LINK_DEAD: a standby that believed that would give the guest up."""
    verdicts = run(Watch(TIMEOUT, 0), 8, replication=5 - lag, lan=5 - jitter)
    assert Verdict.LINK_DEAD not in verdicts
    assert verdicts[-1] is Verdict.DEAD


@given(before=st.floats(0, TIMEOUT - PACE * 1.01))
def test_a_power_cut_soon_after_the_link_broke_is_still_death(before: float) -> None:
    verdicts = run(Watch(TIMEOUT, 0), 8, replication=5 - before, lan=5)
    assert Verdict.LINK_DEAD not in verdicts
    assert verdicts[-1] is Verdict.DEAD


def test_a_broken_link_is_told_from_death_by_the_other_path() -> None:
    verdicts = run(Watch(TIMEOUT, 0), 10, replication=3, lan=10)
    assert Verdict.DEAD not in verdicts
    assert verdicts[-1] is Verdict.LINK_DEAD


def test_an_end_of_stream_is_evidence_and_no_silence() -> None:
    watch = Watch(TIMEOUT, 0)
    run(watch, 1, replication=1)
    watch.closed(REPLICATION, 1)
    assert watch.tick(1 + PACE) is Verdict.ALIVE


def test_after_an_end_of_stream_refused_connections_keep_a_host_alive() -> None:
    watch = Watch(TIMEOUT, 0)
    watch.closed(REPLICATION, 0)
    assert set(run(watch, 10, probe=10)) == {Verdict.ALIVE}


def test_after_an_end_of_stream_silence_is_death() -> None:
    watch = Watch(TIMEOUT, 0)
    watch.closed(REPLICATION, 0)
    assert run(watch, 10, probe=4)[-1] is Verdict.DEAD


@pytest.mark.parametrize("slept", [0.5, 2.0, 100.0])
def test_own_sleep_is_not_the_others_silence(slept: float) -> None:
    """A stopped process hears nothing; what was sent meanwhile lies unread."""
    watch = Watch(TIMEOUT, 0)
    run(watch, 2, replication=2)
    now = 2 + slept
    assert watch.tick(now) is Verdict.ALIVE
    watch.heard(REPLICATION, now)
    assert watch.tick(now + PACE) is Verdict.ALIVE


def test_a_sleeper_still_notices_death_afterwards() -> None:
    watch = Watch(TIMEOUT, 0)
    run(watch, 2, replication=2)
    verdicts = [watch.tick(50)]
    verdicts += [watch.tick(watch.due) for _ in range(BEATS + 2)]
    assert verdicts[0] is Verdict.ALIVE
    assert verdicts[-1] is Verdict.DEAD


@given(st.lists(st.floats(0.001, 0.09), min_size=20, max_size=200))
def test_a_busy_loop_delays_death_at_most_a_little(late: list[float]) -> None:
    """Small lateness, below half a beat, is not discounted: it would add up for ever."""
    watch = Watch(TIMEOUT, 0)
    now = 0.0
    for each in late:
        now = watch.due + each
        verdict = watch.tick(now)
        if now >= TIMEOUT:
            assert verdict is Verdict.DEAD


def test_silence_is_measured_from_the_last_evidence() -> None:
    watch = Watch(TIMEOUT, 0)
    watch.heard("lan", 3)
    watch.heard("lan", 2)
    assert watch.silence(5) == 2
    assert watch.paths == {REPLICATION: 0, "lan": 3}
