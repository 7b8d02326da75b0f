# SPDX-License-Identifier: Apache-2.0
"""What the processes of the proof do.

Not in ``__main__``: a process that is spawned for ``python -m`` does not import that.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from tests.prove import schedules, sweep


def quiet() -> None:
    """Say nothing of what the daemons under test log, and leave when they are cleared away."""
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None


def run_cases(cases: Sequence[sweep.Case]) -> list[tuple[sweep.Case, sweep.Outcome]]:
    """What came of cases of the sweep."""
    quiet()
    return [(case, sweep.run(case)) for case in cases]


def run_schedules(examples: int, derandomize: bool) -> tuple[int, str]:
    """How many schedules of Hypothesis were run, and what was violated, or ""."""
    quiet()
    before = schedules.Hosts.schedules
    try:
        return schedules.run(examples, derandomize=derandomize), ""
    except AssertionError as error:
        return schedules.Hosts.schedules - before, str(error)
