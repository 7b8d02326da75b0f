# SPDX-License-Identifier: Apache-2.0
"""The lab with a guest that is protected, or not, whichever a test asks for.

Booting guests and hosts takes most of the time of these tests, so the world goes on from where the
last test has left it: it looks where the guest is, and does only what is missing.  After a test
that failed it begins anew.  Tests therefore speak of primary and standby, not of hosts a and b.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest

from vagrant.demolib.hosts import Events, Reply, domains, kemari
from vagrant.demolib.program import Program
from vagrant.demolib.talk import Talk
from vagrant.lablib.guest import NAME as GUEST
from vagrant.lablib.guest import GuestOptions
from vagrant.lablib.lab import Lab
from vagrant.lablib.network import HOSTS, LINKS

#: Exit status of kemari.
NOT_PROTECTED = 4
#: Between two requests on each of the client's two connections, 20 a second together: the emulated
#: hosts have time left for what is tested.
INTERVAL_MS = 100


@dataclass(frozen=True, slots=True)
class Pair:
    """Which host runs the guest, and which is the other one."""

    primary: str
    standby: str


class World:
    """A lab, its guest, and what the daemons tell.

    :param guest: what the guest is to be like; None: as the lab was brought up for
    :param reprotect: after a failover it is protected again by itself, and :meth:`protected` waits
        for that; otherwise tests have their time to look at what a failover has left
    :param heartbeat_ms: silence that means death
    :ivar spoiled: what a test has left cannot be relied on
    :ivar moves: how often the guest has moved since it booted
    """

    def __init__(
        self,
        lab: Lab,
        guest: GuestOptions | None = None,
        *,
        reprotect: bool = False,
        heartbeat_ms: int = 1000,
    ) -> None:
        self.lab = lab
        self._heartbeat_ms = heartbeat_ms
        self._guest = guest
        self._reprotect = reprotect
        self.spoiled = True
        self.moves = 0
        self._events: dict[str, Events] = {}

    def for_test(self, request: pytest.FixtureRequest) -> Iterator[World]:
        """This world, to be made anew for the next test if this one fails."""
        failed = request.session.testsfailed
        yield self
        if request.session.testsfailed > failed:
            self.spoiled = True

    def close(self) -> None:
        """Listen to the daemons no more."""
        for events in self._events.values():
            events.close()
        self._events.clear()

    # ---- Section: states that tests ask for ----

    def unprotected(self) -> Pair:
        """The guest runs, and nothing protects it."""
        pair = self._running()
        found = self.status(pair.primary)
        if found and found["role"] == "primary":
            reply = self.kemari(pair.primary, "stop", GUEST, check=False)
            assert reply.status in (0, NOT_PROTECTED), reply
        return pair

    def protected(self) -> Pair:
        """The guest runs and is protected."""
        pair = self._running()
        mark = self.events(pair.primary).seen
        found = self.status(pair.primary)
        if found and found["role"] == "primary" and found["protected"]:
            return pair
        if self._reprotect and found and found["role"] == "owner":
            self.events(pair.primary).wait("protected", since=mark)
            return pair
        reply = self.kemari(pair.primary, "start", GUEST, pair.standby, check=False)
        if reply.status != 0:
            # Only because it comes about by itself, as after a restart.
            assert " already, to " in reply.said, reply
            self.events(pair.primary).wait("protected", since=mark)
        return pair

    def protected_after_a_move(self) -> Pair:
        """The guest runs, protected, on a host where it did not boot."""
        pair = self.protected()
        if self.moves:
            return pair
        self.kemari(pair.primary, "failover", GUEST)
        self.moves += 1
        return self.protected()

    def _running(self) -> Pair:
        if self.spoiled:
            self._anew()
        for name in HOSTS:
            if not self.lab.hosts[name].is_running:
                self.boot(name)
            for link in LINKS:
                self.lab.plug(name, link)
        owners = [name for name in HOSTS if GUEST in domains(self.lab, name)]
        assert len(owners) <= 1, f"the guest runs on {' and '.join(owners)}"
        if not owners:
            self.lab.guest_start("a", self._guest)
            self.moves = 0
        owner = owners[0] if owners else "a"
        return Pair(owner, other(owner))

    def _anew(self) -> None:
        self.close()
        self.lab.reset(reprotect=self._reprotect, heartbeat_ms=self._heartbeat_ms)
        for name in HOSTS:
            self.events(name).wait("daemon")
        self.spoiled = False

    # ---- Section: hosts ----

    def events(self, host: str) -> Events:
        """What the daemon on a host tells; the host must have power."""
        if host not in self._events:
            self._events[host] = Events(self.lab, host)
        return self._events[host]

    def kemari(self, host: str, *words: str, check: bool = True) -> Reply:
        """Run ``kemari ... --json`` on a host."""
        return kemari(self.lab, host, *words, check=check)

    def status(self, host: str) -> dict[str, Any] | None:
        """What ``kemari status`` says of the guest on a host; None if it knows nothing of it."""
        for status in self.kemari(host, "status").value:
            if status["guest"] == GUEST:
                return dict(status)
        return None

    def checkpoints(self, host: str, trigger: str) -> int:
        """How many checkpoints of the guest, protected by this host, this trigger has had."""
        status = self.status(host)
        assert status is not None, f"host {host} knows nothing of the guest"
        return int(status["statistics"][trigger])

    def cut(self, host: str) -> float:
        """Cut a host's power; when that was."""
        at = time.monotonic()
        self.lab.power_cut(host)
        events = self._events.pop(host, None)
        if events is not None:
            events.close()
        return at

    def boot(self, host: str) -> None:
        """Give a host its power back; returns when its daemon knows whose the guest is."""
        # Its event log still has what was before; the hosts' clocks are set from this machine's.
        began = time.time() - 5
        self.lab.boot(host)
        self.awake(host, began)

    def awake(self, host: str, began: float) -> None:
        """Wait until the daemon of a host, started after ``began``, knows whose the guest is.

        :param began: by ``time.time()``, which the hosts' clocks are set from
        """
        events = self.events(host)
        events.wait_for("daemon", lambda e: e["event"] == "daemon" and e["time"] > began)
        found = self.status(host)
        if found and found["state"] == "asking":
            events.wait_for(
                "moved or unprotected",
                lambda e: e["event"] in ("moved", "unprotected") and e["time"] > began,
            )

    def kill_daemon(self, host: str) -> None:
        """End kemarid on a host with SIGKILL; its supervisor starts it again."""
        pid = self.lab.ssh(host, "cat /etc/service/kemarid/supervise/pid").stdout.strip()
        assert pid.isdigit()
        self.lab.ssh(host, f"kill -9 {pid}")

    def only_on(self, host: str) -> None:
        """Check that the guest is on this host, and on no other one that has power."""
        for name in HOSTS:
            if self.lab.hosts[name].is_running:
                found = domains(self.lab, name)
                assert (GUEST in found) == (name == host), f"{name}: {found}"

    def network(self, host: str) -> tuple[list[str], list[str]]:
        """(queueing disciplines and filters, names of network devices) of a host."""
        shown = self.lab.ssh(
            host,
            "tc qdisc show; for d in $(ls /sys/class/net); do tc filter show dev $d ingress; done; "
            "echo ----; ls /sys/class/net",
        ).stdout
        queues, _, devices = shown.partition("----\n")
        return sorted(queues.splitlines()), devices.split()

    def log_dirty(self, host: str) -> bool:
        """Whether the hypervisor keeps a dirty log of the guest, by its own account.

        Debug key ``q`` (xen/common/keyhandler.c) has each domain's paging modes printed
        (xen/arch/x86/mm/paging.c).
        """
        domid = self.lab.ssh(host, f"xl domid {GUEST}").stdout.strip()
        said = self.lab.ssh(host, "xl dmesg -c >/dev/null; xl debug-keys q; xl dmesg").stdout
        about = said.partition(f"General information for domain {domid}:")[2]
        modes = re.search(r"paging assistance: (.*)", about.partition("General information")[0])
        assert modes, said[-3000:]
        return "log_dirty" in modes.group(1).split()

    # ---- Section: clients ----

    def talk(self, name: str) -> Talk:
        """A client on two connections, 20 requests a second together."""
        records = self.lab.state / "out" / f"{name}.jsonl"
        return Talk(self.lab, records, "--interval", str(INTERVAL_MS))


def other(host: str) -> str:
    """The other host."""
    return HOSTS[1 - HOSTS.index(host)]


class Quiet(Program):
    """A client with an IPv4 and an IPv6 connection on which nothing happens unless asked for."""

    def __init__(self, lab: Lab) -> None:
        errors = lab.state / "out" / "quiet.err"
        super().__init__(lab, "quiet client", ["vagrant.demolib.quiet"], errors)
        self.begin("the connections", lambda event: event["event"] == "connected", timeout=120)

    def ask(self, times: int = 5) -> tuple[float, float]:
        """Send requests on both connections and check the answers.

        :return: guest's monotonic and boot time minus this machine's when asked, in seconds
        """
        ahead: tuple[list[float], list[float]] = ([], [])
        for _ in range(times):
            mark = self.seen
            self.tell("")
            reply = self.wait("an answer", lambda event: event["event"] == "said", since=mark)
            for said in reply["said"]:
                number, count, mono, boot, _real = said["words"]
                assert number == count == reply["number"]
                ahead[0].append(mono / 1e9 - said["sent"])
                ahead[1].append(boot / 1e9 - said["sent"])
        return median(ahead[0]), median(ahead[1])
