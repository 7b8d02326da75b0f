# SPDX-License-Identifier: Apache-2.0
"""What all protections of a host share: configuration, drivers, records, and how to dial."""

from __future__ import annotations

import asyncio
import ssl
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from checkpoint.driver import Hypervisor
from checkpoint.errors import CheckpointError
from checkpoint.hello import Hello
from checkpoint.link import Link, LinkOptions, PeerClosed
from checkpoint.network import connect
from diskbuffer import durable
from kemari import __version__
from kemari.config import Address, Config, Tls
from kemari.errors import ConfigError, KemariError, PeerUnreachable
from kemari.journal import Journal
from kemari.ledger import Ledger, Record
from kemari.output import Network
from kemari.pulses import Pulses

#: As :func:`checkpoint.network.connect`.
Dial = Callable[[str, int, Hello, LinkOptions], Awaitable[Link]]

ResultT = TypeVar("ResultT")

WILDCARDS = frozenset({"0.0.0.0", "::"})


@dataclass(slots=True)
class Host:
    """The host that this daemon runs on.

    :ivar host_id: UUID that stays the same for the life of the installation
    :ivar dial: opens connections; tests put their own network in its place
    :ivar locate: where the target of a disk is on this host: at the same path as on the other
        one, but in tests, whose hosts share a file system
    :ivar advertised: addresses at which peers can reach this daemon, best first
    :ivar pulses: with other hosts; None in tests of what heartbeats alone can tell
    """

    config: Config
    hypervisor: Hypervisor
    network: Network
    ledger: Ledger
    journal: Journal
    host_id: str
    dial: Dial = connect
    locate: Callable[[str], Path] = Path
    advertised: tuple[str, ...] = ()
    ssl_client: ssl.SSLContext | None = None
    pulses: Pulses | None = None
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def hello(self, role: str) -> Hello:
        """What this end says of itself on a new connection."""
        return Hello(
            role=role,
            host=self.config.host,
            host_id=self.host_id,
            heartbeat=self.config.heartbeat,
            addresses=self.advertised,
            software=f"kemari {__version__}",
            pulse_key=self.pulses.key if self.pulses else "",
        )

    def greeted(self, link: Link) -> None:
        """Take note of what the peer of a new connection has said of itself."""
        if self.pulses:
            self.pulses.learn(link.peer.host_id, link.peer.pulse_key)

    async def connect(self, address: Address, role: str, timeout: float = 5.0) -> Link:
        """Connect to a peer.

        :raise LinkError: it cannot be reached (see the classes in :mod:`checkpoint.link`)
        """
        options = LinkOptions(ssl=self.ssl_client, connect_timeout=timeout)
        link = await self.dial(address.host, address.port, self.hello(role), options)
        self.greeted(link)
        return link

    async def connect_any(self, addresses: tuple[Address, ...], role: str) -> tuple[Link, Address]:
        """Connect to the first of ``addresses`` that answers.

        :raise PeerUnreachable: none does
        """
        reasons = []
        for address in addresses:
            try:
                return await self.connect(address, role), address
            except CheckpointError as error:
                reasons.append(f"{address}: {error}")
        raise PeerUnreachable(f"No kemarid answers ({'; '.join(reasons)}); expected one")

    async def runs(self, record: Record) -> bool:
        """Whether the guest of a record lives here; another one of its name does not count."""
        uuid = await asyncio.to_thread(self.hypervisor.domain_uuid, record.guest)
        return uuid == record.uuid

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run ``work`` as a task that is kept until it ends; see :func:`reap`."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def spawn_quiet(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """As :meth:`spawn`, for work whose errors are told to whoever asked for it."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it was said where it was raised

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self.journal.note(
                "", "fault", f"{task.get_name()} ended by a fault of this program: {error!r}"
            )
            loop = task.get_loop()
            loop.call_exception_handler(
                {"message": f"{task.get_name()} failed", "exception": error, "task": task}
            )


def load_host_id(path: Path) -> str:
    """The host's lasting UUID, made at the first call.

    :raise KemariError: the file cannot be read or written, or holds something else
    """
    try:
        if path.exists():
            return str(uuid.UUID(path.read_text().strip()))
        host_id = str(uuid.uuid4())
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable.replace(path, [f"{host_id}\n".encode()])
    except OSError as error:
        raise KemariError(f"{path} cannot be used: {error.strerror}") from error
    except ValueError as error:
        raise KemariError(f"{path} does not hold a UUID") from error
    return host_id


def tls_contexts(tls: Tls | None) -> tuple[ssl.SSLContext | None, ssl.SSLContext | None]:
    """(server, client) contexts for mutual TLS; (None, None) without.

    Both ends must show a certificate of the configured authority.  Host names are not compared:
    peers are known by addresses, and any host with such a certificate is trusted with any guest.

    :raise ConfigError: a file is missing or does not fit
    """
    if tls is None:
        return None, None
    contexts = []
    for purpose in (ssl.Purpose.CLIENT_AUTH, ssl.Purpose.SERVER_AUTH):
        context = ssl.create_default_context(purpose)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(cafile=tls.ca)
            context.load_cert_chain(tls.cert, tls.key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"tls: {tls.cert}, {tls.key}, {tls.ca}: {error}") from error
        contexts.append(context)
    return contexts[0], contexts[1]


def host_is_alive(error: CheckpointError) -> bool:
    """Whether this failure of a connection could only come from a living kernel over there."""
    return isinstance(error, PeerClosed)


async def in_thread(call: Callable[..., ResultT], *arguments: Any) -> ResultT:
    """Run a blocking call in a thread; a cancellation is only heard once the call has returned.

    So nobody uses an object while a call that was given up still works on it.
    """
    work = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        if not work.cancelled():
            work.exception()  # nobody is left who would want to know
        raise


async def first_of(*waits: Coroutine[Any, Any, Any]) -> None:
    """Return when the first of these is done; cancel the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
