# SPDX-License-Identifier: Apache-2.0
"""How long answers stay away when the primary's host loses its power."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

from vagrant.demolib.demo import Demo
from vagrant.demolib.verdict import Cut, Resume
from vagrant.lablib.errors import LabError
from vagrant.lablib.guest import GuestOptions
from vagrant.lablib.lab import Lab

#: Seconds of silence after which the standby takes the primary for dead; the lab's hosts have
#: Kemari's default (``docs/configuration.md``).
HEARTBEAT: Final = 1.0
#: Seconds of protection before each cut, and milliseconds between two requests, as in the
#: demonstration.
PROTECTED: Final = 10.0
INTERVAL: Final = 40.0


def measure(lab: Lab, cuts: int) -> list[float]:
    """Cut the power so many times, to and fro; seconds from each cut to the first answer after it.

    :raises LabError: a failover did not come, or a request was lost
    """
    demo = Demo(lab, cuts, PROTECTED, INTERVAL, GuestOptions())
    demo.run()
    failures = [*demo.failures, *(demo.verdict.failures if demo.verdict else ["no verdict"])]
    if failures or demo.verdict is None:
        raise LabError(f"A failover was not as it should be: {'; '.join(failures)}.")
    return durations(demo.cuts, demo.verdict.resumes)


def durations(cuts: Sequence[Cut], resumes: Sequence[Resume]) -> list[float]:
    """Seconds from each cut to the first answer after it."""
    return [
        resume.first - cut.at
        for cut, resume in zip(cuts, resumes, strict=True)
        if resume.first is not None
    ]


def text(seconds: Sequence[float]) -> str:
    """For people."""
    ordered = sorted(seconds)
    return (
        f"failover, from the power cut to the first answer: {len(ordered)} cuts, "
        f"shortest {ordered[0]:.2f} s, median {statistics.median(ordered):.2f} s, "
        f"longest {ordered[-1]:.2f} s; heartbeat {HEARTBEAT:g} s\n"
    )


def beyond_heartbeat(seconds: Sequence[float]) -> float | None:
    """What the median failover took beyond the heartbeat time; None without any."""
    return statistics.median(seconds) - HEARTBEAT if seconds else None
