# SPDX-License-Identifier: Apache-2.0
"""The seam between the engine and a hypervisor.

Two roles, two Protocols: :class:`Source` is the running guest on the primary, :class:`Shell` its
paused, empty twin on the standby.  :class:`Hypervisor` makes them.  ``checkpoint.xen`` implements
all three on Xen; ``checkpoint.memory`` does in plain memory, for tests.

All methods block; callers that must not block run them in a thread.  No method may be called
concurrently with another one of the same object.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

PAGE_SIZE = 4096
_FIRST_PAGES: Final = 2048


@dataclass(frozen=True, slots=True)
class Nic:
    """One network interface of the guest, as Dom0 sees it.

    :ivar devid: the device number N of ``vifD.N``
    :ivar vif: name of Dom0's network device, e.g. ``vif3.0``
    :ivar mac: the guest's address, ``aa:bb:cc:dd:ee:ff``
    :ivar bridge: name of the bridge that the vif is a port of, or ""
    """

    devid: int
    vif: str
    mac: str
    bridge: str


@dataclass(frozen=True, slots=True)
class Disk:
    """One disk of the guest, as the hotplug script ``block-kemari`` serves it in Dom0.

    :ivar devid: number of the virtual block device, e.g. 51712
    :ivar vdev: the guest's name for it, e.g. ``xvda``
    :ivar target: what holds its contents: path of a file or block device, the same on both hosts
    :ivar writable: whether the guest may write
    :ivar shared: both hosts reach the same storage there
    """

    devid: int
    vdev: str
    target: str
    writable: bool
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Description:
    """What a standby must know to build the shell of a guest; travels as JSON.

    :ivar name: the guest's name, without any suffix
    :ivar uuid: the guest's UUID, canonical text form
    :ivar domid: the number it has on the primary
    :ivar vcpus: number of virtual CPUs
    :ivar pages: guest RAM covers guest frames 0 to pages-1 (4 KiB each; may contain holes)
    :ivar driver: name of the hypervisor driver that wrote ``detail`` ("xen", "memory")
    :ivar detail: what only that driver understands; JSON values
    """

    name: str
    uuid: str
    domid: int
    vcpus: int
    pages: int
    driver: str
    detail: dict[str, Any] = field(default_factory=dict)


class Staging:
    """A preallocated buffer of page copies: ``gfns[i]`` is the frame number of page ``i``.

    :ivar capacity: pages it can hold
    :ivar count: pages it holds
    :ivar gfns: guest frame numbers, ``array('Q')`` of ``capacity`` entries, ``count`` of them valid
    :ivar data: writable buffer of ``capacity * PAGE_SIZE`` bytes
    :ivar state: the machine state captured with the pages (vCPUs, devices); empty for live copies
    """

    __slots__ = ("capacity", "count", "data", "gfns", "state")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self.gfns = array("Q", bytes(8 * capacity))
        # Anonymous memory comes page by page when first written, which takes longer than copying a
        # page, and a guest may be paused then.  So as many as most epochs have come here.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.data = memoryview(mmap.mmap(-1, capacity * PAGE_SIZE, flags=flags))
        first = min(capacity, _FIRST_PAGES)
        self.data[: first * PAGE_SIZE : PAGE_SIZE] = bytes(first)
        self.state = b""

    def clear(self) -> None:
        """Forget the contents; the memory stays."""
        self.count = 0
        self.state = b""

    def close(self) -> None:
        """Give the memory back (idempotent); nothing is captured into it any more."""
        self.clear()
        self.data.release()


#: See :attr:`Source.audit`.
Auditor = Callable[[memoryview, Staging, Sequence[int]], None]


@dataclass(frozen=True, slots=True)
class Captured:
    """Figures of one capture.

    :ivar pages: pages copied
    :ivar at_ns: ``time.monotonic_ns()`` when the guest was paused
    :ivar pause_ns: time from the pause call until the unpause call is made, nanoseconds; the return
        of that call would tell when Dom0 got its processor back, not when the guest did
    :ivar settle_ns: the part of it until backends had answered
    :ivar close_ns: time that closing the output epoch took; a part of the pause only where the
        guest stays paused or was paused before
    :ivar copy_ns: the part of the pause in which pages were copied
    """

    pages: int
    at_ns: int
    pause_ns: int
    settle_ns: int
    close_ns: int
    copy_ns: int


class Source(Protocol):
    """The running guest on the primary.

    :ivar audit: called while the guest stands still and its epoch is staged, with all of its
        memory, the epoch, and the frames without memory; see :mod:`checkpoint.audit`
    """

    description: Description
    nics: list[Nic]
    disks: list[Disk]
    audit: Auditor | None

    def track(self) -> None:
        """Begin dirty tracking and map the guest's memory.

        :raise HypervisorError: when the hypervisor refuses
        :raise LogTaken: another program uses the guest's dirty log
        """

    def base_round(self) -> Iterable[array[int]]:
        """Frames to copy live, in batches: every frame the first time, then those dirtied since.

        Reading the log also cleans it.  The guest is not paused.

        :raise LogTaken: another program has used the log: what was written is not known any more
        """

    def copy_live(self, gfns: array[int], staging: Staging) -> None:
        """Replace ``staging`` by copies of ``gfns`` (at most its capacity) while the guest runs.

        A copy may be torn; then its frame is in a later round or capture.
        """

    def stolen(self) -> float:
        """Of the time for which this host wanted a processor lately, the share that it waited."""

    def prepared(self) -> bool:
        """Whether a capture would begin at once; otherwise it has to find out first what the guest
        has changed about its devices, which takes a while (the guest runs meanwhile).
        """

    def capture(
        self,
        staging: Staging,
        close_output: Callable[[], None],
        close_writes: Callable[[], None],
        *,
        leave_paused: bool = False,
        keep: int = 0,
    ) -> Captured:
        """Take one checkpoint into ``staging`` (pages and state) by pausing the guest.

        ``close_writes`` is called while the guest is paused and every request to its disks was
        answered, ``close_output`` right before it is paused, so that nothing is in the epoch that a
        later state has sent.  Where the guest was paused before, or is to stay paused, that one is
        called when everything that the guest has sent has reached the output buffer, so that
        nothing is left for an epoch that may never come.  Each at most once.  On return the guest
        runs again, or stays paused with ``leave_paused``.  On any error the guest runs again and
        the dirty log has lost nothing.

        With at most ``keep`` frames in the dirty log it is read but not cleaned: they are copied
        again the next time, changed or not, and the guest's next write to each of them is an
        ordinary one, instead of one that the hypervisor has to handle.

        :raise NotQuiescent: no usable pause point within the bound
        :raise OverflowError: more dirty pages than ``staging`` holds (nothing was lost: those
            frames stay dirty); the message gives the number
        :raise LogTaken: another program has used the log; no later attempt can succeed
        """

    def pause(self) -> None:
        """Stop the guest (idempotent)."""

    def unpause(self) -> None:
        """Let the guest run (idempotent)."""

    def alive(self) -> bool:
        """Whether the domain exists and has not shut down, but for being saved."""

    def destroy(self) -> None:
        """Destroy the guest on this host: another host runs it."""

    def untrack(self) -> None:
        """End dirty tracking and release every mapping (idempotent); the guest goes on."""


def nothing() -> None:
    """What is done where there is nothing to do."""


class Shell(Protocol):
    """The paused, not yet living twin of a guest on the standby.

    :ivar memory: writable view of guest RAM, ``pages * PAGE_SIZE`` bytes; offset is gfn * PAGE_SIZE
    """

    memory: memoryview
    nics: list[Nic]
    disks: list[Disk]

    def examine(self, state: bytes) -> None:
        """Look whether the guest could be run from ``state``; quick, and changes nothing.

        :raise CheckpointError: it could not
        """

    def foresee(self, state: bytes) -> None:
        """Find out what running the guest from ``memory`` and ``state`` will take, which makes a
        :meth:`revive` with the very same object shorter; it may never come.

        To be called while ``memory`` is of that state's epoch.  If a later epoch comes into it
        meanwhile, what was found out is wrong, or this fails, and neither does any harm: nobody
        revives the earlier state any more.  Once the guest was revived, or the shell is gone, it
        does nothing.

        :raise Exception: it cannot be found out
        """

    def revive(self, state: bytes, elapsed_ns: int, running: Callable[[], None] = nothing) -> None:
        """Run the guest from ``memory`` and ``state``.

        :param elapsed_ns: time since the capture of that state: the guest's clocks go on by it
        :param running: called, in the same thread, as soon as the guest runs
        :raise ReviveError: it cannot run; the shell still exists, paused
        """

    def settle(self) -> None:
        """Once the guest runs: give it its own name.

        :raise CheckpointError: it keeps the shell's name, and runs
        """

    def destroy(self) -> None:
        """Remove the shell domain (idempotent)."""


class Hypervisor(Protocol):
    """A host's hypervisor."""

    name: str

    def open_source(self, domain: str) -> Source:
        """The running guest ``domain`` (name or number), after checking every precondition.

        :raise UnsupportedGuest: with one sentence for the first precondition that does not hold
        """

    def create_shell(self, description: Description) -> Shell:
        """Build the shell for a guest; it stays paused.

        :raise CheckpointError: e.g. not enough memory, name or number taken
        """

    def domains(self) -> list[tuple[int, str]]:
        """(number, name) of every domain on this host but Dom0."""

    def destroy_shell(self, name: str) -> bool:
        """Remove a shell of guest ``name`` that a killed daemon left behind; True if it was."""

    def domain_exists(self, name: str) -> bool:
        """Whether a domain of exactly that name lives on this host."""

    def domain_uuid(self, name: str) -> str:
        """The UUID of the domain of exactly that name, in canonical text form; "" if none lives."""

    def incarnation(self, name: str) -> str:
        """What tells the domain of exactly that name from all that had the name or will; "" if none
        lives.
        """

    def recover(self, name: str) -> None:
        """Undo what a killed daemon left on the guest ``name``: paused, dirty tracking on.

        Quick, unlike :meth:`open_source`; nothing happens to a guest that has nothing of it.
        """

    def settle(self, name: str) -> bool:
        """Give the guest ``name`` its own name, if it was revived and still has its shell's.

        :return: whether it had
        :raise CheckpointError: it keeps the shell's name, and runs
        """

    def destroy_domain(self, name: str) -> None:
        """Destroy the domain of that name: another host runs it."""
