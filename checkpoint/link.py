# SPDX-License-Identifier: Apache-2.0
"""One connection of the replication protocol: frames, heartbeats, and how it ended.

A :class:`Link` comes greeted from :mod:`checkpoint.network` and beats by itself until it ends.  It
has no opinion on what a silence or an end means for a guest; it only tells them apart:

- :class:`PeerClosed`: the peer's kernel said that the connection is over, so its host lives;
- :class:`PeerSilent`: our kernel gave up, nobody answers;
- :class:`PeerRefused`: the peer ended it with ERROR;
- :class:`~checkpoint.errors.ProtocolError`: the peer broke the protocol, and was told so;
- silence (:meth:`Link.wait_silent`): nothing was heard for a while on a connection still open.

The first failure is kept as :attr:`Link.failure`, and is what every later call raises.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from checkpoint.errors import CheckpointError, ProtocolError
from checkpoint.faultpoints import GOT, PUT, reach
from checkpoint.fields import Fields
from checkpoint.hello import Hello
from checkpoint.turns import next_turn, sleep_until
from checkpoint.wire import (
    SPECS,
    Buffer,
    Frame,
    FrameType,
    Parser,
    decode_json,
    encode_frame,
    encode_json,
)

BEATS = 5
"""Heartbeats in the peer's time limit; the protocol asks for at least four."""

RECENT = 0.2
"""Share of the time between two beats for which what was sent replaces a beat: no pause is longer
than 1.2 times that time, so that at least four signs of life fit into the limit."""

MAX_QUEUED = 16 << 20
"""Bytes of payload received and not yet asked for, after which reading stops."""

CLOSING_TIME = 2.0
"""Seconds that a closing connection has to get rid of what was written."""

_SMALL = 1 << 16
_THIN_LINEAR_TIMEOUTS = 16  # linux/tcp.h: a lost heartbeat is repeated without growing pauses
_SILENT_ERRORS = {
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.ENETDOWN,
}


class LinkError(CheckpointError):
    """A connection could not be made, or ended."""


class PeerClosed(LinkError):
    """The peer's process is gone or closed the connection; its host is alive."""


class PeerSilent(LinkError):
    """The kernel got no answer from the peer's host any more."""


class PeerRefused(LinkError):
    """The peer ended the connection with ERROR.

    :ivar code: the error's code in docs/protocol.md
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


def link_error(error: OSError, address: str) -> LinkError:
    """What an error of the socket says of the peer."""
    reason = str(error) or type(error).__name__
    # A resolver's or TLS error has a number of its own kind there.
    if error.errno and error.errno in errno.errorcode and not isinstance(error, ssl.SSLError):
        reason = os.strerror(error.errno)
    message = f"connection with {address}: {reason}"
    if isinstance(error, TimeoutError) or error.errno in _SILENT_ERRORS:
        return PeerSilent(message)
    if isinstance(error, ConnectionError | ssl.SSLError):
        return PeerClosed(message)
    return LinkError(message)


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """How to connect.

    :ivar ssl: context for TLS, or None for plain TCP
    :ivar server_hostname: name that the certificate of a server must carry; None: the host's
    :ivar connect_timeout: seconds for TCP, TLS and greeting together
    :ivar user_timeout: seconds after which the kernel gives up on unacknowledged bytes
    """

    ssl: ssl.SSLContext | None = None
    server_hostname: str | None = None
    connect_timeout: float = 5.0
    user_timeout: float = 30.0


UNORDERED = frozenset({FrameType.APPLIED})
"""Types of frames that say nothing of what came before or comes after them."""

FrameHandler = Callable[[Frame], bool]
"""Takes a frame and says whether it has handled it; see :meth:`Link.divert`."""


class Link(asyncio.BufferedProtocol):
    """One end of one connection.  Made by :mod:`checkpoint.network`; all methods in one loop.

    :ivar hello: what this end says of itself
    :ivar peer: what the other end says of itself; set once greeted
    :ivar peer_address: "address:port"
    :ivar failure: why the connection ended; None while it lives or when this end closed it
    :ivar connector: whether this end connected
    """

    peer: Hello

    def __init__(self, hello: Hello, options: LinkOptions, *, connector: bool) -> None:
        self.hello = hello
        self.peer_address = "nobody"
        self.failure: CheckpointError | None = None
        self.connector = connector
        self._options = options
        self._letters = frozenset("AS" if connector else "CP")
        self._hello_came = False
        #: what may come now, but for ERROR and the greeting
        self._welcome: frozenset[FrameType] = frozenset()
        self._transport: asyncio.Transport | None = None
        self._parser = Parser()
        self._frames: deque[Frame] = deque()
        self._handler: FrameHandler | None = None
        self._thrown: CheckpointError | None = None
        self._queued = 0
        self._deaf = False
        self._heard = time.monotonic()
        self._arrived = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._ended = asyncio.Event()
        self._lost = asyncio.Event()
        self._wrote = 0.0
        self._pending: list[Buffer] = []
        self._pending_size = 0
        self._beats: asyncio.Task[None] | None = None

    # ---- State ----

    @property
    def closed(self) -> bool:
        """Whether the connection has ended, by either side."""
        return self._ended.is_set()

    @property
    def greeted(self) -> bool:
        """Whether both ends know each other."""
        return hasattr(self, "peer")

    @property
    def last_heard(self) -> float:
        """When the last byte came, in seconds of ``time.monotonic()``."""
        return time.monotonic() if self._deaf and not self.closed else self._heard

    def error(self) -> CheckpointError:
        """The failure, or the fact that this end closed the connection."""
        return self.failure or LinkError(f"the connection with {self.peer_address} is closed")

    async def wait_closed(self) -> CheckpointError | None:
        """Wait for the end of the connection; the first failure, or None if this end closed it."""
        await self._ended.wait()
        return self.failure

    async def wait_silent(self, limit: float) -> float:
        """Wait until nothing was heard for ``limit`` seconds; how long it has been.

        Time in which this end did not listen is not counted: reading stopped to limit memory, or
        this process or host stood still (then the peer gets half the limit more to be heard).  A
        connection that ended otherwise than by :class:`PeerSilent` never becomes silent: wait for
        :meth:`wait_closed` as well.
        """
        stalled_until = 0.0
        while True:
            if self.closed and not isinstance(self.failure, PeerSilent):
                await asyncio.get_running_loop().create_future()
            since = max(self.last_heard, stalled_until - limit / 2)
            now = time.monotonic()
            if now - since >= limit:
                return now - self._heard
            # Bytes that wait in the kernel are read before a timer that is due runs.
            await asyncio.sleep(since + limit - now)
            now = time.monotonic()
            if now - (since + limit) > limit / 4:
                stalled_until = now

    # ---- Frames ----

    def put(
        self, frame_type: FrameType, payload: Buffer = b"", *, flags: int = 0, epoch: int = 0
    ) -> int:
        """Write a frame without waiting; small ones are collected until :meth:`flush`.

        :return: its crc32 field
        :raise CheckpointError: the connection has ended: its first failure
        """
        if self.closed:
            raise self.error()
        reach(PUT[frame_type])
        buffers, crc = encode_frame(frame_type, payload, flags=flags, epoch=epoch)
        self._pending += buffers
        self._pending_size += len(payload)
        if self._pending_size >= _SMALL:
            self._write()
        return crc

    def push(self) -> None:
        """Write what was put, without waiting: for what is small, and not followed by more."""
        self._write()

    async def flush(self) -> None:
        """Write what was put, and wait while too much of it is unsent.

        :raise CheckpointError: the connection has ended: its first failure
        """
        self._write()
        await self._writable.wait()
        if self.closed:
            raise self.error()

    async def send(
        self, frame_type: FrameType, value: dict[str, Any] | None = None, *, epoch: int = 0
    ) -> None:
        """Send a frame that is empty or carries JSON; raises as :meth:`flush`."""
        payload = b"" if value is None else encode_json(value)
        self.put(frame_type, payload, epoch=epoch)
        await self.flush()

    async def receive(self) -> Frame:
        """The next frame other than heartbeats, checked by its header; for one caller at a time.

        :raise CheckpointError: the connection has ended, and every frame before was delivered; or
            what the handler raised that frames are diverted to
        """
        while not self._frames:
            if self._thrown is not None or self.closed:
                raise self._thrown or self.error()
            self._arrived.clear()
            await self._arrived.wait()
        frame = self._frames.popleft()
        self._queued -= frame.size
        if self._deaf and self._queued < MAX_QUEUED // 2 and self._transport is not None:
            self._deaf = False
            self._heard = time.monotonic()
            if not self.closed:
                self._transport.resume_reading()
        return frame

    def divert(self, handler: FrameHandler | None) -> None:
        """Hand frames to ``handler`` in the very callback that received them, or no longer.

        It saves each frame a task's wake-up, which is most of the time that a small one takes.
        ``handler`` gets each frame that :meth:`receive` would return, unless one before it still
        waits there (of the types :data:`UNORDERED`, even then); one that it does not handle (False)
        goes there too.  A :class:`CheckpointError` that it raises is what :meth:`receive` raises
        next; then nothing is diverted any more.
        """
        self._handler = handler

    async def expect(self, *types: FrameType) -> tuple[Frame, Fields]:
        """The next frame, which must be one of ``types`` and carries JSON.

        :raise ProtocolError: it is another one; the peer is told and the connection ended
        :raise CheckpointError: as :meth:`receive`
        """
        frame = await self.receive()
        try:
            if frame.type not in types:
                names = " or ".join(wanted.name for wanted in types)
                raise ProtocolError(f"{frame.type.name} came, expected {names}")
            return frame, decode_json(frame)
        except ProtocolError as error:
            self.end(error, "protocol")
            raise

    # ---- End ----

    def end(self, failure: CheckpointError | None, code: str = "") -> None:
        """End the connection now; with ``code``, tell the peer why.  Only the first call counts."""
        if self.closed:
            return
        if code and self._transport is not None:
            self.put(FrameType.ERROR, encode_json({"code": code, "message": str(failure)[:1000]}))
            self._write()
        self.failure = failure
        self._ended.set()
        self._arrived.set()
        self._writable.set()
        self._pending.clear()
        if self._beats is not None:
            self._beats.cancel()
        if self._transport is None:
            self._lost.set()
        else:
            self._transport.close()

    async def fail(self, code: str, message: str) -> None:
        """Send ERROR and close."""
        self.end(LinkError(message), code)
        await self.close()

    async def close(self) -> None:
        """Close, and wait until the connection is gone (idempotent)."""
        self.end(None)
        try:
            async with asyncio.timeout(CLOSING_TIME):
                await self._lost.wait()
        except TimeoutError:
            # The peer takes nothing any more; what was written to it is lost.
            if self._transport is not None:
                self._transport.abort()
            await self._lost.wait()

    # ---- Machinery ----

    def greet(self, peer: Hello) -> None:
        """Both ends know each other: heartbeats begin."""
        self.peer = peer
        self._welcome = self._types(peer.role)
        self._beats = asyncio.get_running_loop().create_task(self._beat(peer.heartbeat / BEATS))

    async def _beat(self, interval: float) -> None:
        while not self.closed:
            # What is being sent is sign of life enough, also while it waits for room.
            now = time.monotonic()
            if now - self._wrote >= RECENT * interval and self._writable.is_set():
                self.put(FrameType.HEARTBEAT)
                self._write()
            await sleep_until(next_turn(now, interval))

    def _write(self) -> None:
        if not self._pending or self._transport is None or self.closed:
            return
        pending, self._pending = self._pending, []
        self._pending_size = 0
        self._wrote = time.monotonic()
        last = pending[-1]
        if len(last) < _SMALL:
            self._transport.write(b"".join(pending))
        else:
            self._transport.write(b"".join(pending[:-1]))
            self._transport.write(last)

    def _judge(self, frame: Frame) -> None:
        """Take a frame whose header and checksum are right.

        :raise ProtocolError: it must not come on this connection, or not now
        """
        reach(GOT[frame.type])
        if frame.type not in self._welcome:
            if frame.type is FrameType.ERROR:
                fields = decode_json(frame)
                self.end(PeerRefused(fields.text("code"), fields.text("message")))
                return
            self._judge_greeting(frame)
        elif frame.type is FrameType.HEARTBEAT:
            return
        if not self._divert(frame):
            self._frames.append(frame)
            self._queued += frame.size
            self._arrived.set()

    def _judge_greeting(self, frame: Frame) -> None:
        """:raise ProtocolError: it is not the greeting, or that has come already"""
        spec = SPECS[frame.type]
        greeting = frame.type in (FrameType.HELLO, FrameType.HELLO_ACK)
        if self._welcome and not greeting and self._letters.intersection(spec.sender):
            role = self.peer.role if self.greeted else self.hello.role
            raise ProtocolError(f"{frame.type.name} came on a {role} connection")
        if self._hello_came or not greeting or self._letters.isdisjoint(spec.sender):
            raise ProtocolError(f"{frame.type.name} came, which is not expected now")
        self._hello_came = True
        if self.connector:
            # Whoever accepted may go on at once; whoever connected waits for the answer.
            self._welcome = self._types(self.hello.role)

    def _types(self, role: str) -> frozenset[FrameType]:
        """What the peer may send on a connection of that role once it was greeted."""
        return frozenset(
            kind
            for kind, spec in SPECS.items()
            if kind not in (FrameType.HELLO, FrameType.HELLO_ACK, FrameType.ERROR)
            and role[0].upper() in spec.roles
            and self._letters.intersection(spec.sender)
        )

    def _divert(self, frame: Frame) -> bool:
        if self._thrown is not None:
            return True  # what comes after a failure is of no more use
        if self._handler is None or (self._frames and frame.type not in UNORDERED):
            return False
        try:
            return self._handler(frame)
        except CheckpointError as error:
            self._thrown = error
            self._arrived.set()
            return True

    # ---- Called by the transport ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=1 << 20)
        address = transport.get_extra_info("peername")
        # A connection that was reset before it was accepted has none; its end is told next.
        self.peer_address = format_address(address[:2]) if address else "a peer that left at once"
        self._heard = time.monotonic()
        set_socket_options(transport.get_extra_info("socket"), self._options.user_timeout)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._parser.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self._heard = time.monotonic()
        try:
            for frame in self._parser.filled(nbytes):
                if not self.closed:
                    self._judge(frame)
        except ProtocolError as error:
            self.end(error, "protocol")
        if self._queued > MAX_QUEUED and not self._deaf and self._transport is not None:
            self._deaf = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        where = " in the middle of a frame" if self._parser.midway else ""
        self._heard = time.monotonic()
        self.end(PeerClosed(f"{self.peer_address} closed the connection{where}"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None:
            self.end(PeerClosed(f"{self.peer_address} closed the connection"))
        elif isinstance(exc, OSError):
            self.end(link_error(exc, self.peer_address))
        else:
            self.end(LinkError(f"the connection with {self.peer_address} failed: {exc}"))
        self._lost.set()

    def pause_writing(self) -> None:
        if not self.closed:
            self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()


def format_address(address: Iterable[Any]) -> str:
    """ "address:port", with brackets for IPv6."""
    host, port = address
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def set_socket_options(sock: socket.socket, user_timeout: float) -> None:
    """Send at once, notice a dead host also when idle, retry lost heartbeats quickly."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    sock.setsockopt(socket.IPPROTO_TCP, _THIN_LINEAR_TIMEOUTS, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(user_timeout * 1000))
