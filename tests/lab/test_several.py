# SPDX-License-Identifier: Apache-2.0
"""Several guests at once, on both hosts: each host is the standby of the other one's guests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.lab.protection_world import other
from vagrant.demolib.hosts import Events, domains, kemari
from vagrant.demolib.talk import Talk
from vagrant.demolib.verdict import Cut, judge
from vagrant.lablib.guest import GuestOptions
from vagrant.lablib.lab import Lab
from vagrant.lablib.network import HOSTS, guest_addresses

#: Answers on each connection that show that it works.
SOME = 10
#: Between two requests on each connection, of which every guest has two.
INTERVAL_MS = 400
MEMORY_MIB = 96
#: A guest remembers its number, so the hosts must not give the same ones: see docs/install.md.
DRAW_NUMBERS = "echo 'domid_policy=\"random\"' >>/etc/xen/xl.conf"
#: A copy of all of every guest's memory is more than an emulated host's Dom0 has.
SPARE_MEMORY = (
    "sed -i '/^reference_percent/d; 1i reference_percent = 25' /etc/kemari/kemari.toml && "
    "/usr/lib/kemari-lab/kemarid-up"
)


#: For `make check CHECK=lab-long`.
pytestmark = pytest.mark.long


class Several:
    """Guests of a lab, where each of them runs, and what their clients see."""

    def __init__(self, lab: Lab, count: int) -> None:
        self.lab = lab
        self.guests = [GuestOptions(number=n, memory_mib=MEMORY_MIB) for n in range(count)]
        self.home = {guest.name: HOSTS[guest.number % 2] for guest in self.guests}
        self.events = {name: Events(lab, name) for name in HOSTS}
        self.talks: dict[str, Talk] = {}
        self.cuts: dict[str, list[Cut]] = {guest.name: [] for guest in self.guests}
        self._protected = 0.0

    def on(self, host: str) -> list[GuestOptions]:
        """The guests that run on a host."""
        return [guest for guest in self.guests if self.home[guest.name] == host]

    def on_each(self, work: Callable[[str, GuestOptions], object]) -> None:
        """Do something with every guest, one after the other on either host."""

        def with_its_guests(host: str) -> None:
            for guest in self.on(host):
                work(host, guest)

        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(with_its_guests, host) for host in HOSTS]:
                done.result()

    def begin(self, stack: ExitStack) -> None:
        """Boot the guests, protect each to the other host, and have clients talk to them."""
        for name in HOSTS:
            self.lab.ssh(name, SPARE_MEMORY)
            self.lab.ssh(name, DRAW_NUMBERS)
        self.on_each(self.lab.guest_start)
        self.on_each(lambda host, guest: kemari(self.lab, host, "start", guest.name, other(host)))
        self._protected = time.monotonic()
        for guest in self.guests:
            records = self.lab.state / "out" / f"several-{guest.name}.jsonl"
            words = [word for each in guest_addresses(guest.number) for word in ("--address", each)]
            talk = Talk(self.lab, records, "--interval", str(INTERVAL_MS), *words)
            self.talks[guest.name] = stack.enter_context(talk)
        self.answering(self.guests)

    def answering(self, guests: Iterable[GuestOptions]) -> None:
        """Wait until each of them answers on every connection."""
        for guest in guests:
            self.talks[guest.name].wait_answers(SOME)

    def cut(self, host: str) -> None:
        """Cut a host's power; returns when its guests answer on the other one."""
        there, moving = other(host), self.on(host)
        mark = self.events[there].seen
        seen = {guest.name: self.talks[guest.name].seen for guest in moving}
        at = time.monotonic()
        self.lab.power_cut(host)
        self.events.pop(host).close()
        for guest in moving:
            self.talks[guest.name].wait_resumed(at, since=seen[guest.name])
        self._told(there, "takeover", moving, mark)
        self.answering(self.guests)
        settled = time.monotonic()
        for guest in moving:
            self.cuts[guest.name].append(Cut(self._protected, at, settled))
            self.home[guest.name] = there
        # A guest has its own name a moment after it answers, but before that is told.
        assert set(domains(self.lab, there)) == set(self.home)

    def bring_back(self, host: str) -> None:
        """Give a host its power back; returns when all guests are protected to it, by itself."""
        there = other(host)
        mark = self.events[there].seen
        self.lab.boot(host)
        self.events[host] = Events(self.lab, host)
        self._told(there, "protected", self.guests, mark)
        self._protected = time.monotonic()
        self.answering(self.guests)

    def _told(self, host: str, event: str, guests: Iterable[GuestOptions], mark: int) -> None:
        for guest in guests:
            self.events[host].wait_for(
                f"{event} of {guest.name}",
                lambda e, name=guest.name: (e["event"], e["guest"]) == (event, name),  # type: ignore[misc]
                since=mark,
            )

    def close(self) -> None:
        """Listen to the daemons no more."""
        for events in self.events.values():
            events.close()


@pytest.fixture
def several(fresh_lab: Lab, request: pytest.FixtureRequest) -> Iterator[Several]:
    """The guests, as many as the test asks for, on hosts whose daemons protect them again."""
    guests = Several(fresh_lab, request.param)
    yield guests
    guests.close()


@pytest.mark.parametrize("several", [3, 8], indirect=True)
def test_each_host_saves_the_others_guests(several: Several) -> None:
    """Half of the guests lose their host, the others their standby; then all lose their host."""
    with ExitStack() as stack:
        several.begin(stack)
        several.cut("a")
        several.bring_back("a")
        several.cut("b")
        for name, talk in several.talks.items():
            verdict = judge(talk.stop(), several.cuts[name])
            print(name, verdict)
            assert verdict.failures == ()
            assert len(verdict.resumes) == len(several.cuts[name])
