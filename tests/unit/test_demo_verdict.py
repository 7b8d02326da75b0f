# SPDX-License-Identifier: Apache-2.0
"""The verdict: histories that must pass, and one history for everything that must not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest

from vagrant.demolib import report
from vagrant.demolib.history import Answer, History, HistoryError, Request, read
from vagrant.demolib.report import Figures
from vagrant.demolib.verdict import Cut, judge, quantile

CUT = Cut(protected=5.0, at=10.0)
RESUME = 12.3
#: What the guest's clocks show at the client's time 0.
OFFSET = 777.0


def make(
    clock: Callable[[float], float] = lambda now: now + OFFSET,
    *,
    seconds: float = 20.0,
    resume: float = RESUME,
    cut: Cut = CUT,
    latency: float = 0.005,
) -> History:
    """Two connections, a request each 20 ms, a silence from the cut to the resume.

    :param clock: the guest's clocks at a time of the client
    """
    history = History(["10.77.0.10", "fd77::10"], began=0.0, until=seconds + 0.1, ended=True)
    answers = []
    for connection in range(2):
        for number in range(1, int(seconds / 0.02)):
            sent = number * 0.02 + connection * 0.003
            handled = sent + latency / 2
            # What was not yet answered at the cut is answered after the resume.
            if cut.at - latency <= sent < resume:
                handled = resume + number * 1e-6
            shows = clock(handled)
            answers.append(
                Answer(
                    connection=connection,
                    number=number,
                    sent=sent,
                    received=handled + latency / 2,
                    count=number,
                    mono=shows,
                    boot=shows + 3.0,
                    real=shows + 1.7e9,
                )
            )
    history.answers = sorted(answers, key=lambda answer: answer.received)
    return history


def change(history: History, place: int, **values: object) -> None:
    history.answers[place] = dataclasses.replace(history.answers[place], **values)  # type: ignore[arg-type]


def test_a_history_without_a_flaw_survives_and_its_figures_are_right() -> None:
    history = make()
    verdict = judge(history, [CUT])
    assert verdict.failures == ()
    assert verdict.survived
    assert verdict.requests == len(history.answers)
    assert (verdict.lost, verdict.duplicated, verdict.reordered, verdict.miscounted) == (0,) * 4
    assert verdict.same_connection
    assert verdict.failover_s == pytest.approx(RESUME - CUT.at, abs=0.05)
    assert verdict.latency_ms_p50 == pytest.approx(5.0, abs=0.01)
    assert verdict.latency_ms_p99 == pytest.approx(5.0, abs=0.01)
    assert verdict.clock_jump_ms == pytest.approx(0.0, abs=0.01)
    assert verdict.clock_drift_ms == pytest.approx(0.0, abs=0.01)
    assert verdict.resumes[0].each == pytest.approx((verdict.resumes[0].first,) * 2, abs=0.01)


def test_a_lost_request_fails() -> None:
    history = make()
    gone = history.answers.pop(600)
    assert gone.sent is not None
    history.unanswered.append(Request(gone.connection, gone.number, gone.sent))
    verdict = judge(history, [CUT])
    assert verdict.lost == 1
    assert verdict.requests == len(history.answers) + 1
    assert verdict.failures == ("1 requests have no answer",)


def test_an_answer_that_came_twice_fails() -> None:
    history = make()
    again = dataclasses.replace(history.answers[600], sent=None)
    history.answers.insert(601, again)
    verdict = judge(history, [CUT])
    assert verdict.duplicated == 1
    assert verdict.failures == ("1 answers came twice",)
    assert verdict.requests == len(history.answers) - 1


def test_an_answer_to_a_request_that_never_was_fails() -> None:
    history = make()
    history.answers.append(
        dataclasses.replace(history.answers[-1], number=99_999, count=99_999, sent=None)
    )
    assert judge(history, [CUT]).duplicated == 1


def test_swapped_answers_fail() -> None:
    history = make()
    first = next(n for n in range(600, 700) if history.answers[n].connection == 0)
    second = next(n for n in range(first + 1, 700) if history.answers[n].connection == 0)
    history.answers[first], history.answers[second] = (
        history.answers[second],
        history.answers[first],
    )
    verdict = judge(history, [CUT])
    assert verdict.reordered == 1
    assert verdict.failures == ("1 answers came out of order",)


def test_a_guest_that_counts_a_request_twice_fails() -> None:
    """It ran an epoch again that the client had seen already."""
    history = make()
    for place in range(600, len(history.answers)):
        change(history, place, count=history.answers[place].count + 1)
    verdict = judge(history, [CUT])
    assert verdict.miscounted == len(history.answers) - 600
    assert not verdict.survived


def test_a_connection_that_ended_fails() -> None:
    history = make()
    history.closed[1] = "Connection reset by peer"
    verdict = judge(history, [CUT])
    assert not verdict.same_connection
    assert verdict.failures == ("the connection to fd77::10 ended: Connection reset by peer",)


def test_a_client_that_did_not_come_to_its_end_fails() -> None:
    history = make()
    history.ended = False
    assert not judge(history, [CUT]).survived


def test_a_history_of_nothing_fails() -> None:
    verdict = judge(History(["a"], 0.0, 1.0, ended=True), [])
    assert verdict.failures == ("no request was sent",)


@pytest.mark.parametrize(
    ("clock", "jump", "why"),
    [
        # As after a failover that forgets how long it took.
        (lambda now: now + OFFSET - (2.3 if now > RESUME else 0), 2300, "changed by 2300 ms"),
        (lambda now: now + OFFSET + (1.0 if now > RESUME else 0), 1000, "changed by 1000 ms"),
        (lambda now: now + OFFSET - (700 if now > RESUME else 0), 700_000, "changed by 700000 ms"),
    ],
    ids=["stood still meanwhile", "ahead", "other host's uptime"],
)
def test_a_clock_that_jumped_fails(clock: Callable[[float], float], jump: float, why: str) -> None:
    verdict = judge(make(clock), [CUT])
    assert verdict.clock_jump_ms == pytest.approx(jump, abs=1)
    assert [why in each for each in verdict.failures] == [True, True]  # both clocks


def test_one_clock_that_jumped_is_enough() -> None:
    history = make()
    for place, answer in enumerate(history.answers):
        if answer.received > RESUME:
            change(history, place, boot=answer.boot + 5.0)
    verdict = judge(history, [CUT])
    assert verdict.clock_jump_ms == pytest.approx(5000, abs=1)
    assert len(verdict.failures) == 1
    assert "boot time" in verdict.failures[0]


def test_a_clock_that_stands_still_after_the_cut_fails() -> None:
    """Its best difference may be near the right one by chance; its course is not."""
    ending = 19.6

    def clock(now: float) -> float:
        return (ending if now > RESUME else now) + OFFSET

    verdict = judge(make(clock), [CUT])
    assert verdict.clock_jump_ms is not None
    assert verdict.clock_jump_ms < 250
    assert verdict.clock_drift_ms is not None
    assert verdict.clock_drift_ms > 1000
    assert any("stood still" in each for each in verdict.failures)


def test_a_clock_that_goes_backwards_fails() -> None:
    history = make()
    place = next(n for n, a in enumerate(history.answers) if a.received > RESUME + 1)
    change(history, place, mono=history.answers[place].mono - 0.1)
    assert judge(history, [CUT]).failures == ("the guest's monotonic clock went backwards 1 times",)


def test_requests_that_waited_for_the_resume_do_not_confuse_the_clocks() -> None:
    """Most answers after the cut belong to requests that were sent during the silence."""
    history = make(seconds=13.0)
    waited = [a for a in history.answers if a.received > CUT.at and a.latency > 0.1]
    at_once = [a for a in history.answers if a.received > RESUME and a.latency < 0.1]
    assert len(waited) > 2 * len(at_once)
    verdict = judge(history, [CUT])
    assert verdict.survived
    assert verdict.clock_jump_ms == pytest.approx(0, abs=1)


def test_requests_that_were_long_on_their_way_prove_nothing_about_clocks() -> None:
    """Before the cut each one waited for 600 ms until the guest read its clock."""
    history = make()
    for place, answer in enumerate(history.answers):
        if answer.received < CUT.at and answer.sent is not None:
            change(history, place, sent=answer.sent - 0.6)
    verdict = judge(history, [CUT])
    assert verdict.clock_jump_ms == pytest.approx(600, abs=1)
    assert verdict.survived


def test_an_answer_in_flight_at_the_cut_is_not_the_failover() -> None:
    history = make()
    place = max(n for n, a in enumerate(history.answers) if a.received < CUT.at)
    change(history, place, received=CUT.at + 0.003)
    assert judge(history, [CUT]).failover_s == pytest.approx(RESUME - CUT.at, abs=0.05)


def test_a_longer_silence_after_answers_had_come_again_is_not_the_failover() -> None:
    history = make()
    for place, answer in enumerate(history.answers):
        if 14.0 < answer.received < 18.0:
            change(history, place, received=18.0)
    assert judge(history, [CUT]).failover_s == pytest.approx(8.0, abs=0.05)
    settled = dataclasses.replace(CUT, settled=13.0)
    assert judge(history, [settled]).failover_s == pytest.approx(RESUME - CUT.at, abs=0.05)


def test_without_an_answer_after_the_cut_there_is_no_failover() -> None:
    history = make()
    late = [a for a in history.answers if a.received >= CUT.at]
    history.answers = [a for a in history.answers if a.received < CUT.at]
    history.unanswered = [Request(a.connection, a.number, a.sent or 0) for a in late]
    verdict = judge(history, [CUT])
    assert verdict.failover_s is None
    assert verdict.clock_jump_ms is None
    assert "no answer from 10.77.0.10 after the cut" in verdict.failures
    assert "no answer from fd77::10 after the cut" in verdict.failures


def test_one_silent_connection_fails() -> None:
    history = make()
    late = [a for a in history.answers if a.received >= CUT.at and a.connection == 1]
    history.answers = [a for a in history.answers if a not in late]
    history.unanswered = [Request(a.connection, a.number, a.sent or 0) for a in late]
    verdict = judge(history, [CUT])
    assert verdict.failover_s is not None
    assert verdict.resumes[0].each[1] is None
    assert "no answer from fd77::10 after the cut" in verdict.failures


def test_too_few_answers_are_no_proof_for_a_clock() -> None:
    verdict = judge(make(seconds=12.4), [CUT])
    assert any("too few" in each for each in verdict.failures)


def test_a_cut_without_a_protected_phase_fails() -> None:
    verdict = judge(make(), [Cut(protected=10.0, at=10.0)])
    assert "no request was answered while the guest was protected" in verdict.failures


def test_of_several_cuts_the_longest_silence_counts() -> None:
    history = make()
    second = Cut(15.0, 16.0)
    for place, answer in enumerate(history.answers):
        assert answer.sent is not None
        if answer.sent > second.at - 0.01:
            change(history, place, received=max(answer.received, 19.5 + answer.number * 1e-6))
    # Clocks after the second cut cannot be judged: all requests until then had to wait.
    verdict = judge(history, [CUT, second])
    assert verdict.failover_s == pytest.approx(3.5, abs=0.05)
    assert len(verdict.resumes) == 2
    assert verdict.resumes[0].first == pytest.approx(RESUME, abs=0.05)


def test_a_second_cut_without_an_answer_leaves_no_failover() -> None:
    history = make()
    history.answers = [a for a in history.answers if a.received < 16]
    verdict = judge(history, [CUT, Cut(15.0, 16.0)])
    assert verdict.failover_s is None
    assert any(each.startswith("cut 2: no answer") for each in verdict.failures)


def test_quantiles() -> None:
    assert quantile([], 0.5) is None
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile(list(range(100)), 0.99) == 99
    assert quantile([7], 0.99) == 7


# ---- Reading --------------------------------------------------------------------------------

START = {"event": "start", "connections": [{"address": "x", "local_port": 1}], "at": 1.0}


def lines(*rows: dict[str, object]) -> list[str]:
    return [json.dumps(row) + "\n" for row in rows]


def test_a_file_is_read_back() -> None:
    answer = {
        "event": "answer",
        "connection": 0,
        "number": 1,
        "sent": 1.5,
        "received": 1.6,
        "count": 1,
        "mono": 2_000_000_000,
        "boot": 3_000_000_000,
        "real": 4_000_000_000,
    }
    lost = {"event": "unanswered", "connection": 0, "number": 2, "sent": 1.7}
    closed = {"event": "closed", "connection": 0, "at": 2.0, "why": "reset"}
    history = read(
        lines(START | {"interval_ms": 20}, answer, lost, closed, {"event": "end", "at": 3.0})
    )
    assert history.answers == [Answer(0, 1, 1.5, 1.6, 1, 2.0, 3.0, 4.0)]
    assert history.unanswered == [Request(0, 2, 1.7)]
    assert history.closed == {0: "reset"}
    assert history.ended
    assert (history.began, history.until) == (1.0, 3.0)
    assert history.silences(1.0, 3.0) == [(1.6, 3.0)]


def test_a_line_cut_off_at_the_end_is_left_out_and_the_history_has_not_ended() -> None:
    history = read([*lines(START), '{"event": "answ'])
    assert not history.ended
    assert history.answers == []


@pytest.mark.parametrize(
    "rows",
    [
        [],
        ["nonsense\n", "\n"],
        lines({"event": "end", "at": 1.0}),
        lines(START, {"event": "surprise"}),
        lines(START, {"event": "answer", "connection": 0}),
        lines(START, {"no": "event"}),
    ],
)
def test_what_no_client_writes_is_refused(rows: list[str]) -> None:
    with pytest.raises(HistoryError):
        read(rows)


# ---- Reporting ------------------------------------------------------------------------------

FIGURES = Figures(checkpoints=431, pause_ms_p50=6.1, pause_ms_p99=20.5, wire_bytes_p50=41000)


def test_the_line_of_json_has_exactly_its_keys_in_order() -> None:
    values = json.loads(report.line(report.result(judge(make(), [CUT]), [FIGURES], [])))
    assert list(values) == list(report.KEYS)
    assert values["result"] == "survived"
    assert values["lost"] == values["duplicated"] == values["reordered"] == 0
    assert values["same_connection"] is True
    assert values["checkpoints"] == 431
    assert all(value is not None for value in values.values())


def test_any_failure_makes_the_result_failed() -> None:
    good = judge(make(), [CUT])
    bad = judge(make(lambda now: now + OFFSET + (now > RESUME)), [CUT])
    assert report.result(good, [FIGURES], ["the guest is gone"])["result"] == "failed"
    assert report.result(bad, [FIGURES], [])["result"] == "failed"
    nothing = report.result(None, [], [])
    assert nothing["result"] == "failed"
    assert list(nothing) == list(report.KEYS)


def test_of_several_cuts_the_worst_figures_count() -> None:
    worse = Figures(checkpoints=9, pause_ms_p50=5.0, pause_ms_p99=33.0, wire_bytes_p50=50000)
    values = report.result(judge(make(), [CUT]), [FIGURES, worse], [])
    assert values["checkpoints"] == 440
    assert values["pause_ms_p50"] == 6.1
    assert values["pause_ms_p99"] == 33.0
    assert values["wire_bytes_per_checkpoint_p50"] == 50000


def test_figures_come_out_of_the_status() -> None:
    spread = {"p50": 1.5, "p99": 2.5, "max": 3.0, "last": 1.0}
    status = {"statistics": {"checkpoints": 7, "pause_ms": spread, "wire_bytes": spread}}
    assert Figures.of(status) == Figures(7, 1.5, 2.5, 1.5)


def test_the_table_tells_people_the_same() -> None:
    history = make()
    verdict = judge(history, [CUT])
    text = report.table(history, verdict, [FIGURES], [CUT], ["IPv4", "IPv6"], 3.0)
    rows = dict(line.split("  ", 1) for line in text.splitlines())
    assert rows["requests"].strip() == f"{verdict.requests:,} on 2 connections, never opened again"
    assert "2.3" in rows["answers again"]
    assert "IPv6" in rows["answers again"]
    assert "p50 6.1 ms, p99 20.5 ms" in rows["guest paused"]
    before = [each.latency for each in history.answers if each.sent and each.received < 3.0]
    copying = [each.latency for each in history.answers if each.sent and 3.0 <= each.received < 5.0]
    for latencies, text in (
        (before, rows["latency"].partition("; ")[2]),
        (copying, rows["set up"]),
    ):
        median = quantile(latencies, 0.5)
        assert median is not None
        assert text.strip().startswith(f"p50 {median * 1000:.1f} ms, p99 ")
    assert "40.0 KiB" in rows["sent"]
