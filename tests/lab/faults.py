# SPDX-License-Identifier: Apache-2.0
"""Daemons of the lab that fail at chosen points, and clients that must not notice."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from kemari.faultpoints import MARKER, VARIABLE
from tests.lab.protection_world import Pair, World
from tests.prove.registers import Registers
from vagrant.demolib.verdict import judge
from vagrant.lablib.guest import NAME as GUEST

#: Answers on each connection that show that it works.
SOME = 20
#: Seconds from the moment at which a fault may happen until it has: disks may have to be brought up
#: to date first, on busy emulated hosts.
PATIENCE = 300
#: A shell script, read by the supervisor's before it starts kemarid.
ENVIRONMENT = "/etc/kemari/environment"
#: The faults to come, a line each.
QUEUE = "/etc/kemari/faults"
LOG = "/var/log/kemari/kemarid.log"
LEDGER = "/var/lib/kemari/guests"
#: What the daemon says when a fault happens.
HAPPENS = "WARNING fault point"


def start_with(world: World, host: str, script: str) -> None:
    """Start a daemon anew, and from now on with what the shell script puts into its environment."""
    events = world.events(host)
    mark = events.seen
    world.lab.ssh(
        host,
        f"touch {MARKER}; chmod 644 {MARKER}; printf %s {shlex.quote(script)} >{ENVIRONMENT}",
    )
    # One that is ended in good order is not started again at once.
    world.kill_daemon(host)
    events.wait("daemon", since=mark)


class Faults:
    """The faults of one host's daemon, one after the other, each in a daemon started anew."""

    def __init__(self, world: World, host: str, faults: tuple[str, ...]) -> None:
        self._world = world
        self._host = host
        self._faults = list(faults)
        self._happened = int(self._ssh(f"grep -ac '{HAPPENS}' {LOG} || true"))

    def arm(self) -> None:
        """Start the daemon anew, with the first fault; each restart takes the next."""
        self._ssh(f"printf '%s\\n' {shlex.join(self._faults)} >{QUEUE}")
        start_with(self._world, self._host, f"{VARIABLE}=$(head -n 1 {QUEUE})\nsed -i 1d {QUEUE}\n")

    def wait(self) -> float:
        """Wait until the next fault has happened; when it did, by the host's ``time.time()``."""
        fault = self._faults.pop(0)
        self._happened += 1
        done = self._ssh(
            f"for second in $(seq {PATIENCE}); do"
            f" [ $(grep -ac '{HAPPENS}' {LOG}) -ge {self._happened} ] && break; sleep 1; done;"
            f" grep -a '{HAPPENS}' {LOG} | tail -n +{self._happened} | head -n 1"
        )
        point, action, *_ = fault.split(":")
        assert f"{HAPPENS} {point}: {action}" in done, f"{fault} did not happen on {self._host}"
        # The lab's hosts are in UTC.
        when = done.split(" WARNING")[0] + " +0000"
        return datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f %z").timestamp()

    def skip(self) -> None:
        """The next fault will not happen: its daemon ends before, with its host."""
        self._faults.pop(0)

    def disarm(self) -> None:
        """No faults from the next start on."""
        self._ssh(f"rm -f {MARKER} {ENVIRONMENT} {QUEUE}")

    def _ssh(self, command: str) -> str:
        return self._world.lab.ssh(self._host, command, timeout=2 * PATIENCE).stdout


@contextmanager
def armed(world: World, host: str, *faults: str) -> Iterator[Faults]:
    """A kemarid on ``host``, started anew, to which these will happen: values of KEMARI_FAULT."""
    chain = Faults(world, host, faults)
    chain.arm()
    try:
        yield chain
    finally:
        chain.disarm()


@contextmanager
def clients(world: World) -> Iterator[None]:
    """Clients that talk meanwhile, and must not have noticed anything but silence."""
    errors = world.lab.state / "out" / "registers.err"
    with (
        world.talk("faults") as talk,
        Registers(world.lab, errors) as registers,
    ):
        talk.wait_answers(SOME)
        yield
        talk.wait_answers(SOME)
        assert registers.stop() == []
        assert registers.count > SOME
        verdict = judge(talk.stop(), [])
        print(verdict)
        assert verdict.failures == ()


def freshly_protected(world: World, pair: Pair) -> None:
    """The guest, which was not, is protected, and the events tell of it: what comes is later."""
    told = world.events(pair.primary)
    mark = told.seen
    assert world.protected() == pair
    told.wait("protected", since=mark)


def move_in_vain(world: World, pair: Pair, faults: Faults) -> None:
    """A planned move that the next fault brings to nothing: the guest goes on where it was."""
    told = world.events(pair.primary)
    mark = told.seen
    reply = world.kemari(pair.primary, "failover", GUEST, check=False)
    assert reply.status != 0
    faults.wait()
    told.wait("protected", since=mark)
    world.only_on(pair.primary)


@contextmanager
def unwritable(world: World, host: str) -> Iterator[None]:
    """The ledger of a host cannot be written meanwhile."""
    world.lab.ssh(host, f"mount --bind {LEDGER} {LEDGER} && mount -o remount,bind,ro {LEDGER}")
    try:
        yield
    finally:
        world.lab.ssh(host, f"umount {LEDGER}")


def well_again(world: World, before: Pair) -> None:
    """The guest is protected, on one host only."""
    pair = world.protected()
    if pair != before:
        world.moves += 1
    world.only_on(pair.primary)
