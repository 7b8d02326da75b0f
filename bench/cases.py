# SPDX-License-Identifier: Apache-2.0
"""The workloads: what the guest is asked to do while it is protected, and what of it got done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.gaps import Gaps
from bench.meters import Watch
from vagrant.demolib.ledger import Writers
from vagrant.demolib.program import Event, Program
from vagrant.demolib.talk import Talk
from vagrant.lablib.errors import LabError
from vagrant.lablib.lab import Lab
from vagrant.lablib.network import GUEST_IPV4

#: MiB that the memory writer writes to.
AREA: Final = 16
#: Answers on each connection before times are taken.
WARM: Final = 2
#: Connections to the database.
WRITERS: Final = 4


@dataclass(frozen=True, slots=True)
class Load:
    """What a workload came to; see :class:`bench.samples.Sample`."""

    worked: float
    work: float
    latencies: tuple[float, ...] = ()
    gaps: Gaps | None = None


Run = Callable[[Lab, Path, float, Watch], Load]


@dataclass(frozen=True, slots=True)
class Case:
    """A workload.

    :ivar unit: of its work
    :ivar run: does it for about so many seconds, and has the meters read at its begin and its
        end; the folder is for its files
    """

    name: str
    unit: str
    run: Run


def request(
    lab: Lab, folder: Path, what: str, value: str, timeout: float, watch: Watch | None = None
) -> Event:
    """What the program at the client's place was told by the guest.

    :param watch: has the meters read when the load has begun, and at its end
    :raises LabError: nothing within ``timeout`` seconds, or an error
    """
    with Program(lab, "client", ["bench.client", what, value], folder / "client.err") as program:
        if watch is not None:
            program.wait(f"`{value}` to begin", _is("begun"), timeout=timeout)
            watch.mark()
        done = program.wait(f"the end of `{what} {value}`", _is("done"), timeout=timeout)
        if watch is not None:
            watch.mark()
        return done


def _is(name: str) -> Callable[[Event], bool]:
    return lambda event: event["event"] == name


def _patience(seconds: float) -> float:
    return 4 * seconds + 120


# ---- Memory and the clock ----


def _idle(lab: Lab, folder: Path, seconds: float, watch: Watch) -> Load:
    gaps = writing("same", 0)(lab, folder, seconds, watch).gaps
    assert gaps is not None
    return Load(seconds, seconds - gaps.away_ms / 1000, gaps=gaps)


def writing(pattern: str, rate: float) -> Run:
    """Write so many pages a second in that pattern of ``vagrant/guest/load.c``."""

    def run(lab: Lab, folder: Path, seconds: float, watch: Watch) -> Load:
        line = f"write {seconds} {rate} {AREA} {pattern}"
        answer = request(lab, folder, "ask", line, _patience(seconds), watch)["answer"]
        try:
            pages, longest, *buckets = answer.split()
            return Load(seconds, int(pages), gaps=Gaps.parse(longest, buckets))
        except ValueError:
            raise LabError(f"The guest answered {answer[:80]!r} to `{line}`.") from None

    return run


# ---- Requests ----


def requests(connections: int) -> Run:
    """On each connection a request, its answer, the next request, and so on."""

    def run(lab: Lab, folder: Path, seconds: float, watch: Watch) -> Load:
        words = ["--closed-loop", "--interval", "0"]
        for _ in range(connections):
            words += ["--address", GUEST_IPV4]
        with Talk(lab, folder / "requests.jsonl", *words) as talk:
            talk.wait_answers(WARM)
            begin = watch.mark()
            talk.wait_seconds(seconds)
            end = watch.mark()
            history = talk.stop()
        if history.closed:
            raise LabError(f"A connection to the guest ended: {history.closed}.")
        answers = [each for each in history.answers if begin <= each.received < end]
        latencies = tuple(each.latency * 1000 for each in answers)
        return Load(end - begin, len(answers), latencies)

    return run


def _store(lab: Lab, folder: Path, seconds: float, watch: Watch) -> Load:
    with Writers(lab, folder / "writer.err", WRITERS) as writers:
        writers.wait_done(WARM)
        begin = watch.mark()
        writers.wait(
            f"{seconds:.0f} s more of it",
            lambda event: event["event"] == "done" and event["answered"] >= begin + seconds,
            timeout=_patience(seconds),
        )
        end = watch.mark()
        done = [each for each in writers.done if begin <= each.answered < end]
    return Load(end - begin, len(done), tuple(each.latency * 1000 for each in done))


# ---- The rest ----


def _bulk(what: str) -> Run:
    def run(lab: Lab, folder: Path, seconds: float, watch: Watch) -> Load:
        watch.mark()
        done = request(lab, folder, what, str(seconds), _patience(seconds))
        watch.mark()
        return Load(done["seconds"], done["bytes"] / 1024)

    return run


def _compress(lab: Lab, folder: Path, seconds: float, watch: Watch) -> Load:
    done = request(lab, folder, "ask", f"compress {seconds}", _patience(seconds), watch)
    return Load(seconds, int(done["answer"]) / 1024)


def suspends(lab: Lab, folder: Path, at_least: int, timeout: float) -> int:
    """How often the guest's kernel was suspended, once that is so many times.

    :raises LabError: it was not within ``timeout`` seconds
    """
    return int(request(lab, folder, "ask", f"suspends {at_least}", timeout)["answer"])


CASES: Final = {
    case.name: case
    for case in (
        Case("idle", "s of its own", _idle),
        Case("rr-1", "answers", requests(1)),
        Case("rr-8", "answers", requests(8)),
        Case("rr-64", "answers", requests(64)),
        Case("kv", "writes", _store),
        Case("write-sequential", "pages", writing("sequential", 500)),
        Case("write-sequential-fast", "pages", writing("sequential", 2000)),
        Case("write-random", "pages", writing("random", 500)),
        Case("write-same", "pages", writing("same", 500)),
        Case("write-zero", "pages", writing("zero", 500)),
        Case("send", "KiB", _bulk("send")),
        Case("receive", "KiB", _bulk("receive")),
        Case("compress", "KiB", _compress),
    )
}
QUICK: Final = ("idle", "rr-1", "rr-8", "kv", "write-sequential")
