# SPDX-License-Identifier: Apache-2.0
"""Two simulated hosts, a guest, a client outside, and what must hold whatever happens.

The daemons are the real ones, whole; the hypervisor, the network between the hosts and the clock
are simulated.  :class:`World` looks at every frame that leaves a host, as the client's switch does.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import checkpoint.memory
import kemari.daemon
import kemari.ledger
import kemari.memory
from checkpoint import faultpoints
from checkpoint.memory import MemoryGuest, digest_of, parse_answer
from kemari.config import Address, Config, Paths
from kemari.epoch import PrimaryState
from tests.prove.aftermath import Wish, ill
from tests.prove.disks import DISK, Disks
from tests.prove.machine import GUEST, Answer, Machine
from tests.prove.network import Network
from tests.prove.simulation import Process, Simulation
from tests.prove.standins import Clock, Control, Durable, HostNetwork, SeenSwitch, Threading

HEARTBEAT: Final = 0.4
#: Virtual seconds between an answer and the client's next request, and until it repeats one.
PACE: Final = 0.02
#: Virtual seconds after a request, at most, at which the guest writes to its disk on its own.
CHORE: Final = 0.03
REPEAT: Final = 0.3
#: Virtual seconds within which all must be well again once every fault is over: the daemons'
#: longest patience is 30 s, and a lost protection is tried again every 60 s.
CALM: Final = 150.0
_WIRES: Final = ("link", "lan")


class Violation(AssertionError):
    """Something happened that must not."""


class _Seen(BaseException):
    """As above, in the middle of the code under test, which must not take it for its own error."""


@dataclass(slots=True)
class Copy:
    """One life of the guest on one host: from boot or revival to its end.

    :ivar by_hand: an administrator has brought it here
    """

    host: str
    guest: MemoryGuest
    seen: bool = False
    by_hand: bool = False


@dataclass(slots=True)
class Fault:
    """What happens when a point is reached.

    :ivar point: its name
    :ivar nth: the time at which it happens
    :ivar act: given the machine whose daemon reached it
    """

    point: str
    nth: int
    act: Callable[[Machine], None]
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.nth


class World:
    """See the module's text.

    :param seed: decides latencies
    :param policy: ``on_standby_loss``
    :param disks: whether the guest has one
    :param changes: to the configuration; unless told to, no daemon protects again after a failover
    :ivar answered: requests whose answers the client has
    :ivar uuid: the guest's
    :ivar moves: how often another copy than before was seen
    :ivar reprotect: the daemons protect again after a failover
    :ivar wish: what an administrator has asked for
    :ivar reached: point -> how often it was reached
    :ivar lost_allowed: the guest may be gone: its host died without a copy elsewhere
    :ivar forked: the policy "release" let output go, or may do so now, although a standby that
        could take over lived: what docs/failure-model.md says two hosts cannot decide
    """

    def __init__(
        self, seed: int, *, policy: str = "hold", disks: bool = False, **changes: Any
    ) -> None:
        self.simulation = Simulation(seed)
        shared = Path("/dev/shm")
        self._folder = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
        self.switch = SeenSwitch(self._leaves)
        self.networks: list[HostNetwork] = []
        self.processes: list[Process] = []
        self.disks = Disks(self) if disks else None
        self.story: list[str] = []
        self.reached: dict[str, int] = {}
        self.faults: list[Fault] = []
        self.fired: list[str] = []
        self.answered = 0
        self.asked_at = -1.0
        self.lost_allowed = False
        self.forked = False
        self.talking = False
        self.violation = ""
        self.moves = 0
        self.reprotect = bool(changes.get("reprotect"))
        self.wish = Wish(self)
        self._runs = False
        self._copies: list[Copy] = []
        self._last = b""
        self._owner: Copy | None = None
        names = ("a", "b")
        address = {
            (name, wire): f"10.{row}.0.{column}"
            for column, name in enumerate(names, 1)
            for row, wire in enumerate(_WIRES)
        }
        self.network = Network(
            self.simulation,
            {host: key for key, host in address.items()},
            lambda name: self.machines[name].powered,
        )
        self.network.late_ends = disks
        self._patches = contextlib.ExitStack()
        self._patch()
        self.machines: dict[str, Machine] = {}
        for name in names:
            config = Config(
                host=name,
                listen=(Address(address[name, "link"], 7000),),
                also=(Address(address[name, "lan"], 7000),),
                peers={
                    other: (Address(address[other, "link"], 7000),)
                    for other in names
                    if other != name
                },
                heartbeat_ms=int(HEARTBEAT * 1000),
                interval_ms=200,
                on_standby_loss=policy,
                paths=Paths(self._folder / name / "state", self._folder / name / "run"),
                **{"reprotect": False} | changes,
            )
            self.machines[name] = Machine(self, name, config)
        self.a, self.b = self.machines["a"], self.machines["b"]
        guest = self._boot()
        self.uuid = guest.description.uuid
        self._begin(Copy("a", guest, seen=True))

    def _begin(self, copy: Copy) -> None:
        self._copies.append(copy)
        self._owner = copy

    def _boot(self) -> MemoryGuest:
        disk = self.a.disk
        if self.disks is None or disk is None:
            return self.a.hypervisor.boot(GUEST)
        for module, name, value in self.disks.patches():
            self._replace(module, name, value)
        disk.serve()
        guest = self.a.hypervisor.boot(GUEST, disks=[DISK])
        self.disks.boot(guest, disk)
        return guest

    def _patch(self) -> None:
        clock = Clock(self.simulation)
        for name, module in list(sys.modules.items()):
            ours = name.partition(".")[0] in ("checkpoint", "kemari", "netbuffer", "diskbuffer")
            if ours and isinstance(getattr(module, "time", None), types.ModuleType):
                self._replace(module, "time", clock)
        for locked in (checkpoint.memory, kemari.ledger, kemari.memory):
            self._replace(locked, "threading", Threading("threading"))
        self._replace(kemari.ledger, "durable", Durable(self._full))
        self._replace(kemari.daemon, "ControlServer", Control)
        faultpoints.arm(self._reached)
        self._patches.callback(faultpoints.arm, None)

    def _full(self, path: Path) -> bool:
        return any(each.full and each.keeps(path) for each in self.machines.values())

    def _replace(self, module: Any, name: str, value: Any) -> None:
        self._patches.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)

    def __enter__(self) -> World:
        for machine in self.machines.values():
            machine.start()
        self.simulation.run(lambda: all(m.daemon for m in self.machines.values()), 5)
        self.simulation.run(lambda: False, 0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.simulation.end()
        self._patches.close()
        for process in self.processes:
            self.simulation.bury(process)
        if self.disks is not None:
            self.disks.end()
        for network in self.networks:
            network.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def other(self, machine: Machine) -> Machine:
        """The other host."""
        return self.b if machine is self.a else self.a

    def log(self, text: str) -> None:
        """Remember what happened, for whoever has to understand a violation."""
        self.story.append(f"{self.simulation.now - 1000:8.3f} {text}")

    # ---- Section: fault points ----

    def _reached(self, point: str) -> None:
        process = self.simulation.current
        if process is None or self.simulation._over:
            return
        if point not in faultpoints.POINTS:
            self.simulation.faults.append(f"{point} is not a listed fault point")
        self.reached[point] = self.reached.get(point, 0) + 1
        if point == "revive-unpause" and self.disks is not None:
            self.disks.check_revival(self.machines[process.name])
        for fault in list(self.faults):
            if fault.point == point and fault.left > 0:
                fault.left -= 1
                if fault.left == 0:
                    self.fired.append(point)
                    self.log(f"{process.name}: reached {point}, time {fault.nth}")
                    fault.act(self.machines[process.name])

    # ---- Section: the client ----

    def talk(self) -> None:
        """Have the client ask, one request after the other, until :meth:`hush`."""
        if not self.talking:
            self.talking = True
            self.simulation.later(0, self._ask)

    def hush(self) -> None:
        """No further requests."""
        self.talking = False

    def _ask(self) -> None:
        if not self.talking:
            return
        self.asked_at = self.simulation.now
        number = self.answered
        self._send(number)
        self.simulation.later(REPEAT, self._repeat, number)

    def _repeat(self, number: int) -> None:
        if self.talking and number == self.answered:
            self._send(number)
            self.simulation.later(REPEAT, self._repeat, number)

    def _send(self, number: int) -> None:
        """To every copy that a frame could reach: a switch may know the address at either port."""
        for copy in self.living():
            if copy.guest.answered <= number + 1:
                copy.guest.request(number)
        if self.disks is not None:
            self.simulation.later(self.simulation.random.uniform(0, CHORE), self.busy)

    def busy(self, writes: int = 1) -> None:
        """The guest writes to its disk, so many times, without being asked for anything."""
        if self.disks is None:
            return
        for copy in self.living():
            for _ in range(writes):
                self.disks.chore(self.machines[copy.host], copy.guest)

    def living(self) -> list[Copy]:
        """Copies of the guest that run now, in the order in which they came to life."""
        for machine in self.machines.values():
            guest = machine.guest
            if guest is not None and not any(copy.guest is guest for copy in self._copies):
                self._copies.append(Copy(machine.name, guest))
        return [
            copy
            for copy in self._copies
            if self.machines[copy.host].guest is copy.guest and self.machines[copy.host].powered
        ]

    def knock(self) -> None:
        """The client's next request comes before its time, whatever the guest is doing."""
        copies = self.living()
        if copies:
            copies[-1].guest.request(copies[-1].guest.answered)

    def begin_anew(self, machine: Machine, guest: MemoryGuest) -> None:
        """An administrator has started the guest, which remembers nothing."""
        self.wish.asked()
        self._begin(Copy(machine.name, guest, seen=True, by_hand=True))
        self.uuid = guest.description.uuid
        self.answered, self._last = 0, b""
        self.lost_allowed = self.forked = False
        if self.talking:
            self.simulation.later(0, self._ask)

    def carry_on(self, machine: Machine, guest: MemoryGuest) -> None:
        """An administrator has moved the guest, which remembers everything."""
        self.wish.asked()
        self._begin(Copy(machine.name, guest, seen=True, by_hand=True))

    # ---- Section: what is seen from outside ----

    def _leaves(self, host: str, frame: bytes) -> None:
        number, count, digest = parse_answer(frame)
        if number < self.answered and self._stood_at_release():
            return
        self._judge_owner(host)
        if frame == self._last:
            return  # a repetition, which TCP drops
        if number != self.answered:
            self.fail(
                f"answer {number} was seen from {host}, expected {self.answered}: "
                + ("it is from before" if number < self.answered else "one was left out")
            )
        if count != number + 1 or digest != digest_of(range(number + 1)):
            self.fail(f"answer {number} from {host} is of a guest that forgot what it had answered")
        self._last = frame
        self.answered += 1
        if self.talking:
            self.simulation.later(PACE, self._ask)

    def _stood_at_release(self) -> bool:
        """Whether a primary stood still between its check of an ack and the release that follows.

        What it lets go then is known to the survivor; it is old, and comes late.  No program can
        exclude that: docs/proof.md, What is not proven.
        """
        return "release" in self.fired

    def _judge_owner(self, host: str) -> None:
        here = [copy for copy in self.living() if copy.host == host]
        copy = here[-1] if here else self._of(host)
        if copy is self._owner or copy is None:
            return
        if copy.seen and not self.forked:
            self.fail(f"a frame came from the copy on {host} after another copy had been seen")
        copy.seen = True
        self._owner = copy
        self.moves += 1

    def _of(self, host: str) -> Copy | None:
        """The last copy of a host: what it sent may be seen after its end."""
        return next((copy for copy in reversed(self._copies) if copy.host == host), None)

    def fail(self, why: str) -> None:
        """Something must not have happened."""
        if not self.forked:
            self.violation = self.violation or "\n".join([why, *self.story[-60:], *self.logs()])
            raise _Seen(why) if self._runs else Violation(self.violation)

    # ---- Section: what may be lost ----

    def power_fails(self, machine: Machine) -> None:
        """Judge, just before it happens, whether the guest must outlive this."""
        other = self.other(machine)
        copies = self.living()
        if machine.guest is None:
            self.lost_holder(machine)
            return
        if machine.guest is not copies[-1].guest:
            return  # a stale copy
        # Without protection the guest shares its host's fate, and once the standby was asked to
        # stand down, its promise may be all that is left of it.
        daemon = machine.daemon if machine.alive else None
        protection = daemon.protections.get(GUEST) if daemon else None
        stages = (PrimaryState.PROTECTED, PrimaryState.HANDING_OVER)
        ending = daemon is not None and (
            protection is None or protection.machine.state not in stages
        )
        if ending or not other.powered or not other.fit:
            self.lost_allowed = True

    def lost_holder(self, machine: Machine) -> None:
        """The daemon of a standby ends, and with it the only copy if there is no other."""
        other = self.other(machine)
        if machine.guest is None and other.guest is None:
            self.lost_allowed = True

    def _recovering(self, machine: Machine) -> bool:
        """Whether a restarted daemon may let output go because nobody can be asked."""
        asks = machine.daemon is not None and bool(machine.daemon.recoveries)
        return asks and bool(self.network.unplugged)

    def look(self) -> None:
        """What must hold at any moment."""
        for machine in self.machines.values():
            if not machine.alive or machine.daemon is None:
                continue
            other = self.other(machine)
            for protection in machine.daemon.protections.values():
                protection.machine.check_invariants()
            # The policy went by silence: docs/failure-model.md, What two hosts cannot decide.
            may_fork = machine.config.on_standby_loss == "release"
            owed = machine.owes
            if may_fork and (owed or self._recovering(machine)) and other.powered:
                self.forked = self.forked or other.ready or other.guest is not None
            if self.forked and machine.guest is not None and other.alive:
                self.forked = bool(other.guest or other.ready)
            for session in machine.daemon.sessions.values():
                session.machine.check_invariants()
        visible = [copy for copy in self.living() if not self.machines[copy.host].held]
        if len(visible) > 1:
            self.fail("two copies have visible output")
        if self.simulation.faults:
            self.fail(f"the daemon has a fault: {self.simulation.faults[0]}")

    def say_alive(self, machine: Machine) -> None:
        """Have a daemon tell the other one that the guest runs there (ALIVE in the protocol)."""
        if not machine.alive or machine.daemon is None or machine.process is None:
            return
        for protection in machine.daemon.protections.values():
            for line in machine.daemon.peers.lifelines(protection.route.host_id):
                machine.process.create_task(line.alive(protection.uuid, protection.generation))

    # ---- Section: running ----

    def run(self, until: Callable[[], bool], limit: float) -> bool:
        """See :meth:`Simulation.run`; looks all the time."""

        def looked() -> bool:
            self.look()
            return bool(self.violation) or until()

        self._runs = True
        try:
            self.simulation.run(looked, limit)
        except _Seen:
            pass  # it is in the story
        finally:
            self._runs = False
        if self.violation:
            raise Violation(self.violation)
        return until()

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.run(lambda: False, seconds)

    def answers(self, count: int, limit: float = 60.0) -> bool:
        """Let the client get so many more answers."""
        wanted = self.answered + count
        self.talk()
        came = self.run(lambda: self.answered >= wanted or self.lost_allowed, limit)
        self.hush()
        return came

    def protect(self, source: str = "a") -> Answer:
        """``kemari start`` on a host; its answer, in the end."""
        machine = self.machines[source]
        answer = machine.ask("start", domain=GUEST, standby="b" if source == "a" else "a")
        self.run(lambda: answer.done or not machine.alive, 60)
        return answer

    def settle(self) -> None:
        """Let every fault be over, and judge what has become of the guest.

        :raise Violation: the guest is gone, mute, paused or there twice, or something was left
        """
        self.faults.clear()
        self.network.unplugged.clear()
        if not all(machine.powered for machine in self.machines.values()):
            # No host is back before the other one has missed it: docs/failure-model.md, Times.
            self.wait(3 * HEARTBEAT)
        for machine in self.machines.values():
            machine.make_room()
            machine.power_on()
            machine.start()
        well = self.run(lambda: not ill(self), CALM)
        if self.lost_allowed and not self.living():
            return
        if not well:
            raise Violation(f"{ill(self)}\n" + "\n".join([*self.story[-60:], *self.logs()]))
        if not self.forked and not self.answers(3, 30) and not self.lost_allowed:
            raise Violation("the guest does not answer\n" + "\n".join([*self.story, *self.logs()]))

    def logs(self) -> Iterator[str]:
        """The event logs of both hosts."""
        for machine in self.machines.values():
            path = machine.config.paths.log
            if path.exists():
                yield f"-- {machine.name} --"
                yield from path.read_text().splitlines()[-25:]
