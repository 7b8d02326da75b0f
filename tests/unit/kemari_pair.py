# SPDX-License-Identifier: Apache-2.0
"""Two daemons in one process, each in a thread and loop of its own, on TCP through cuttable relays.

``Machine.power_cut`` freezes a daemon where it stands and lets nothing of it out any more: no
goodbye on any connection.  ``Machine.kill`` freezes it as well, but closes its sockets, as a kernel
does for a killed process; guests and held output live on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from checkpoint.hello import Hello
from checkpoint.link import Link, LinkOptions, PeerSilent
from checkpoint.memory import MemoryGuest, MemoryHypervisor, digest_of, parse_answer
from checkpoint.network import connect
from kemari.config import Address, Config, Paths, Tls
from kemari.control import request
from kemari.daemon import Daemon
from kemari.errors import NoSuchProtection
from kemari.memory import MemoryNetwork, Switch
from tests.unit.patience import PATIENCE

#: Frozen daemons: their coroutines must not be collected, which would run their clean-up.
_FROZEN: list[Any] = []


class Killed(BaseException):
    """Raised, long after, in threads that a power cut caught in the middle of something."""


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def await_true(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Wait until ``condition`` returns something true; returns that."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"after {patience} s still not: {what}")
        threading.Event().wait(0.005)
    return value


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self.thread.start()

    def run(self, work: Any, timeout: float = PATIENCE) -> Any:
        """Run a coroutine there and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def stop(self) -> None:
        """Stop it where it is."""
        self.loop.call_soon_threadsafe(self.loop.stop)

    def end_threads(self, stuck: Collection[threading.Thread] = ()) -> None:
        """Let the threads that work for it come to their end: a process that ended has none.

        One that goes on would write files beside the next daemon, which no dead process does.

        :param stuck: those that wait for the end of the test
        """
        threads = self.loop._default_executor  # type: ignore[attr-defined]
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)
            for thread in set(threads._threads) - {threading.current_thread(), *stuck}:
                thread.join(PATIENCE)

    def bury(self) -> None:
        """End what is left in a stopped loop, so that nothing is said about it later."""
        self.thread.join(PATIENCE)
        self.loop.set_exception_handler(lambda loop, context: None)
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        for _ in range(20):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()
        _FROZEN.append(asyncio.all_tasks(self.loop))
        # A frozen daemon is never collected: its descriptors would stay open for all tests to come.
        for transport in list(_transports(self.loop)):
            transport.abort()
        for key in list(self.loop._selector.get_map().values()):  # type: ignore[attr-defined]
            for handle in filter(None, key.data):
                for listening in handle._args:
                    if isinstance(listening, socket.socket):
                        listening.close()
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()
        # What a thread still writes must not meet the removal of its folder.
        self.end_threads()
        self.loop.close()


@dataclass
class Fabric:
    """The networks between the hosts.

    :ivar dead: hosts without power
    :ivar unplugged: networks that carry nothing
    :ivar where: address -> (host, network)
    :ivar delay: seconds that each chunk takes
    """

    dead: set[str] = field(default_factory=set)
    unplugged: set[str] = field(default_factory=set)
    where: dict[tuple[str, int], tuple[str, str]] = field(default_factory=dict)
    delay: float = 0.0
    chunks_left: int = -1
    at_the_end: Callable[[], None] = lambda: None
    loop: Loop = field(default_factory=lambda: Loop("fabric"))

    def carries(self, one: str, other: str, network: str) -> bool:
        """Whether bytes get through now."""
        return not {one, other} & self.dead and network not in self.unplugged

    def cut_after(self, chunks: int, act: Callable[[], None]) -> None:
        """Call ``act`` when the replication link has carried so many more chunks."""
        self.chunks_left, self.at_the_end = chunks, act

    def _count(self, network: str) -> None:
        if network == "link" and self.chunks_left >= 0:
            self.chunks_left -= 1
            if self.chunks_left < 0:
                self.at_the_end()

    async def relay(self, source: str, host: str, port: int) -> int:
        """The port of a new relay for one connection from ``source`` to an address."""
        target, network = self.where[host, port]

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            server.close()
            try:
                far_reader, far_writer = await asyncio.open_connection(host, port)
            except ConnectionError:
                writer.close()
                return
            await asyncio.gather(
                self._pump(reader, far_writer, source, target, network),
                self._pump(far_reader, writer, target, source, network),
            )

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        relayed: int = server.sockets[0].getsockname()[1]
        return relayed

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        one: str,
        other: str,
        network: str,
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                try:
                    data = await reader.read(1 << 16)
                except ConnectionError:
                    data = b""
                while not self.carries(one, other, network):  # noqa: ASYNC110 - tests change it from other threads
                    await asyncio.sleep(0.01)
                if not data:
                    break
                self._count(network)
                if self.delay:
                    await asyncio.sleep(self.delay)
                if not self.carries(one, other, network):
                    continue
                writer.write(data)
                await writer.drain()
        writer.close()

    def dialler(self, source: str) -> Callable[[str, int, Hello, LinkOptions], Any]:
        """What a daemon on ``source`` uses in place of a plain connection."""

        async def dial(host: str, port: int, hello: Hello, options: LinkOptions) -> Link:
            target, network = self.where[host, port]
            if not self.carries(source, target, network):
                await asyncio.sleep(options.connect_timeout)
                raise PeerSilent(f"{host}:{port} did not answer")
            relayed = await asyncio.wrap_future(
                asyncio.run_coroutine_threadsafe(self.relay(source, host, port), self.loop.loop)
            )
            return await connect("127.0.0.1", relayed, hello, options)

        return dial


class Machine:
    """A host: what survives its daemon, and the daemon.

    :ivar locate: where targets of disks are here
    """

    def __init__(self, name: str, fabric: Fabric, switch: Switch, config: Config) -> None:
        self.name = name
        self.fabric = fabric
        self.config = config
        self.switch = switch
        self.network = MemoryNetwork(name, switch)
        self.hypervisor = MemoryHypervisor(self.network.transmit)
        self.locate: Callable[[str], Path] = Path
        self.daemon: Daemon | None = None
        self.loop: Loop | None = None
        self.loops: list[Loop] = []
        self.released = threading.Event()
        self._descriptors: set[int] = set()
        self._stuck: set[threading.Thread] = set()

    def start(self) -> None:
        """Start the daemon."""
        self.loop = Loop(f"daemon {self.name}")
        self.loops.append(self.loop)
        self.daemon = Daemon(
            self.config,
            self.hypervisor,
            self.network,
            dial=self.fabric.dialler(self.name),
            # A process of its own would outlive the power cut of a host that is a thread.
            pulses=False,
        )
        self.daemon.host.locate = self.locate
        self.loop.run(self.daemon.start())

    def stop(self) -> None:
        """End the daemon in good order."""
        assert self.daemon
        assert self.loop
        self.loop.run(self.daemon.close())
        self.loop.stop()
        self.daemon = None

    def request(self, operation: str, **arguments: Any) -> Any:
        """As the command line does."""
        return request(self.config.paths.socket, operation, arguments)

    def status(self, guest: str) -> dict[str, Any]:
        """The status of one guest."""
        status: dict[str, Any] = self.request("status", domain=guest)[0]
        return status

    def state(self, guest: str) -> str:
        """What is said of one guest's state; "" before anything is known of it."""
        try:
            return str(self.status(guest)["state"])
        except NoSuchProtection:
            return ""

    def events(self, guest: str = "") -> list[str]:
        """Names of the events in the log."""
        assert self.daemon
        return [str(entry["event"]) for entry in self.daemon.host.journal.read(guest)]

    def _freeze(self) -> None:
        assert self.daemon
        assert self.loop
        _FROZEN.append((self.daemon, self.loop))
        self.loop.stop()

    def power_cut(self) -> None:
        """The host is gone, this instant."""
        self.network.powered = False
        self.fabric.dead.add(self.name)
        self.hypervisor.power_cut()
        self._freeze()

    def power_on(self) -> None:
        """The host comes back, without guests; its disk is as it was."""
        assert self.loop
        self.loop.end_threads(self._stuck)
        self._close_sockets()
        self.network = MemoryNetwork(self.name, self.switch)
        self.hypervisor = MemoryHypervisor(self.network.transmit)
        self.fabric.dead.discard(self.name)
        self.start()

    def kill(self) -> None:
        """SIGKILL for the daemon; guests and held output stay."""
        self._freeze()
        assert self.loop
        self.loop.thread.join(PATIENCE)
        # At once: a test may start the next daemon as soon as the loop has stopped.
        self._close_sockets()
        self.loop.end_threads(self._stuck)

    def _close_sockets(self) -> None:
        assert self.loop
        if self.loop.thread.is_alive():
            return  # caught in the middle of something; its sockets do no harm
        for transport in list(_transports(self.loop.loop)):
            raw = transport.get_extra_info("socket")
            if raw is not None and raw.fileno() >= 0:
                os.close(os.dup(raw.fileno()))
                raw._sock.shutdown(socket.SHUT_RDWR)
        for key in list(self.loop.loop._selector.get_map().values()):  # type: ignore[attr-defined]
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(key.fd)) as listening:
                listening.shutdown(socket.SHUT_RDWR)

    def cut_at(self, point: str, count: int = 1, *, act: Callable[[], None] | None = None) -> None:
        """Cut the power when ``point`` is reached for the ``count``-th time."""
        left = [count]

        def reached(here: str) -> None:
            if here == point:
                left[0] -= 1
                if left[0] == 0:
                    self._stuck.add(threading.current_thread())
                    (act or self.power_cut)()
                    self.released.wait()
                    raise Killed

        self.hypervisor.reached = reached


def _transports(loop: Any) -> Iterator[Any]:
    yield from getattr(loop, "_transports", {}).values()


class Pair:
    """Hosts a and b with a replication network and a LAN, and a guest on a.

    :param lan: whether the hosts know each other's LAN address
    :param tls_of: hosts whose TLS differs from the others'
    """

    def __init__(
        self,
        folder: Path,
        *,
        lan: bool = True,
        heartbeat_ms: int = 400,
        guest: str = "web",
        tls_of: dict[str, Tls | None] | None = None,
        **changes: Any,
    ) -> None:
        self.switch = Switch()
        self.fabric = Fabric()
        self.machines: dict[str, Machine] = {}
        names = ("a", "b")
        link = {name: Address("127.0.0.1", free_port()) for name in names}
        lans = {name: Address("127.0.0.1", free_port()) for name in names}
        for name in names:
            self.fabric.where["127.0.0.1", link[name].port] = (name, "link")
            self.fabric.where["127.0.0.1", lans[name].port] = (name, "lan")
            config = Config(
                host=name,
                listen=(link[name],),
                also=(lans[name],) if lan else (),
                peers={other: (link[other],) for other in names if other != name},
                heartbeat_ms=heartbeat_ms,
                interval_ms=50,
                reprotect=False,  # what becomes of a guest that came here is each test's own matter
                paths=Paths(folder / name / "state", folder / name / "run"),
            )
            config = replace(config, **changes)
            if tls_of and name in tls_of:
                config = replace(config, tls=tls_of[name])
            self.machines[name] = Machine(name, self.fabric, self.switch, config)
        self.a, self.b = self.machines["a"], self.machines["b"]
        self.name = guest
        self.guest: MemoryGuest = self.a.hypervisor.boot(guest)
        self._sent = 0
        self._asked: list[tuple[MemoryGuest, int]] = []

    def __enter__(self) -> Pair:
        self.a.start()
        self.b.start()
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines.values():
            machine.released.set()
            for loop in machine.loops:
                loop.stop()
        self.fabric.loop.stop()
        for loop in (*self.a.loops, *self.b.loops, self.fabric.loop):
            loop.bury()

    def protect(self, **arguments: Any) -> Any:
        """``kemari start`` on a."""
        return self.a.request("start", domain=self.name, standby="b", **arguments)

    def lose_standby(self) -> None:
        """A guest is protected to b, talks, and b loses its power."""
        self.protect()
        self.talk(3)
        self.b.power_cut()

    # ---- The client outside ----

    def running(self) -> MemoryGuest | None:
        """The guest, wherever the outside would reach it."""
        for machine in self.machines.values():
            found = machine.hypervisor.guests.get(self.name)
            if found is not None and machine.name not in self.fabric.dead:
                return found
        return None

    def answers(self) -> list[tuple[str, int, int, bytes]]:
        """(host, request, count, digest) of all answers that were seen."""
        return [(host, *parse_answer(frame)) for host, frame in list(self.switch.seen)]

    def talk(self, count: int = 20, patience: float = PATIENCE) -> None:
        """A client: send a request, wait for its answer, send the next; repeats what is lost."""
        for _ in range(count):
            number, self._sent = self._sent, self._sent + 1
            deadline = time.monotonic() + patience
            while not any(answer[1] == number for answer in self.answers()):
                if time.monotonic() > deadline:
                    raise AssertionError(f"request {number} was not answered in {patience} s")
                guest = self.running()
                if guest is not None:
                    self.ask(guest, number)
                self.switch.arrived.wait(0.02)
                self.switch.arrived.clear()

    def ask(self, guest: MemoryGuest, number: int) -> None:
        """Send a request, unless this incarnation of the guest has had it."""
        if not any(guest is other and number == had for other, had in self._asked):
            self._asked.append((guest, number))
            guest.request(number)

    def check_answers(self) -> None:
        """Every request was answered once, in order, by a guest that remembered all before.

        The same answer again, right after itself, is what TCP's receiver drops.
        """
        seen = [each for each, _ in groupby(answer[1:] for answer in self.answers())]
        numbers = [number for number, _, _ in seen]
        assert numbers == list(range(len(numbers))), f"lost, repeated or reordered: {numbers}"
        for number, count, digest in seen:
            assert count == number + 1
            assert digest == digest_of(range(number + 1))
