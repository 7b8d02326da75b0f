# SPDX-License-Identifier: Apache-2.0
"""The ways in which the guest is protected, or not."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from bench.cases import suspends
from bench.samples import KEMARI, REMUS, TIMER, UNPROTECTED
from kemari.pace import LATENCY, THROUGHPUT
from vagrant.demolib.hosts import Events, kemari
from vagrant.lablib.errors import LabError
from vagrant.lablib.guest import NAME as GUEST
from vagrant.lablib.lab import Lab
from vagrant.lablib.network import HOSTS

PRIMARY, STANDBY = HOSTS
#: Where the standby is reached on the replication link.
STANDBY_ADDRESS: Final = "10.78.0.2"
#: Seconds until a protection has begun.
PATIENCE: Final = 300.0
#: Suspends after which xl remus is past its first copy: that ends with the first of them.
COPIED: Final = 3
REMUS_LOG: Final = "/var/log/xen/remus.log"
REMUS_PID: Final = "/run/xl-remus.pid"

# Asks kemarid for its status as the command line does, at a tenth of what starting that costs.
_STATUS = """
import socket
daemon = socket.socket(socket.AF_UNIX)
daemon.connect("/run/kemari/kemarid.sock")
daemon.sendall(b'{"op": "status", "args": {}}\\n')
print(daemon.makefile().readline())
"""


@dataclass(frozen=True, slots=True)
class State:
    """What is known of a protection from outside the guest.

    :ivar checkpoints: since it began
    :ivar paused_ms: for which the guest was paused for all of them; None without a clock for it
    :ivar stages_ms: what each stage of the last ones took, the median; empty likewise
    """

    checkpoints: int = 0
    paused_ms: float | None = None
    stages_ms: Mapping[str, float] = field(default_factory=dict)


class Way(Protocol):
    """A way of protecting the guest on host a."""

    name: str

    def begin(self, lab: Lab, folder: Path) -> None:
        """Protect the guest; returns when it is.

        :raises LabError: it could not be
        """

    def look(self, lab: Lab, folder: Path) -> State:
        """How far the protection is.

        :raises LabError: the guest is not protected any more
        """

    def end(self, lab: Lab) -> None:
        """What must be ended before the lab is made ready for the next one."""


class Unprotected:
    """The guest alone."""

    name = UNPROTECTED

    def begin(self, lab: Lab, folder: Path) -> None:
        """Nothing to do."""

    def look(self, lab: Lab, folder: Path) -> State:
        """Nothing to see."""
        return State()

    def end(self, lab: Lab) -> None:
        """Nothing to end."""


class Kemari:
    """``kemari start``.

    :param words: further ones
    """

    def __init__(self, name: str, *words: str) -> None:
        self.name = name
        self._words = words

    def begin(self, lab: Lab, folder: Path) -> None:
        """See :class:`Way`."""
        for host in HOSTS:
            events = Events(lab, host)
            try:
                events.wait("daemon")
            finally:
                events.close()
        kemari(lab, PRIMARY, "start", GUEST, STANDBY, *self._words)

    def look(self, lab: Lab, folder: Path) -> State:
        """See :class:`Way`."""
        shown = lab.ssh(PRIMARY, f"python3 -S -c {shlex.quote(_STATUS)}").stdout
        return parse_status(shown)

    def end(self, lab: Lab) -> None:
        """Making the lab ready for the next one is enough."""


def parse_status(line: str) -> State:
    """Out of the answer of kemarid.

    :raises LabError: the guest is not protected, or the answer is something else
    """
    try:
        (guest,) = json.loads(line)["result"]
        figures: dict[str, Any] = guest["statistics"]
        checkpoints = int(figures["checkpoints"])
        if guest["protected"]:
            stages = {name: float(of["p50"]) for name, of in figures["stages_ms"].items()}
            return State(checkpoints, figures["pause_ms"]["mean"] * checkpoints, stages)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LabError("kemarid's status cannot be read; expected one guest's.", line) from None
    raise LabError(f"The guest is {guest['state']} ({guest['why']}); expected it protected.")


class Remus:
    """Stock ``xl remus`` with the options that Debian's build of it can do.

    ``-F`` allows the others: ``-n`` does without a network buffer, which that build does not have,
    ``-d`` without disk replication, which needs a DRBD that nobody ships.

    :param interval: milliseconds between two checkpoints
    """

    def __init__(self, interval: int) -> None:
        self.name = f"{REMUS}{interval}"
        self._interval = interval

    def begin(self, lab: Lab, folder: Path) -> None:
        """See :class:`Way`."""
        words = ["xl", "remus", "-F", "-n", "-d", "-i", str(self._interval), GUEST, STANDBY_ADDRESS]
        lab.ssh(
            PRIMARY,
            f"setsid {shlex.join(words)} </dev/null >{REMUS_LOG} 2>&1 & echo $! >{REMUS_PID}",
        )
        try:
            suspends(lab, folder, COPIED, PATIENCE)
        except LabError as error:
            raise LabError(str(error), self._said(lab)) from None

    def look(self, lab: Lab, folder: Path) -> State:
        """See :class:`Way`."""
        alive = lab.ssh(PRIMARY, f"kill -0 $(cat {REMUS_PID})", check=False)
        if alive.status != 0:
            raise LabError("xl remus ended; expected it to go on.", self._said(lab))
        return State(suspends(lab, folder, 0, PATIENCE))

    def end(self, lab: Lab) -> None:
        """End the receiving side first: it takes the sender's end for the primary's death."""
        lab.ssh(STANDBY, "kill -9 $(pidof xl libxl-save-helper)", check=False)
        lab.ssh(PRIMARY, f"kill -9 $(cat {REMUS_PID}) $(pidof libxl-save-helper)", check=False)

    def _said(self, lab: Lab) -> str:
        return lab.ssh(PRIMARY, f"tail -n 30 {REMUS_LOG}; xl list", check=False).stdout


INTERVALS: Final = (25, 100, 200)
_WAYS: Final[tuple[Way, ...]] = (
    Unprotected(),
    Kemari(KEMARI),
    *(Kemari(f"{KEMARI}-{pace}", "--pace", pace) for pace in (LATENCY, THROUGHPUT)),
    *(Kemari(f"{TIMER}{ms}", "--interval-only", "--interval", str(ms)) for ms in INTERVALS),
    *(Remus(interval) for interval in INTERVALS),
)
WAYS: Final = {way.name: way for way in _WAYS}
QUICK: Final = (UNPROTECTED, KEMARI, f"{TIMER}25", f"{REMUS}100")
