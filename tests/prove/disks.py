# SPDX-License-Identifier: Apache-2.0
"""The guest's disk in the simulated world, on both hosts, and what must hold of it.

The guest keeps its service's state on its disk: it marks a header as busy, flushes, writes the
request into a journal, flushes, writes into the header how many it has had, flushes; then it
answers.  Between these it writes what it never flushes, now and then without having been asked.
How much it has written it knows in its memory, so that the world can tell which disk belongs to
which memory.
"""

from __future__ import annotations

import functools
import random
import shutil
import struct
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import diskbuffer.backing
import diskbuffer.disk
import diskbuffer.durable
from checkpoint.driver import Description, Disk
from checkpoint.memory import MemoryGuest, MemoryHypervisor, MemoryShell, digest_of
from diskbuffer import bitmap, metadata
from diskbuffer.errors import BitmapError, MetadataError
from diskbuffer.metadata import Fitness, Metadata, Role, state_folder
from kemari.config import Paths
from tests.prove.diskserver import DiskServer
from tests.prove.localsocket import SocketModule
from tests.prove.simulation import Simulation
from tests.prove.storage import DiskOs, FileOs, Files, Target

if TYPE_CHECKING:
    from tests.prove.machine import Machine
    from tests.prove.world import World

TARGET: Final = "/dev/vg0/web"
DISK: Final = Disk(51712, "xvda", TARGET, writable=True)
CHUNK: Final = 1 << bitmap.SHIFT
CHUNKS: Final = 12
SIZE: Final = CHUNKS * CHUNK
#: What a power cut may have left is judged so many times; the world goes on with one of them.
OUTCOMES: Final = 8
#: Virtual seconds that a bit rests at least; a real server waits longer.
CLEAN: Final = 0.3

#: In the header: requests had, digest of them, whether one is just being had.  In the journal:
#: request counted from 1, life of the guest.
_HEADER: Final = struct.Struct("<Q16sQ")
_HEADER_AT: Final = 8 * 512
_ENTRY: Final = struct.Struct("<QQ")
#: In the guest's memory: its life, and how often it has written to its disk.
_MEMORY: Final = struct.Struct("<QQ")
_MEMORY_AT: Final = 2048
#: Chunks of the journal, and its entries of a sector each.
_JOURNAL: Final = range(1, 5)
_ENTRIES: Final = len(_JOURNAL) * 96
#: Chunks of what is never flushed; each life has some of them for itself.
_SCRATCH: Final = range(5, CHUNKS)


@dataclass(slots=True)
class Life:
    """The guest from boot or revival to its end, as its disk sees it.

    :ivar writes: (offset, data) of all that this guest, and those it comes from, have written
    :ivar image: what its disk holds
    :ivar flushed: so many of its writes were followed by a flush that succeeded
    """

    number: int
    writes: list[tuple[int, bytes]]
    image: bytearray
    flushed: int = 0


class _Timer:
    """See :class:`tests.prove.diskserver.Timer`."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation

    @property
    def now(self) -> float:
        """Virtual seconds."""
        return self._simulation.now

    def soon(self, most: float, call: Callable[[], None]) -> None:
        """Call it, a while later."""
        self._simulation.later(self._simulation.random.uniform(0.1 * most, most), call)


class HostDisk:
    """One host's copy of the disk: target, durable folder, and server while a domain needs it.

    :ivar outcomes: what the last power cut may have left of the target; the last one is what it did
    """

    def __init__(
        self, simulation: Simulation, folder: Path, paths: Paths, contents: bytes, changed: Any
    ) -> None:
        self.image = folder / "disk.img"
        folder.mkdir(parents=True, exist_ok=True)
        with self.image.open("wb") as file:
            file.truncate(SIZE)
        self.state = state_folder(self.image, paths.state / "disks")
        self.state.mkdir(parents=True)
        self.target = Target(contents, changed)
        self.files = Files(self.state, lambda: changed(0, SIZE))
        self.server: DiskServer | None = None
        self.outcomes: list[bytearray] = []
        self._simulation = simulation
        self._folder = paths.run / "disks"
        self._served = 0
        self._control = ""
        self._seen: tuple[int, _Known] = (-1, _Known())

    def locate(self, target: str) -> Path:
        """Where a target is on this host."""
        return self.image if target == TARGET else Path(target)

    # ---- what block-kemari does ----

    def serve(self) -> None:
        """A domain is made that has this disk."""
        self.stop()
        self._served += 1
        folder = self._folder / f"{self._served}-51712"
        folder.mkdir(parents=True)
        (folder / "state").symlink_to(self.state)
        (self.state / "target").write_text(f"{self.image.resolve()}\n")
        told = self.state / "state.json"
        replica = told.exists() and '"role": "replica"' in told.read_text()
        timer = _Timer(self._simulation)
        self.server = DiskServer(
            timer, self.target, self.files, folder, replica=replica, clean=CLEAN
        )
        self._control = str(folder / "control")
        self._simulation.local.servers[self._control] = self.server

    def stop(self) -> None:
        """The domain is no more: its server flushes and ends."""
        if self.server is not None:
            self.target.flush()
            self.end()

    def end(self) -> None:
        """The server is gone, however that came."""
        if self.server is not None:
            self.server.end()
            self.server = None
            del self._simulation.local.servers[self._control]
        shutil.rmtree(self._folder, ignore_errors=True)

    def power_cut(self, chance: random.Random) -> None:
        """What was not flushed may be gone."""
        self.end()
        self.target.stuck = 0.0
        self.outcomes = [self.target.left(chance) for _ in range(OUTCOMES)]
        self.target.crash(self.outcomes[-1])
        self.files.crash(chance)

    # ---- what is known for sure, whatever loses power now ----

    @property
    def known(self) -> _Known:
        """What a daemon of any time would find here."""
        if self._seen[0] != self.files.version:
            self._seen = (self.files.version, self._look())
        return self._seen[1]

    def _look(self) -> _Known:
        try:
            mine = metadata.load(self.state / "state.json")
            marks = bitmap.load(self.state / "bitmap", SIZE)
        except (MetadataError, BitmapError):
            return _Known()
        stable = self.files.stable(self.state / "bitmap") or b""
        if mine is None or (marks is not None and marks.pair != mine.pair):
            return _Known(mine)
        bits = marks.bits if marks is not None else b""
        sure = {
            number
            for number in range(CHUNKS)
            if marks is not None
            and bits[number // 8] >> number % 8 & 1
            and len(stable) == bitmap.HEADER_BYTES + len(bits)
            and stable[bitmap.HEADER_BYTES + number // 8] >> number % 8 & 1
        }
        return _Known(mine, marks is not None, frozenset(sure))


@dataclass(frozen=True, slots=True)
class _Known:
    """What a host's durable folder says.

    :ivar believable: there is a bitmap of the same pair
    :ivar marked: chunks whose bits are set, and stay set if power fails
    """

    mine: Metadata | None = None
    believable: bool = False
    marked: frozenset[int] = frozenset()


class DiskHypervisor(MemoryHypervisor):
    """Has a domain's disk served before it is made, and ended with it."""

    def __init__(self, disk: HostDisk, transmit: Callable[[str, bytes], None]) -> None:
        super().__init__(transmit)
        self._disk = disk

    def create_shell(self, description: Description) -> MemoryShell:
        """See :class:`MemoryHypervisor`."""
        self._disk.serve()
        return super().create_shell(description)

    def destroy_domain(self, name: str) -> None:
        """See :class:`MemoryHypervisor`."""
        if name in self.guests:
            super().destroy_domain(name)
            self._disk.stop()


class Disks:
    """Both hosts' copies, and the judge of them.

    :ivar hosts: machine -> its copy
    :ivar revivals: so many guests came to life whose disk was judged
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.hosts: dict[str, HostDisk] = {}
        self._base = random.Random(7).randbytes(CHUNK)
        self._lives: list[Life] = []
        self.revivals = 0

    def patches(self) -> Iterator[tuple[types.ModuleType, str, Any]]:
        """(module, name, what stands in for it there)."""
        targets = {disk.image: disk.target for disk in self.hosts.values()}
        self._os = DiskOs(targets, self._world.simulation.hang)
        yield diskbuffer.backing, "os", self._os
        yield diskbuffer.backing, "_libc", self._os
        yield diskbuffer.durable, "os", FileOs(self._files)
        yield diskbuffer.disk, "socket", SocketModule("socket")

    def _files(self, path: Path) -> Files | None:
        for disk in self.hosts.values():
            if path.is_relative_to(disk.state):
                return disk.files
        return None  # a record of another kind

    def add(self, name: str, folder: Path, paths: Paths) -> HostDisk:
        """Make a host's copy; the first one's is the guest's."""
        contents = bytearray(SIZE) if not self.hosts else bytearray(b"\xa5" * SIZE)
        if not self.hosts:
            contents[3 * CHUNK : 4 * CHUNK] = self._base
        disk = HostDisk(self._world.simulation, folder, paths, bytes(contents), self.check_marks)
        self.hosts[name] = disk
        return disk

    def boot(self, guest: MemoryGuest, disk: HostDisk) -> None:
        """The guest begins its first life."""
        self._lives.append(Life(0, [], bytearray(disk.target.now)))
        self._first = bytes(disk.target.now)
        self._remember(guest, 0, 0)

    def end(self) -> None:
        """Close what is open."""
        for disk in self.hosts.values():
            disk.end()
        self._os.end()

    # ---- The guest ----

    def _remember(self, guest: MemoryGuest, life: int, writes: int) -> None:
        _MEMORY.pack_into(guest.memory, _MEMORY_AT, life, writes)
        guest.dirty.add(0)

    def serve_request(self, machine: Machine, guest: MemoryGuest, number: int) -> None:
        """What the guest does with its disk before it answers."""
        self.look(machine, guest)
        self._scratch(machine, guest)
        server = self._server(machine)
        had, before, _ = _HEADER.unpack(server.read(_HEADER_AT, _HEADER.size))
        self._write(machine, guest, _HEADER_AT, _HEADER.pack(had, before, 1))
        self._flush(machine, guest)
        life, _ = _MEMORY.unpack_from(guest.memory, _MEMORY_AT)
        self._write(machine, guest, _place(number), _ENTRY.pack(number + 1, life) * 32)
        self._flush(machine, guest)
        digest = bytes(guest.memory[8:24])
        self._write(machine, guest, _HEADER_AT, _HEADER.pack(number + 1, digest, 0))
        self._flush(machine, guest)
        if number % 3 == 0:
            self._scratch(machine, guest)

    def chore(self, machine: Machine, guest: MemoryGuest) -> None:
        """The guest writes, though nobody has asked it for anything."""
        if guest.alive and not guest.paused:
            self.look(machine, guest)
            self._scratch(machine, guest)

    def _scratch(self, machine: Machine, guest: MemoryGuest) -> None:
        life, count = _MEMORY.unpack_from(guest.memory, _MEMORY_AT)
        place = _SCRATCH[(3 * life + count % 3) % len(_SCRATCH)] * CHUNK + count % 40 * 1536
        data = bytes(4096) if count % 7 == 6 else _ENTRY.pack(count, life) * 96
        self._write(machine, guest, place, data)

    def _write(self, machine: Machine, guest: MemoryGuest, offset: int, data: bytes) -> None:
        number, count = _MEMORY.unpack_from(guest.memory, _MEMORY_AT)
        life = self._lives[number]
        server = self._server(machine)
        life.writes.append((offset, data))
        life.image[offset : offset + len(data)] = data
        self._remember(guest, number, count + 1)
        done = server.write(offset, data) if any(data) else server.discard(offset, len(data))
        if not done:
            self._world.fail(f"the guest runs on {machine.name}, whose copy refuses its changes")

    def _flush(self, machine: Machine, guest: MemoryGuest) -> None:
        """Until it succeeds; after a failure all that was written since the last time is again."""
        life = self._lives[_MEMORY.unpack_from(guest.memory, _MEMORY_AT)[0]]
        while not self._server(machine).flush():
            for offset, data in life.writes[life.flushed :]:
                self._write(machine, guest, offset, data)
        life.flushed = len(life.writes)
        target = self.hosts[machine.name].target
        if target.lost or target.pending:
            self._world.fail(f"a flush on {machine.name} succeeded, but not all is on the disk")

    def _server(self, machine: Machine) -> DiskServer:
        server = self.hosts[machine.name].server
        if server is None:
            self._world.fail(f"the guest runs on {machine.name} without a disk")
            raise AssertionError
        return server

    # ---- What must hold ----

    def look(self, machine: Machine, guest: MemoryGuest) -> None:
        """The guest finds what it wrote, and nothing else."""
        life = self._lives[_MEMORY.unpack_from(guest.memory, _MEMORY_AT)[0]]
        target = self.hosts[machine.name].target
        if target.now != life.image:
            self._world.fail(
                f"the disk on {machine.name} has changed under the guest, "
                f"at byte {_differs(target.now, life.image)}"
            )

    def check_revival(self, machine: Machine) -> None:
        """Just before the guest runs: its disk is that of the epoch that it remembers, durably."""
        (shell,) = machine.hypervisor.shells.values()
        guest = shell._guest
        number, count = _MEMORY.unpack_from(guest.memory, _MEMORY_AT)
        disk, before = self.hosts[machine.name], self._lives[number]
        image = bytearray(self._first)
        for offset, data in before.writes[:count]:
            image[offset : offset + len(data)] = data
        where = f"the disk on {machine.name} when the guest came to life there"
        if disk.target.now != image:
            at = _differs(disk.target.now, image)
            later = any(at - len(data) < place <= at for place, data in before.writes[count:])
            why = "it holds a change of a later epoch" if later else "a change is missing"
            self._world.fail(f"{where} was not that of its epoch at byte {at}: {why}")
        if disk.target.pending or disk.target.lost:
            self._world.fail(f"{where} was not flushed")
        known = disk.known
        if known.mine is None or known.mine.role is not Role.DISK or not known.believable:
            self._world.fail(f"{where} was still a replica, or had no bitmap")
        if known.marked:
            self._world.fail(f"{where} had a bitmap of another time")
        self.revivals += 1
        self._lives.append(Life(len(self._lives), before.writes[:count], image, count))
        self._remember(guest, self._lives[-1].number, count)

    def check_marks(self, first: int, end: int) -> None:
        """A chunk in which both copies may come to differ has its bit set, whatever dies now.

        The claim of docs/disk.md, The bitmap, for bytes ``first`` to ``end``.
        """
        if len(self.hosts) < 2:
            return
        one, other = self.hosts.values()
        mine, theirs = one.known, other.known
        for known in (mine, theirs):
            if known.mine is None or (known.mine.role is Role.DISK and not known.believable):
                return  # everything will be copied
        assert mine.mine is not None
        assert theirs.mine is not None
        if not mine.mine.pair or mine.mine.pair != theirs.mine.pair:
            return
        marked = mine.marked | theirs.marked
        for number in range(first // CHUNK, (end - 1) // CHUNK + 1):
            if number in marked:
                continue
            at, stop = number * CHUNK, (number + 1) * CHUNK
            equal = one.target.stable[at:stop] == other.target.stable[at:stop]
            if not equal or not all(each.target.settled(at, stop) for each in (one, other)):
                self._world.fail(f"chunk {number} may differ on the two hosts, and is not marked")

    def check_crash(self, machine: Machine) -> None:
        """After a power cut: a copy that could be run is one that the guest could have seen."""
        disk = self.hosts[machine.name]
        self.check_marks(0, SIZE)
        mine = disk.known.mine
        if mine is None or (mine.role is Role.REPLICA and mine.state is not Fitness.CONSISTENT):
            return
        for image in disk.outcomes:
            self._check_journal(machine, image)

    def _check_journal(self, machine: Machine, image: bytearray) -> None:
        count, digest, _ = _HEADER.unpack_from(image, _HEADER_AT)
        whose = f"the copy of the disk on {machine.name}, which could be run,"
        written = sum(len(life.writes) for life in self._lives)
        if count and (count > written or digest != digest_of(range(count))):
            self._world.fail(f"{whose} has a torn header after a power cut")
            return
        for number in range(max(0, count - _ENTRIES), count):
            entry, _life = _ENTRY.unpack_from(image, _place(number))
            if entry - 1 not in (number, number + _ENTRIES):
                self._world.fail(f"{whose} lacks request {number}, of {count}, after a power cut")


def _place(number: int) -> int:
    """Where the journal has a request."""
    chunk, entry = divmod(number % _ENTRIES, 96)
    return _JOURNAL[chunk] * CHUNK + entry * 512


def _differs(one: bytearray, other: bytearray) -> int:
    return next(at for at, (x, y) in enumerate(zip(one, other, strict=True)) if x != y)


def bind(disks: Disks, machine: Machine, disk: HostDisk) -> MemoryHypervisor:
    """A host's hypervisor whose guests have the disk."""
    hypervisor = DiskHypervisor(disk, machine.network.transmit)
    hypervisor.write_disk = functools.partial(disks.serve_request, machine)
    return hypervisor
