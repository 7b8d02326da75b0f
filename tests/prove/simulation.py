# SPDX-License-Identifier: Apache-2.0
"""Several daemons in one process, on one virtual clock: fast, and the same again for the same seed.

Each daemon has a :class:`Process`, an asyncio loop of its own.  :class:`Simulation` runs the loops'
callbacks one at a time, in the order of virtual time; work that the daemon gives to threads is run
as one more callback.  So nothing runs at the same time as anything else, and what happens depends
on the seed alone.

A process can be killed or stalled *inside* a callback, at a fault point: then the thread that runs
it stays where it is, for ever or until the stall is over, and another thread goes on with all that
is not of that process.  No ``finally`` runs in a killed process, as after SIGKILL.

The idea is that of FoundationDB's simulator (Zhou et al., SIGMOD 2021).
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
import random
import select
import threading
from asyncio import events
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, Final, TypeVar

from tests.prove.localsocket import LineTransport, LocalSockets

T = TypeVar("T")

#: Virtual seconds that a call in a thread takes at most.
THREAD_TIME: Final = 0.003
#: Callbacks in one call of :meth:`Simulation.run`: more means that something goes round in circles.
MOST_CALLBACKS: Final = 2_000_000


class Stuck(AssertionError):
    """Callbacks go on without end."""


class Killed(BaseException):
    """Raised in what a killed process was doing, when the simulation is over."""


class Process(asyncio.BaseEventLoop):
    """The event loop of one daemon.

    :ivar name: of the machine that it runs on
    :ivar alive: false once killed; then nothing of it runs any more
    :ivar stalled: nothing of it runs now
    """

    def __init__(self, simulation: Simulation, name: str) -> None:
        super().__init__()
        self.simulation = simulation
        self.name = name
        self.alive = True
        self.stalled = False
        self.deferred: list[_Event] = []
        self.dying: list[Callable[[], None]] = []
        self.grave: set[asyncio.Task[Any]] = set()
        self.in_thread = False

    # ---- what asyncio asks of a loop ----

    def time(self) -> float:
        return self.simulation.now

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        """There is nothing to debug."""

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return True  # it has nothing that would have to be closed

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self.simulation.push(self.simulation.now, self, handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self.simulation.push(max(when, self.simulation.now), self, handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.simulation.now + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """The event of a cancelled timer stays in the queue and does nothing."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
        **_: Any,
    ) -> asyncio.Task[T]:
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()

        def work() -> None:
            events._set_running_loop(None)
            self.in_thread = True
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 - whoever awaits it judges
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)
            finally:
                self.in_thread = False

        simulation = self.simulation
        delay = simulation.random.uniform(0, THREAD_TIME)
        simulation.push(simulation.now + delay, self, asyncio.Handle(work, (), self))
        return future

    def add_reader(  # type: ignore[override]
        self, fd: Any, callback: Callable[..., Any], *args: Any
    ) -> None:
        self.simulation.add_reader(fd, self, callback, args)

    def remove_reader(self, fd: Any) -> bool:
        return self.simulation.remove_reader(fd)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.simulation.faults.append(f"{self.name}: {context.get('message')}: {error!r}")

    async def create_connection(  # type: ignore[override]
        self, factory: Any, host: Any = None, port: Any = None, **_: Any
    ) -> Any:
        return await self.simulation.network.connect(self, factory, host, port)

    async def create_server(  # type: ignore[override]
        self, factory: Any, host: Any = None, port: Any = None, **_: Any
    ) -> Any:
        return self.simulation.network.listen(self, factory, host, port)

    async def create_unix_connection(  # type: ignore[override]
        self, factory: Any, path: Any = None, **_: Any
    ) -> Any:
        line = self.simulation.local.connect(self, os.fspath(path))
        protocol, transport = factory(), LineTransport(line)
        line.divert(protocol)
        protocol.connection_made(transport)
        return transport, protocol

    async def sock_connect(self, sock: Any, address: Any) -> None:
        sock.line = self.simulation.local.connect(self, address)

    async def sock_sendall(self, sock: Any, data: Any) -> None:
        sock.line.send(bytes(data))

    async def sock_recv(self, sock: Any, nbytes: int) -> bytes:
        data: bytes = await sock.line.take(nbytes)
        return data

    async def sock_recv_into(self, sock: Any, buf: Any) -> int:
        data = await sock.line.take(len(buf))
        buf[: len(data)] = data
        return len(data)


class _Event:
    """Something that is due.  Without a process it is the world's own."""

    __slots__ = ("handle", "number", "process", "when")

    def __init__(
        self, when: float, number: int, process: Process | None, handle: asyncio.Handle
    ) -> None:
        self.when = when
        self.number = number
        self.process = process
        self.handle = handle

    def __lt__(self, other: _Event) -> bool:
        return (self.when, self.number) < (other.when, other.number)


class _Parked:
    """A thread that stands still inside a callback."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.killed = False


class Simulation:
    """The clock and the order of everything.

    :ivar now: virtual ``time.monotonic()``
    :ivar current: the process whose callback runs
    :ivar faults: exceptions that no code of the daemon took care of
    :ivar random: decides everything that is left to chance
    """

    def __init__(self, seed: int) -> None:
        self.now = 1000.0
        self.random = random.Random(seed)
        self.current: Process | None = None
        self.faults: list[str] = []
        self.callbacks = 0
        self.network: Any = None
        self.local = LocalSockets()
        self._world = Process(self, "world")
        self._queue: list[_Event] = []
        self._numbers = itertools.count()
        self._poll = select.poll()
        self._readers: dict[int, tuple[Process, Callable[..., Any], tuple[Any, ...]]] = {}
        self._ready: set[int] = set()
        self._until: Callable[[], bool] = lambda: True
        self._deadline = 0.0
        self._error: BaseException | None = None
        self._finished = threading.Semaphore(0)
        self._parked: list[_Parked] = []
        self._over = False

    # ---- Section: what is due ----

    def push(self, when: float, process: Process | None, handle: asyncio.Handle) -> None:
        """Have ``handle`` run at ``when``."""
        heapq.heappush(self._queue, _Event(when, next(self._numbers), process, handle))

    def later(self, delay: float, callback: Callable[..., Any], *args: Any) -> asyncio.Handle:
        """Something of the world, not of a process, happens after ``delay`` seconds."""
        handle = asyncio.Handle(callback, args, self._world)
        self.push(self.now + delay, None, handle)
        return handle

    def add_reader(
        self, fd: int, process: Process, callback: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        """See :meth:`asyncio.loop.add_reader`."""
        self._readers[fd] = (process, callback, args)
        self._poll.register(fd, select.POLLIN)

    def remove_reader(self, fd: int) -> bool:
        """See :meth:`asyncio.loop.remove_reader`."""
        if fd not in self._readers:
            return False
        del self._readers[fd]
        self._poll.unregister(fd)
        self._ready.discard(fd)
        return True

    def _look_at_readers(self) -> None:
        for fd, _ in self._poll.poll(0):
            if fd not in self._ready and fd in self._readers:
                self._ready.add(fd)
                process = self._readers[fd][0]
                self.push(self.now, process, asyncio.Handle(self._readable, (fd,), process))

    def _readable(self, fd: int) -> None:
        self._ready.discard(fd)
        if fd in self._readers:
            _, callback, args = self._readers[fd]
            callback(*args)

    # ---- Section: running ----

    def run(self, until: Callable[[], bool], limit: float) -> bool:
        """Let things happen until ``until()`` holds, or for ``limit`` virtual seconds.

        :return: whether it holds
        """
        self._until, self._deadline = until, self.now + limit
        threading.Thread(target=self._schedule, daemon=True).start()
        self._finished.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return until()

    def end(self) -> None:
        """Let go of threads that stand still; nothing may be used after this."""
        self._over = True
        for fd in list(self._readers):
            self.remove_reader(fd)
        for parked in self._parked:
            parked.go.release()
        self._parked.clear()
        self._queue.clear()

    def bury(self, process: Process) -> None:
        """Forget what a process was doing, without a word about it; after :meth:`end`."""
        process.alive = False
        tasks = process.grave | asyncio.all_tasks(process)
        process.deferred.clear()
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            try:
                task.get_coro().close()
            except BaseException:  # noqa: BLE001 - its clean-up finds nothing in order any more
                continue
        process.grave.clear()

    def _schedule(self) -> None:
        try:
            ended = self._events()
        except BaseException as error:  # noqa: BLE001 - handed to whoever called run
            if self._over:
                return
            self._error = error
            ended = True
        if ended:
            self._finished.release()

    def _events(self) -> bool:
        """Run what is due; False if another thread goes on with it."""
        count = 0
        while not self._until():
            if self._readers:
                self._look_at_readers()
            if not self._queue or self._queue[0].when > self._deadline:
                self.now = max(self.now, self._deadline)
                return True
            event = heapq.heappop(self._queue)
            self.now = max(self.now, event.when)
            process = event.process
            if event.handle.cancelled():
                continue
            if process is not None and not process.alive:
                process.deferred.append(event)  # kept: what is collected runs its clean-up
                continue
            if process is not None and process.stalled:
                process.deferred.append(event)
                continue
            count += 1
            if count > MOST_CALLBACKS:
                raise Stuck(f"{event.handle} is one of more than {MOST_CALLBACKS} callbacks")
            if not self._run_one(process, event.handle):
                return False
        return True

    def _run_one(self, process: Process | None, handle: asyncio.Handle) -> bool:
        self.current = process
        if process is None:
            parked: _Parked | None = handle._callback(*handle._args)  # type: ignore[attr-defined]
            if isinstance(parked, _Parked):
                # A stalled thread goes on, and with it the running of events.
                parked.go.release()
                return False
            return True
        events._set_running_loop(process)
        try:
            handle._run()
        finally:
            events._set_running_loop(None)
        if self._over:
            raise Killed
        self.current = None
        self.callbacks += 1
        return True

    # ---- Section: faults; to be called inside a callback of the process, or between callbacks ----

    def kill(self, process: Process) -> None:
        """End a process where it is; does not return if it is the one that runs."""
        if not process.alive:
            return
        process.alive = False
        process.grave = asyncio.all_tasks(process)
        for fd, (reader, _, _) in list(self._readers.items()):
            if reader is process:
                self.remove_reader(fd)
        for callback in process.dying:
            callback()
        if self.current is process:
            self._park(_Parked())

    def stall(self, process: Process, seconds: float) -> None:
        """Have a process stand still; returns to the one that runs when it goes on."""
        if process.stalled or not process.alive:
            return
        process.stalled = True
        running = self.current is process
        parked = _Parked()
        self.later(seconds, self._resume, process, parked if running else None)
        if running:
            self._park(parked)

    def hang(self, seconds: float) -> None:
        """Have the thread that runs stand still, while its process and all others go on."""
        process = self.current
        if process is None or not process.in_thread:
            return
        process.in_thread = False
        parked = _Parked()
        self.later(seconds, self._go_on, process, parked)
        self._park(parked)
        process.in_thread = True

    def _go_on(self, process: Process, parked: _Parked) -> _Parked | None:
        if process.stalled:
            self.later(THREAD_TIME, self._go_on, process, parked)
        if process.stalled or not process.alive:
            return None
        self.current = process
        self._parked.remove(parked)
        return parked

    def _resume(self, process: Process, parked: _Parked | None) -> _Parked | None:
        process.stalled = False
        deferred, process.deferred = process.deferred, []
        for event in deferred:
            event.when = self.now
            heapq.heappush(self._queue, event)
        if parked is not None and process.alive:
            self.current = process
            self._parked.remove(parked)
            return parked
        return None

    def _park(self, parked: _Parked) -> None:
        loop, current = events._get_running_loop(), self.current
        self._parked.append(parked)
        self.current = None
        threading.Thread(target=self._schedule, daemon=True).start()
        parked.go.acquire()
        if self._over:
            raise Killed
        events._set_running_loop(loop)
        self.current = current
