# SPDX-License-Identifier: Apache-2.0
"""Making connections: TCP, TLS if wanted, and the greeting."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from checkpoint import hello as greeting
from checkpoint.errors import CheckpointError, ProtocolError
from checkpoint.hello import Hello
from checkpoint.link import Link, LinkError, LinkOptions, PeerSilent, format_address, link_error
from checkpoint.wire import VERSIONS, FrameType

_log = logging.getLogger(__name__)

PLAIN = LinkOptions()
"""TCP without TLS, default times."""

Accepted = Callable[[Link], Awaitable[None]]


async def connect(
    host: str,
    port: int,
    hello: Hello,
    options: LinkOptions = PLAIN,
    *,
    local: str | None = None,
) -> Link:
    """Connect and greet.

    :param local: address of this host to connect from, or None
    :raise LinkError: :class:`~checkpoint.link.PeerClosed` when the host is there but refuses,
        :class:`~checkpoint.link.PeerSilent` when nothing answers in time
    :raise PeerRefused: the other end wants no connection with this one
    :raise ProtocolError: the other end does not speak the protocol
    """
    loop = asyncio.get_running_loop()
    link = Link(hello, options, connector=True)
    address = format_address((host, port))
    try:
        async with asyncio.timeout(options.connect_timeout):
            await loop.create_connection(
                lambda: link,
                host,
                port,
                ssl=options.ssl,
                server_hostname=options.server_hostname if options.ssl else None,
                local_addr=(local, 0) if local else None,
            )
            await link.send(FrameType.HELLO, hello.pack() | {"versions": list(VERSIONS)})
            _, fields = await link.expect(FrameType.HELLO_ACK)
            link.greet(greeting.check_answer(hello, fields))
    except TimeoutError as error:
        await link.close()
        limit = options.connect_timeout
        raise PeerSilent(f"{address} did not answer within {limit:g} s") from error
    except OSError as error:
        await link.close()
        raise link_error(error, address) from error
    except ProtocolError as error:
        link.end(error, "protocol")
        await link.close()
        raise
    except BaseException:
        link.end(None)
        raise
    return link


class Listener:
    """Accepts connections and hands over each that was greeted.

    :ivar ports: the port of each address, in the order given to :func:`listen`
    """

    def __init__(self, hello: Hello, accepted: Accepted, options: LinkOptions) -> None:
        self.ports: list[int] = []
        self._hello = hello
        self._accepted = accepted
        self._options = options
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, addresses: Iterable[tuple[str, int]]) -> None:
        """Begin to listen; see :func:`listen`."""
        loop = asyncio.get_running_loop()
        for host, port in addresses:
            try:
                server = await loop.create_server(
                    self._make_link, host, port, ssl=self._options.ssl, reuse_address=True
                )
            except OSError as error:
                await self.close()
                address = format_address((host, port))
                raise LinkError(f"cannot listen on {address}: {error.strerror}") from error
            self._servers.append(server)
            self.ports.append(server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening, and end the tasks of connections that are not over (idempotent)."""
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _make_link(self) -> Link:
        return _AcceptedLink(self._hello, self._options, self._start)

    def _start(self, link: Link) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, link: Link) -> None:
        try:
            if await self._greet(link):
                await self._accepted(link)
        finally:
            link.end(None)

    async def _greet(self, link: Link) -> bool:
        try:
            async with asyncio.timeout(self._options.connect_timeout):
                _, fields = await link.expect(FrameType.HELLO)
                peer = greeting.unpack(fields)
                version = greeting.common_version(fields.integers("versions"))
                if version is None:
                    own = ", ".join(map(str, VERSIONS))
                    raise _NoVersion(f"this end speaks version {own} of the protocol")
                link.greet(peer)
                answer = replace(self._hello, role=peer.role).pack() | {"version": version}
                await link.send(FrameType.HELLO_ACK, answer)
        except TimeoutError:
            link.end(LinkError(f"{link.peer_address} did not greet"), "protocol")
        except _NoVersion as error:
            link.end(error, "version")
        except ProtocolError as error:
            link.end(error, "protocol")
        except CheckpointError as error:
            link.end(error)
        if link.closed:
            _log.info("connection from %s was not greeted: %s", link.peer_address, link.failure)
        return not link.closed


class _NoVersion(ProtocolError):
    """Both ends speak the protocol, in no common version."""


class _AcceptedLink(Link):
    """A link that says when it is connected."""

    def __init__(self, hello: Hello, options: LinkOptions, start: Callable[[Link], None]) -> None:
        super().__init__(hello, options, connector=False)
        self._start = start

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._start(self)


async def listen(
    addresses: Iterable[tuple[str, int]],
    hello: Hello,
    accepted: Accepted,
    options: LinkOptions = PLAIN,
) -> Listener:
    """Listen on every address (port 0: any free one).

    ``accepted(link)`` runs as a task for each greeted connection; ``link.peer.role`` says what it
    is for.  When it returns the connection is closed.

    :param hello: the role in it has no meaning
    :raise LinkError: an address cannot be listened on; then none is
    """
    listener = Listener(hello, accepted, options)
    await listener.open(addresses)
    return listener
