# SPDX-License-Identifier: Apache-2.0
"""``kemari`` on the lab's hosts: asking it, and waiting for what it decides."""

from __future__ import annotations

import json
import shlex
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vagrant.lablib.errors import LabError
from vagrant.lablib.lab import Lab

#: The event log of kemarid; read as a file, because each start of ``kemari`` takes an emulated host
#: about two seconds of its only CPU.
EVENT_LOG = "/var/lib/kemari/events.jsonl"
DAEMON_LOG = "/var/log/kemari/kemarid.log"


@dataclass(frozen=True, slots=True)
class Reply:
    """What a command of ``kemari --json`` came to.

    :ivar status: exit status
    :ivar value: the JSON value that it printed, or None
    :ivar said: what it said on standard error
    """

    status: int
    value: Any
    said: str


def kemari(
    lab: Lab, host: str, *words: str, check: bool = True, timeout: float = 600, show: bool = False
) -> Reply:
    """Run ``kemari ... --json`` on a host.

    :param check: raise if its exit status is not 0
    :param show: pass on what it says on standard error as it comes, instead of keeping it
    :raises LabError: the host has no power, or the command failed or took too long
    """
    if not lab.host(host).is_running:
        raise LabError(f"Host {host} has no power; `lab boot {host}` starts it.")
    command = shlex.join(["kemari", *words, "--json"])
    try:
        done = subprocess.run(
            [*lab.ssh_client.argv(host), command],
            cwd=lab.state,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if show else subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LabError(f"`{command}` on host {host} did not end within {timeout:.0f} s.") from None
    said = done.stderr or ""
    try:
        value = json.loads(done.stdout) if done.stdout.strip() else None
    except ValueError:
        value, said = None, said + done.stdout
    if check and done.returncode != 0:
        reason = value["error"]["text"] if isinstance(value, dict) and "error" in value else ""
        raise LabError(
            f"`{command}` on host {host} failed with exit status {done.returncode}"
            + (f": {reason}" if reason else "."),
            said[-4000:],
        )
    return Reply(done.returncode, value, said)


def domains(lab: Lab, host: str) -> dict[str, str]:
    """Names of the domains on a host other than Dom0, and their state as ``xl list`` has it.

    :raises LabError: the host has no power
    """
    rows = [line.split() for line in lab.ssh(host, "xl list").stdout.splitlines()[1:]]
    # Name ID Mem VCPUs State Time; a name may be missing, then there is "(null)".
    return {row[0]: row[4] for row in rows if row[1] != "0"}


def bring_back(lab: Lab, host: str, timeout: float = 300) -> None:
    """Give a former primary its power back, and wait until it knows that the guest has moved.

    :raises LabError: it did not come up, or did not learn it within ``timeout`` seconds
    """
    # Its event log still has what was before; the hosts' clocks are set from this machine's.
    began = time.time() - 5
    lab.boot(host)
    await_event(lab, host, "moved", began, timeout)


def await_event(lab: Lab, host: str, name: str, after: float, timeout: float = 300) -> None:
    """Wait until the daemon on a host has told of an event that came after a time.

    :param after: by ``time.time()``, which the hosts' clocks are set from
    :raises LabError: it did not within ``timeout`` seconds, or the host lost power
    """
    events = Events(lab, host)
    try:
        events.wait_for(
            name,
            lambda event: event["event"] == name and event["time"] > after,
            timeout=timeout,
        )
    finally:
        events.close()


class Events:
    """The events of kemarid on one host, as they happen, over restarts of it.

    :param host: must have power
    """

    def __init__(self, lab: Lab, host: str) -> None:
        self.host = host
        self._events: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._ended = False
        self._process = subprocess.Popen(
            [*lab.ssh_client.argv(host), f"exec tail -n +1 -F {EVENT_LOG} 2>/dev/null"],
            cwd=lab.state,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # cut off by a power cut
            with self._changed:
                self._events.append(event)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def seen(self) -> int:
        """How many events there have been: where to wait on from."""
        with self._changed:
            return len(self._events)

    def since(self, place: int) -> list[dict[str, Any]]:
        """The events from this one on."""
        with self._changed:
            return self._events[place:]

    def wait(self, *names: str, since: int = 0, timeout: float = 300) -> dict[str, Any]:
        """Wait for an event of one of these names.

        :param since: index of the first event to look at, see :attr:`seen`
        :raises LabError: it did not come in time, or the host lost power
        """
        return self.wait_for(
            " or ".join(names), lambda event: event["event"] in names, since=since, timeout=timeout
        )

    def wait_for(
        self,
        what: str,
        wanted: Callable[[dict[str, Any]], bool],
        *,
        since: int = 0,
        timeout: float = 300,
    ) -> dict[str, Any]:
        """Wait for an event that is as wanted.

        :raises LabError: it did not come in time, or the host lost power
        """
        deadline = time.monotonic() + timeout
        first = since
        with self._changed:
            while True:
                for event in self._events[since:]:
                    if wanted(event):
                        return event
                since = len(self._events)
                left = deadline - time.monotonic()
                if self._ended or left <= 0 or not self._changed.wait(left):
                    why = "the connection ended" if self._ended else f"not within {timeout:.0f} s"
                    seen = "\n".join(
                        f"{event['event']}: {event['text']}" for event in self._events[first:]
                    )
                    raise LabError(
                        f"Host {self.host} told of no event {what}: {why}.",
                        f"What it told of:\n{seen or '(nothing)'}",
                    )

    def close(self) -> None:
        """Listen no more."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join(timeout=10)
