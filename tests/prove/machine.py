# SPDX-License-Identifier: Apache-2.0
"""One simulated host, with power or without, and the daemon on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from checkpoint.errors import CheckpointError
from checkpoint.memory import MemoryGuest, MemoryHypervisor
from diskbuffer.replica import Replica
from kemari.config import Config
from kemari.daemon import Daemon
from kemari.epoch import LetGoReason
from kemari.errors import KemariError
from kemari.protection import Protection
from kemari.stragglers import OWED
from kemari.successor import StandbyState
from tests.prove.administrator import JudgedHypervisor, judge_destruction
from tests.prove.disks import HostDisk, bind
from tests.prove.simulation import Process
from tests.prove.standins import HostNetwork

if TYPE_CHECKING:
    from tests.prove.world import World

GUEST: Final = "web"
#: Virtual seconds that a supervisor waits before it starts a daemon that has died.
RESTART: Final = 0.5


@dataclass(slots=True)
class Answer:
    """What came of a request on a control socket."""

    done: bool = False
    result: Any = None
    error: Exception | None = None


class Machine:
    """A host: its disk, its guests, its network, and its daemon while that lives.

    :ivar full: there is no room for the ledger's records
    """

    def __init__(self, world: World, name: str, config: Config) -> None:
        self.world = world
        self.name = name
        self.config = config
        self.powered = True
        self.supervised = True
        self.process: Process | None = None
        self.daemon: Daemon | None = None
        self.lives = 0
        self.full = False
        self.disk: HostDisk | None = None
        if world.disks is not None:
            folder = config.paths.state.parent
            self.disk = world.disks.add(name, folder, config.paths)
        self._boot()

    def _boot(self) -> None:
        self.network = HostNetwork(self.name, self.world.switch)
        if self.disk is not None and self.world.disks is not None:
            self.hypervisor: MemoryHypervisor = bind(self.world.disks, self, self.disk)
        else:
            judge = functools.partial(judge_destruction, self)
            self.hypervisor = JudgedHypervisor(self.network.transmit, judge)
        self.world.networks.append(self.network)

    @property
    def guest(self) -> MemoryGuest | None:
        """The copy of the guest that lives here."""
        return self.hypervisor.guests.get(GUEST)

    @property
    def ready(self) -> bool:
        """Whether the daemon here holds a complete epoch that it would run."""
        sessions = self.daemon.sessions.values() if self.alive and self.daemon else ()
        return any(
            session.machine.state in (StandbyState.READY, StandbyState.TAKING_OVER)
            for session in sessions
        )

    @property
    def fit(self) -> bool:
        """As :attr:`ready`, and its disk has not failed either."""
        if self.disk is not None and (self.disk.target.lost or self.disk.target.untold):
            return False
        sessions = self.daemon.sessions.values() if self.alive and self.daemon else ()
        replicas = [each for session in sessions for each in session._disks._replicas.values()]
        return self.ready and not any(
            isinstance(each, Replica) and each.failure for each in replicas
        )

    @property
    def alive(self) -> bool:
        """Whether a daemon runs here."""
        return self.process is not None and self.process.alive

    @property
    def protection(self) -> Protection | None:
        """The guest's, of the daemon here; it may be over."""
        return self.daemon.protections.get(GUEST) if self.alive and self.daemon else None

    @property
    def owes(self) -> bool:
        """Whether the guest's output was let go, or is just now, without the standby's promise."""
        if not self.alive or self.daemon is None:
            return False
        recorded = any(OWED in record.options for record in self.daemon.host.ledger)
        ending = self.protection.machine.let_go if self.protection else None
        unrecorded = any(self.daemon._stragglers._unrecorded)
        return recorded or unrecorded or ending in (LetGoReason.POLICY, LetGoReason.FORCE)

    @property
    def held(self) -> bool:
        """Whether the guest's output is held here, or that of one that is gone."""
        held, guest = self.network.buffers, self.guest
        return any(nic.vif in held for nic in guest.nics) if guest else bool(held)

    def keeps(self, path: Path) -> bool:
        """Whether a file is one of this host's."""
        return path.is_relative_to(self.config.paths.state)

    def fill(self, seconds: float | None = None) -> None:
        """The ledger's disk is full, for a while or until :attr:`full` is unset."""
        self.world.log(f"{self.name}: the ledger's disk is full")
        self.full = True
        if seconds is not None:
            self.world.simulation.later(seconds, self.make_room)

    def make_room(self) -> None:
        """There is room again."""
        if self.full:
            self.world.log(f"{self.name}: the ledger's disk has room again")
        self.full = False

    def stick(self, seconds: float) -> None:
        """The next call of a daemon to the guest's disk here stands still; others pass it."""
        if self.disk is not None:
            self.world.log(f"{self.name}: a call to the disk stands still for {seconds:g} s")
            self.disk.target.stuck = seconds

    def break_disk(self) -> None:
        """What was written to the guest's disk here, and not flushed, is lost."""
        if self.disk is not None:
            self.world.log(f"{self.name}: the disk refuses what was written to it")
            self.disk.target.break_writing_back()

    def start(self) -> None:
        """Start the daemon, as a supervisor does."""
        if self.alive or not self.powered:
            return
        self.lives += 1
        world = self.world
        self.process = Process(world.simulation, self.name)
        world.processes.append(self.process)
        self.daemon = None
        self.process.create_task(self._serve())

    async def _serve(self) -> None:
        try:
            daemon = Daemon(self.config, self.hypervisor, self.network, pulses=False)
            if self.disk is not None:
                daemon.host.locate = self.disk.locate
            self.daemon = daemon
            await daemon.start()
        except (CheckpointError, KemariError) as error:
            # As with Restart=always: it ends with a sentence, and is started again.
            self.world.log(f"{self.name}: the daemon did not start: {error}")
            self.world.simulation.later(0, self.kill)

    def kill(self) -> None:
        """SIGKILL for the daemon, which is started again."""
        process = self.process
        if process is None or not process.alive:
            return
        self.world.log(f"{self.name}: the daemon is killed")
        self.world.simulation.later(RESTART, self._again)
        self.world.lost_holder(self)
        self.world.simulation.kill(process)

    def _again(self) -> None:
        if self.supervised:
            self.start()

    def power_cut(self, back_after: float | None = None) -> None:
        """The host is gone, this instant."""
        if not self.powered:
            return
        world = self.world
        world.log(f"{self.name}: power cut")
        world.power_fails(self)
        self.powered = self.network.powered = False
        world.network.power_fails(self.name)
        if self.disk is not None and world.disks is not None:
            self.disk.power_cut(world.simulation.random)
        self.hypervisor.power_cut()
        if world.disks is not None:
            world.disks.check_crash(self)
        if back_after is not None:
            world.simulation.later(back_after, self.power_on)
        process, self.daemon = self.process, None
        if process is not None and process.alive:
            process.dying.clear()
            world.network._unlisten(process)
            world.simulation.kill(process)

    def power_on(self) -> None:
        """The host comes back, without guests; its disk is as it was."""
        if self.powered:
            return
        world = self.world
        other = world.other(self)
        if other.ready and other.guest is None:
            # Back before it was missed, without the guest: docs/failure-model.md, Times.
            world.lost_allowed = True
        world.log(f"{self.name}: power is back")
        self._boot()
        self.powered = True
        self.start()

    def ask(self, operation: str, **arguments: Any) -> Answer:
        """As the command line does; the answer comes when it comes."""
        answer = Answer()
        if not self.alive or self.daemon is None:
            answer.done, answer.error = True, KemariError("no daemon")
            return answer
        before = self.world.wish.asked(operation)
        handler = self.daemon._control.handler  # type: ignore[attr-defined]

        async def carry_out() -> None:
            try:
                answer.result = await handler(operation, arguments, lambda progress: None)
                self.world.wish.granted(operation, self.name)
            except (CheckpointError, KemariError) as error:
                answer.error = error
                self.world.wish.refused(operation, before)
            answer.done = True

        assert self.process is not None
        self.process.create_task(carry_out())
        return answer
