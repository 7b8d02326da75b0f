# SPDX-License-Identifier: Apache-2.0
"""A hypervisor in plain memory, for tests only.

It runs one kind of guest: a service that answers numbered requests and whose whole life is in its
pages, so that a test can tell from any answer whether a request was lost, repeated or reordered.
The machine state carries a second copy of the service's counter: a shell revived with pages of one
epoch and state of another refuses to run.

Requests reach it as packets reach a Xen guest: a backend writes each into a page that the guest has
granted, then moves the producer index of a shared ring, and the dirty log sees neither.  So a
capture that copies data before rings, or leaves out granted pages, is found by what the guest
answers after a failover.

Named points (:attr:`MemoryHypervisor.reached`) let a test fail or cut power at every step.
"""

from __future__ import annotations

import json
import struct
import threading
import time
import uuid as uuids
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from hashlib import blake2b

from checkpoint.driver import (
    PAGE_SIZE,
    Auditor,
    Captured,
    Description,
    Disk,
    Nic,
    Staging,
    nothing,
)
from checkpoint.errors import CheckpointError, NotQuiescent, ReviveError, UnsupportedGuest
from checkpoint.faultpoints import reach

#: What the service keeps at the start of page 0: answers given, digest of all requests in order,
#: requests taken from the ring.
_HEAD = struct.Struct("<Q16sQ")
#: The ring page: requests put in so far.  Request N is in granted page N modulo their count: N and
#: the number that the client gave it.
_RING = struct.Struct("<Q")
_SLOT = struct.Struct("<QQ")
_GRANTED = 3
#: What a guest answers that took something else from a granted page than the ring had promised.
GARBLED = 1 << 63
_ANSWER = struct.Struct("<QQ16s")
#: Requests of this many bytes: their number.
_REQUEST = struct.Struct("<Q")


class MemoryGuest:
    """A guest: pages, and a service that writes them and sends answers.

    Requests are numbered from 0; the last one may be repeated.  The last pages are the ring and
    those that are granted to the backend.

    :param transmit: takes each frame that the guest sends
    :ivar incarnation: no other guest has this one
    :ivar paused: what arrives while it is set waits
    :ivar shut_down: it runs no more, but its domain is still there
    :ivar write_disk: called with (this guest, number) before a request is answered
    """

    def __init__(self, description: Description, transmit: Callable[[str, bytes], None]) -> None:
        self.description = description
        self.memory = bytearray(description.pages * PAGE_SIZE)
        self.dirty: set[int] = set()
        self.incarnation = str(uuids.uuid4())
        self.paused = self.shut_down = False
        self.alive = True
        self.clock_offset_ns = 0
        self.nics = [Nic(0, f"vif{description.domid}.0", str(description.detail["mac"]), "memory0")]
        self.disks = [Disk(**disk) for disk in description.detail.get("disks", ())]
        self.lock = threading.RLock()
        self._transmit = transmit
        self.write_disk: Callable[[MemoryGuest, int], None] = lambda guest, number: None
        self._inbox: deque[int] = deque()
        self._ring = description.pages - 1
        self._granted = range(self._ring - _GRANTED, self._ring)

    @property
    def shared(self) -> list[int]:
        """Frames that the backend writes without a trace in the dirty log, the ring last."""
        return [*self._granted, self._ring]

    @property
    def answered(self) -> int:
        """Answers given in this guest's whole life, on any host."""
        answers: int = _HEAD.unpack_from(self.memory)[0]
        return answers

    def clock_ns(self) -> int:
        """The guest's own clock."""
        return time.monotonic_ns() + self.clock_offset_ns

    def request(self, number: int) -> None:
        """A request arrives; it is answered now, or once the guest runs again."""
        with self.lock:
            if self.alive:
                self._inbox.append(number)
                self.run()

    def run(self) -> None:
        """Let the backend deliver, and work off what is in the ring, unless paused."""
        while self.alive:
            self._deliver()
            if self.paused or self.shut_down or not self._take():
                return

    def _deliver(self) -> None:
        """The backend's part: data first, then the ring; it goes on while the guest is paused."""
        (produced,) = _RING.unpack_from(self.memory, self._ring * PAGE_SIZE)
        taken: int = _HEAD.unpack_from(self.memory)[2]
        while self._inbox and produced - taken < _GRANTED:
            place = self._granted[produced % _GRANTED] * PAGE_SIZE
            _SLOT.pack_into(self.memory, place, produced, self._inbox.popleft())
            produced += 1
            _RING.pack_into(self.memory, self._ring * PAGE_SIZE, produced)

    def _take(self) -> bool:
        """The guest's part: answer one request from the ring; whether there was one."""
        answers, digest, taken = _HEAD.unpack_from(self.memory)
        (produced,) = _RING.unpack_from(self.memory, self._ring * PAGE_SIZE)
        if taken == produced:
            return False
        if taken > produced:
            # The ring is older than the rest of the guest: it has crashed.
            self.alive = False
            self._transmit(self.nics[0].vif, _ANSWER.pack(GARBLED, answers, digest))
            return False
        place = self._granted[taken % _GRANTED] * PAGE_SIZE
        index, number = _SLOT.unpack_from(self.memory, place)
        if index != taken:
            number = GARBLED
        self.dirty.add(0)
        if number < answers:
            # Asked again: its answer was lost with another host.  TCP would send it again, if it
            # was not acknowledged since.
            _HEAD.pack_into(self.memory, 0, answers, digest, taken + 1)
            if number == answers - 1:
                self._transmit(self.nics[0].vif, _ANSWER.pack(number, answers, digest))
            return True
        digest = blake2b(digest + _REQUEST.pack(number), digest_size=16).digest()
        _HEAD.pack_into(self.memory, 0, answers + 1, digest, taken + 1)
        page = 1 + number % (self._granted[0] - 1)
        self.write(page, digest)
        self.write_disk(self, number)
        self._transmit(self.nics[0].vif, _ANSWER.pack(number, answers + 1, digest))
        return True

    def write(self, page: int, data: bytes) -> None:
        """The guest writes into one of its pages."""
        with self.lock:
            self.memory[page * PAGE_SIZE : page * PAGE_SIZE + len(data)] = data
            self.dirty.add(page)

    def state(self) -> bytes:
        """What a hypervisor would save beside the pages."""
        return json.dumps({"answered": self.answered, "clock_ns": self.clock_ns()}).encode()


def parse_answer(frame: bytes) -> tuple[int, int, bytes]:
    """(request number, count of answers, digest of all requests so far) of a frame."""
    number, count, digest = _ANSWER.unpack(frame)
    return number, count, digest


def digest_of(numbers: Iterable[int]) -> bytes:
    """The digest that a service has after answering ``numbers`` in that order."""
    digest = bytes(16)
    for number in numbers:
        digest = blake2b(digest + _REQUEST.pack(number), digest_size=16).digest()
    return digest


class MemorySource:
    """The running guest on the primary; see :class:`checkpoint.driver.Source`."""

    def __init__(self, hypervisor: MemoryHypervisor, guest: MemoryGuest) -> None:
        self.description = guest.description
        self.nics = guest.nics
        self.disks = guest.disks
        self.audit: Auditor | None = None
        self._hypervisor = hypervisor
        self._guest = guest
        self._tracking = False
        self._copied = False
        self._all = range(self.description.pages)

    def track(self) -> None:
        """Begin dirty tracking."""
        self._hypervisor.reached("track")
        self._tracking = True
        self._copied = False

    def base_round(self) -> Iterable[array[int]]:
        """One round: all frames the first time, the dirty ones later."""
        with self._guest.lock:
            frames = array("Q", sorted(self._guest.dirty) if self._copied else self._all)
            self._guest.dirty.clear()
        self._copied = True
        for start in range(0, len(frames), 16):
            yield frames[start : start + 16]

    def copy_live(self, gfns: array[int], staging: Staging) -> None:
        """Copy pages of the running guest."""
        self._hypervisor.reached("copy_live")
        staging.clear()
        self._gather(gfns, staging)

    def _gather(self, gfns: Iterable[int], staging: Staging) -> None:
        for place, gfn in enumerate(gfns, staging.count):
            staging.gfns[place] = gfn
            start = gfn * PAGE_SIZE
            page = self._guest.memory[start : start + PAGE_SIZE]
            staging.data[place * PAGE_SIZE : (place + 1) * PAGE_SIZE] = page
            staging.count = place + 1

    def stolen(self) -> float:
        """Nothing: guests in memory use no processor."""
        return 0.0

    def prepared(self) -> bool:
        """Always: there is nothing to find out."""
        return True

    def capture(
        self,
        staging: Staging,
        close_output: Callable[[], None],
        close_writes: Callable[[], None],
        *,
        leave_paused: bool = False,
        keep: int = 0,
    ) -> Captured:
        """Take one checkpoint."""
        guest = self._guest
        started = time.monotonic_ns()
        self._hypervisor.reached("capture")
        if self._hypervisor.restless > 0:
            self._hypervisor.restless -= 1
            raise NotQuiescent("the guest is busy; expected a pause point")
        waits = leave_paused or guest.paused
        if not waits:
            close_output()
        closed = time.monotonic_ns()
        with guest.lock:
            if not guest.alive:
                raise CheckpointError(f"Domain {self.description.name} is gone")
            reach("pause")
            guest.paused = True
            try:
                reach("paused")
                shared = guest.shared
                if len(guest.dirty.union(shared)) > staging.capacity:
                    raise OverflowError(f"{len(guest.dirty)} pages are dirty")
                close_writes()
                settled = time.monotonic_ns()
                if waits:
                    close_output()
                if self._hypervisor.restless_late > 0:
                    self._hypervisor.restless_late -= 1
                    raise NotQuiescent("the guest is busy after all; expected a pause point")
                staging.clear()
                # Rings before data, as on Xen: the backend goes on while the guest stands still.
                *granted, ring = shared
                self._gather([ring], staging)
                reach("rings-copied")
                written = sorted(guest.dirty.difference(shared))
                if len(guest.dirty) > keep:
                    guest.dirty.clear()
                reach("log-read")
                self._gather([*granted, *written], staging)
                reach("pages-copied")
                if self.audit is not None:
                    self.audit(memoryview(guest.memory), staging, ())
                staging.state = guest.state()
            except BaseException:
                self.unpause()
                raise
            if not leave_paused:
                self.unpause()
                reach("unpaused")
        ended = time.monotonic_ns()
        return Captured(
            staging.count, closed, ended - closed, settled - closed, closed - started,
            ended - settled,
        )  # fmt: skip

    def pause(self) -> None:
        """Stop the guest."""
        with self._guest.lock:
            self._guest.paused = True

    def unpause(self) -> None:
        """Let the guest run."""
        with self._guest.lock:
            self._guest.paused = False
            self._guest.run()

    def alive(self) -> bool:
        """Whether the guest exists, and has not shut down."""
        return self._guest.alive and not self._guest.shut_down

    def destroy(self) -> None:
        """Destroy the guest."""
        self._hypervisor.destroy_domain(self.description.name)

    def untrack(self) -> None:
        """End dirty tracking; the guest goes on."""
        self._tracking = False
        if self._guest.alive:
            self.unpause()


class MemoryShell:
    """A guest that does not run yet; see :class:`checkpoint.driver.Shell`."""

    def __init__(self, hypervisor: MemoryHypervisor, description: Description) -> None:
        self._hypervisor = hypervisor
        self._guest = MemoryGuest(description, hypervisor.transmit)
        self._guest.write_disk = hypervisor.write_disk
        self.memory = memoryview(self._guest.memory)
        self.nics = self._guest.nics
        self.disks = self._guest.disks

    def examine(self, state: bytes) -> None:
        """It must say how much the guest has answered."""
        if "answered" not in json.loads(state):
            raise ReviveError("the state does not say how much the guest has answered")

    def foresee(self, state: bytes) -> None:
        """Look at the state; a hypervisor in plain memory has nothing to find out."""
        self._hypervisor.reached("foresee")
        self.examine(state)

    def revive(self, state: bytes, elapsed_ns: int, running: Callable[[], None] = nothing) -> None:
        """Run the guest."""
        self._hypervisor.reached("revive")
        saved = json.loads(state)
        if saved["answered"] != self._guest.answered:
            raise ReviveError(
                f"memory is of answer {self._guest.answered}, state of {saved['answered']}"
            )
        reach("revive-stub")
        reach("revive-memory")
        self._guest.clock_offset_ns = saved["clock_ns"] + elapsed_ns - time.monotonic_ns()
        reach("revive-vcpus")
        name = self._guest.description.name
        reach("revive-backends")
        reach("revive-unpause")
        self._hypervisor.shells.pop(name, None)
        self._hypervisor.guests[name] = self._guest
        self._hypervisor.unsettled.add(name)
        self._guest.run()
        running()
        self._hypervisor.reached("revived")

    def settle(self) -> None:
        """Give the guest its own name."""
        self._hypervisor.settle(self._guest.description.name)

    def destroy(self) -> None:
        """Remove the shell."""
        name = self._guest.description.name
        if self._hypervisor.shells.get(name) is self:
            del self._hypervisor.shells[name]


class MemoryHypervisor:
    """A host's hypervisor; see :class:`checkpoint.driver.Hypervisor`.

    :param transmit: takes (device name, frame) of everything that guests here send
    :param memory_pages: guest memory that the host has for shells
    :ivar unsettled: guests that still have their shell's name, for whoever looks at this host
    :ivar restless: so many of the next captures find no usable pause point
    :ivar restless_late: so many of the next captures find that out when output is closed already
    :ivar write_disk: what guests that come to be here do to their disks for each request
    :ivar reached: called with the name of each point that a test may want to disturb
    """

    name = "memory"

    def __init__(
        self,
        transmit: Callable[[str, bytes], None] = lambda vif, frame: None,
        *,
        memory_pages: int = 1 << 20,
    ) -> None:
        self.guests: dict[str, MemoryGuest] = {}
        self.shells: dict[str, MemoryShell] = {}
        self.unsettled: set[str] = set()
        self.memory_pages = memory_pages
        self.transmit = transmit
        self.restless = 0
        self.restless_late = 0
        self.reached: Callable[[str], None] = lambda point: None
        self.write_disk: Callable[[MemoryGuest, int], None] = lambda guest, number: None
        self._domid = 0

    def boot(self, name: str, pages: int = 64, disks: Sequence[Disk] = ()) -> MemoryGuest:
        """Start a guest."""
        self._domid += 1
        uuid = str(uuids.uuid4())
        description = Description(
            name=name,
            uuid=uuid,
            domid=self._domid,
            vcpus=1,
            pages=pages,
            driver=self.name,
            detail={
                "mac": f"00:16:3e:{uuid[0:2]}:{uuid[2:4]}:{uuid[4:6]}",
                "disks": [asdict(disk) for disk in disks],
            },
        )
        guest = self.guests[name] = MemoryGuest(description, self.transmit)
        guest.write_disk = self.write_disk
        return guest

    def open_source(self, domain: str) -> MemorySource:
        """The running guest of that name or number."""
        self.reached("open_source")
        for name, guest in self.guests.items():
            if domain in (name, str(guest.description.domid)):
                return MemorySource(self, guest)
        raise UnsupportedGuest(f"Domain {domain} does not exist")

    def create_shell(self, description: Description) -> MemoryShell:
        """Build a shell."""
        self.reached("create_shell")
        if description.name in self.guests or description.name in self.shells:
            raise CheckpointError(f"Domain {description.name} exists already")
        if description.pages > self.memory_pages:
            raise CheckpointError(
                f"{description.name} needs {description.pages} pages, {self.memory_pages} are free"
            )
        shell = self.shells[description.name] = MemoryShell(self, description)
        return shell

    def domains(self) -> list[tuple[int, str]]:
        """(number, name) of every running guest."""
        return [(guest.description.domid, name) for name, guest in self.guests.items()]

    def destroy_shell(self, name: str) -> bool:
        """Remove a shell that was left behind."""
        return self.shells.pop(name, None) is not None

    def domain_exists(self, name: str) -> bool:
        """Whether a guest of that name runs."""
        return name in self.guests

    def domain_uuid(self, name: str) -> str:
        """The UUID of the guest of that name; "" if there is none."""
        guest = self.guests.get(name)
        return guest.description.uuid if guest is not None else ""

    def incarnation(self, name: str) -> str:
        """What tells the guest of that name from any other; "" if there is none."""
        guest = self.guests.get(name)
        return guest.incarnation if guest is not None else ""

    def recover(self, name: str) -> None:
        """Let a guest run that a killed daemon left paused."""
        self.reached("recover")
        if name in self.guests:
            MemorySource(self, self.guests[name]).unpause()

    def settle(self, name: str) -> bool:
        """Give a revived guest its own name; whether it had another."""
        self.reached("settle")
        unsettled = name in self.unsettled
        self.unsettled.discard(name)
        return unsettled

    def destroy_domain(self, name: str) -> None:
        """Destroy a guest."""
        self.unsettled.discard(name)
        guest = self.guests.pop(name, None)
        if guest is not None:
            guest.alive = False

    def power_cut(self) -> None:
        """Everything that ran here is gone."""
        for name in list(self.guests):
            self.destroy_domain(name)
        self.shells.clear()
