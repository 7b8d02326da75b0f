# SPDX-License-Identifier: Apache-2.0
"""Two simulated hosts, a guest, a client outside, and what must hold whatever happens.

The daemons are the real ones, whole; the hypervisor, the network between the hosts and the clock
are simulated.  :class:`World` looks at every frame that leaves a host, as the client's switch does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import checkpoint.memory
import kemari.daemon
import kemari.memory
from checkpoint import faultpoints
from checkpoint.driver import Nic
from checkpoint.errors import CheckpointError
from checkpoint.memory import MemoryGuest, MemoryHypervisor, digest_of, parse_answer
from kemari.config import Address, Config, Paths
from kemari.daemon import Daemon
from kemari.epoch import PrimaryState, StandbyState
from kemari.errors import KemariError
from kemari.memory import MemoryNetwork, MemoryOutput, Switch
from kemari.stragglers import OWED
from tests.prove.network import Network
from tests.prove.simulation import Process, Simulation

GUEST: Final = "web"
HEARTBEAT: Final = 0.4
#: Virtual seconds that a supervisor waits before it starts a daemon that has died.
RESTART: Final = 0.5
#: Virtual seconds between an answer and the client's next request, and until it repeats one.
PACE: Final = 0.02
REPEAT: Final = 0.3
#: Virtual seconds within which all must be well again once every fault is over: the daemons'
#: longest patience is 30 s, and a lost protection is tried again every 60 s.
CALM: Final = 150.0
_WIRES: Final = ("link", "lan")


class Violation(AssertionError):
    """Something happened that must not."""


class _Seen(BaseException):
    """As above, in the middle of the code under test, which must not take it for its own error."""


class _Clock(types.ModuleType):
    """Stands in for the module ``time``."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__("time")
        self.monotonic = lambda: simulation.now
        self.perf_counter = self.monotonic
        self.time = lambda: simulation.now + 1.7e9
        self.monotonic_ns = lambda: int(simulation.now * 1e9)
        self.perf_counter_ns = self.monotonic_ns


class _NoLock:
    """Only one thread runs at a time, and one that stands still must not keep a lock."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class _Threading(types.ModuleType):
    """Stands in for the module ``threading`` where it is used for locks only."""

    Lock = RLock = _NoLock
    Event = threading.Event


class _Control:
    """Stands in for the control socket.  See :meth:`Machine.ask`."""

    def __init__(self, path: Path, handler: Callable[..., Any]) -> None:
        self.handler = handler

    async def start(self) -> None:
        """There is no socket."""

    async def close(self) -> None:
        """There is no socket."""


class _Switch(Switch):
    """Tells the world of each frame at once."""

    def __init__(self, seen: Callable[[str, bytes], None]) -> None:
        super().__init__()
        self._seen = seen

    def take(self, host: str, frame: bytes) -> None:
        """A frame has left a host."""
        self._seen(host, frame)


class _HostNetwork(MemoryNetwork):
    """Keeps account of buffers, so that their descriptors can be closed."""

    def __init__(self, host: str, switch: _Switch) -> None:
        super().__init__(host, switch)
        self.outputs: list[MemoryOutput] = []
        self._out = switch

    def leave(self, frame: bytes) -> None:
        if self.powered:
            self._out.take(self.host, frame)

    def output(self, nics: Sequence[Nic], limit: int) -> MemoryOutput:
        made = super().output(nics, limit)
        self.outputs.append(made)
        return made


@dataclass(slots=True)
class Answer:
    """What came of a request on a control socket."""

    done: bool = False
    result: Any = None
    error: Exception | None = None


class Machine:
    """A host: its disk, its guests, its network, and its daemon while that lives."""

    def __init__(self, world: World, name: str, config: Config) -> None:
        self.world = world
        self.name = name
        self.config = config
        self.powered = True
        self.supervised = True
        self.process: Process | None = None
        self.daemon: Daemon | None = None
        self.lives = 0
        self._boot()

    def _boot(self) -> None:
        self.network = _HostNetwork(self.name, self.world.switch)
        self.hypervisor = MemoryHypervisor(self.network.transmit)
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
    def alive(self) -> bool:
        """Whether a daemon runs here."""
        return self.process is not None and self.process.alive

    @property
    def held(self) -> bool:
        """Whether the guest's output is held here."""
        return bool(self.network.buffers)

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
        self.hypervisor.power_cut()
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
        other = world.b if self is world.a else world.a
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
        handler = self.daemon._control.handler  # type: ignore[attr-defined]

        async def carry_out() -> None:
            try:
                answer.result = await handler(operation, arguments, lambda progress: None)
            except (CheckpointError, KemariError) as error:
                answer.error = error
            answer.done = True

        assert self.process is not None
        self.process.create_task(carry_out())
        return answer


@dataclass(slots=True)
class _Copy:
    """One life of the guest on one host: from boot or revival to its end."""

    host: str
    guest: MemoryGuest
    seen: bool = False


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
    :ivar answered: requests whose answers the client has
    :ivar reached: point -> how often it was reached
    :ivar lost_allowed: the guest may be gone: its host died without a copy elsewhere
    :ivar forked: the policy, or an administrator's force, let output go although a standby that
        could take over lived: what docs/failure-model.md says two hosts cannot decide
    """

    def __init__(self, seed: int, *, policy: str = "hold", **changes: Any) -> None:
        self.simulation = Simulation(seed)
        shared = Path("/dev/shm")
        self._folder = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
        self.switch = _Switch(self._leaves)
        self.networks: list[_HostNetwork] = []
        self.processes: list[Process] = []
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
        self._copies: list[_Copy] = []
        self._last = b""
        self._owner: _Copy | None = None
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
                **changes,
            )
            self.machines[name] = Machine(self, name, config)
        self.a, self.b = self.machines["a"], self.machines["b"]
        guest = self.a.hypervisor.boot(GUEST)
        self._copies.append(_Copy("a", guest, seen=True))
        self._owner = self._copies[0]

    def _patch(self) -> None:
        clock = _Clock(self.simulation)
        for name, module in list(sys.modules.items()):
            ours = name.partition(".")[0] in ("checkpoint", "kemari", "netbuffer", "diskbuffer")
            if ours and isinstance(getattr(module, "time", None), types.ModuleType):
                self._replace(module, "time", clock)
        for locked in (checkpoint.memory, kemari.memory):
            self._replace(locked, "threading", _Threading("threading"))
        self._replace(kemari.daemon, "ControlServer", _Control)
        faultpoints.arm(self._reached)
        self._patches.callback(faultpoints.arm, None)

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
        for network in self.networks:
            for output in network.outputs:
                if output._event >= 0:
                    os.close(output._event)
                    output._event = -1
        shutil.rmtree(self._folder, ignore_errors=True)

    def log(self, text: str) -> None:
        """Remember what happened, for whoever has to understand a violation."""
        self.story.append(f"{self.simulation.now - 1000:8.3f} {text}")

    # ---- Section: fault points ----

    def _reached(self, point: str) -> None:
        process = self.simulation.current
        if process is None or self.simulation._over:
            return
        self.reached[point] = self.reached.get(point, 0) + 1
        for fault in self.faults:
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
        for copy in self._living():
            if copy.guest.answered <= number + 1:
                copy.guest.request(number)

    def _living(self) -> list[_Copy]:
        """Copies of the guest that run now, in the order in which they came to life."""
        for machine in self.machines.values():
            guest = machine.guest
            if guest is not None and not any(copy.guest is guest for copy in self._copies):
                self._copies.append(_Copy(machine.name, guest))
        return [
            copy
            for copy in self._copies
            if self.machines[copy.host].guest is copy.guest and self.machines[copy.host].powered
        ]

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
        here = [copy for copy in self._living() if copy.host == host]
        copy = here[-1] if here else self._of(host)
        if copy is self._owner or copy is None:
            return
        if copy.seen and not self.forked:
            self.fail(f"a frame came from the copy on {host} after another copy had been seen")
        copy.seen = True
        self._owner = copy

    def _of(self, host: str) -> _Copy | None:
        """The last copy of a host: what it sent may be seen after its end."""
        return next((copy for copy in reversed(self._copies) if copy.host == host), None)

    def fail(self, why: str) -> None:
        """Something must not have happened."""
        if not self.forked:
            self.violation = self.violation or "\n".join([why, *self.story[-60:], *self.logs()])
            raise _Seen(why)

    # ---- Section: what may be lost ----

    def power_fails(self, machine: Machine) -> None:
        """Judge, just before it happens, whether the guest must outlive this."""
        other = self.b if machine is self.a else self.a
        copies = self._living()
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
        if ending or not other.powered or not other.ready:
            self.lost_allowed = True

    def lost_holder(self, machine: Machine) -> None:
        """The daemon of a standby ends, and with it the only copy if there is no other."""
        other = self.b if machine is self.a else self.a
        if machine.guest is None and other.guest is None:
            self.lost_allowed = True

    def _recovering(self, machine: Machine) -> bool:
        """Whether a restarted daemon may let output go because nobody can be asked."""
        asks = machine.daemon is not None and GUEST in machine.daemon.recoveries
        return asks and bool(self.network.unplugged)

    def look(self) -> None:
        """What must hold at any moment."""
        for machine in self.machines.values():
            if not machine.alive or machine.daemon is None:
                continue
            other = self.b if machine is self.a else self.a
            for protection in machine.daemon.protections.values():
                protection.machine.check_invariants()
            # The policy went by silence: docs/failure-model.md, What two hosts cannot decide.
            owed = any(OWED in record.options for record in machine.daemon.host.ledger)
            owed = owed or (
                machine.config.on_standby_loss == "release" and self._recovering(machine)
            )
            if owed and other.powered and (other.ready or other.guest):
                self.forked = True
            if self.forked and machine.guest is not None and other.alive:
                self.forked = bool(other.guest or other.ready)
            for session in machine.daemon.sessions.values():
                session.machine.check_invariants()
        visible = [copy for copy in self._living() if not self.machines[copy.host].held]
        if len(visible) > 1:
            self.fail("two copies have visible output")
        if self.simulation.faults:
            self.fail(f"the daemon has a fault: {self.simulation.faults[0]}")

    def say_alive(self, machine: Machine) -> None:
        """Have a daemon tell the other one that the guest runs there (ALIVE in the protocol)."""
        assert machine.daemon is not None
        assert machine.process is not None
        for protection in machine.daemon.protections.values():
            for line in machine.daemon.peers.lifelines(protection._standby_id):
                machine.process.create_task(line.alive(protection.uuid, protection.generation))

    # ---- Section: running ----

    def run(self, until: Callable[[], bool], limit: float) -> bool:
        """See :meth:`Simulation.run`; looks all the time."""

        def looked() -> bool:
            self.look()
            return bool(self.violation) or until()

        try:
            self.simulation.run(looked, limit)
        except _Seen:
            pass  # it is in the story
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
            machine.power_on()
            machine.start()
        well = self.run(self._well, CALM)
        if self.lost_allowed and not self._living():
            return
        if not well:
            raise Violation(f"{self._ill()}\n" + "\n".join([*self.story[-60:], *self.logs()]))
        if not self.forked and not self.answers(3, 30) and not self.lost_allowed:
            raise Violation("the guest does not answer\n" + "\n".join([*self.story, *self.logs()]))

    def _well(self) -> bool:
        return not self._ill()

    def _ill(self) -> str:
        """What is not as it should be in the end; "" if all is well."""
        copies = self._living()
        if not copies:
            return "the guest runs nowhere"
        if len(copies) > 1:
            return "" if self.forked else "the guest runs twice"
        (copy,) = copies
        machine = self.machines[copy.host]
        if copy.guest.paused:
            return "the guest is paused"
        other = self.b if machine is self.a else self.a
        for each in (machine, other):
            if not each.alive or each.daemon is None:
                return f"no daemon runs on {each.name}"
            if each.daemon.recoveries:
                return f"{each.name} does not know who owns the guest"
        protection = machine.daemon.protections.get(GUEST) if machine.daemon else None
        protected = protection is not None and not protection.machine.over
        if machine.held and not protected:
            return f"output is held on {machine.name} for nobody"
        if other.held:
            return f"output is held on {other.name}, where no guest is"
        if protected and protection is not None and not protection.machine.protected:
            return f"a protection has come no further than {protection.state}"
        if other.hypervisor.shells and not protected:
            return f"a shell is left on {other.name}"
        if machine.hypervisor.shells:
            return f"a shell is left on {machine.name}, where the guest runs"
        return ""

    def logs(self) -> Iterator[str]:
        """The event logs of both hosts."""
        for machine in self.machines.values():
            path = machine.config.paths.log
            if path.exists():
                yield f"-- {machine.name} --"
                yield from path.read_text().splitlines()[-25:]
