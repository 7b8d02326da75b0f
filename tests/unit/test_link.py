# SPDX-License-Identifier: Apache-2.0
"""Connections: greeting, limits, and telling apart how they end."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import time

import pytest

from checkpoint.errors import CheckpointError, ProtocolError
from checkpoint.link import (
    MAX_QUEUED,
    Link,
    LinkError,
    LinkOptions,
    PeerClosed,
    PeerRefused,
    PeerSilent,
    format_address,
    link_error,
)
from checkpoint.network import connect, listen
from checkpoint.wire import FrameType, encode_json
from tests.unit.link_ends import (
    HELLO,
    HELLO_ACK,
    Streams,
    answer,
    frame,
    raw_client,
    raw_server,
    run,
)
from tests.unit.session_ends import hello, links

# ---- Greeting ----


def test_both_ends_know_each_other() -> None:
    async def scenario() -> None:
        async with links(role="liveness") as (near, far):
            assert near.peer == hello("b", "liveness")
            assert far.peer == hello("a", "liveness")
            assert near.greeted
            assert far.peer_address.startswith("127.0.0.1:")

    run(scenario)


def test_a_connection_that_was_reset_as_it_was_made_has_no_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As to a daemon that was just killed: asyncio then knows no ``peername``."""

    def unknown(_: socket.socket) -> None:
        raise OSError(errno.ENOTCONN, "not connected")

    async def scenario() -> None:
        async with raw_server(hang_up) as port:
            monkeypatch.setattr(socket.socket, "getpeername", unknown)
            with pytest.raises(PeerClosed, match="a peer that left at once"):
                await connect("127.0.0.1", port, hello("a", "liveness"))

    async def hang_up(streams: Streams) -> None:
        streams[1].close()

    run(scenario)


def test_no_common_version_is_refused_with_the_versions_there_are() -> None:
    async def scenario() -> None:
        async with raw_client() as (streams, greeted):
            streams[1].write(frame(FrameType.HELLO, HELLO | {"versions": [2, 99]}))
            refusal = await answer(streams)
            assert refusal["type"] == "ERROR"
            assert refusal["code"] == "version"
            assert "version 1" in refusal["message"]
            assert not greeted.done()

    run(scenario)


@pytest.mark.parametrize(
    "first",
    [
        frame(FrameType.HEARTBEAT),
        frame(FrameType.STOP, {"reason": ""}),
        frame(FrameType.HELLO_ACK, HELLO_ACK),
        frame(FrameType.HELLO, {}),
        frame(FrameType.HELLO, HELLO | {"role": "boss"}),
        frame(FrameType.HELLO, HELLO | {"heartbeat_ms": 0}),
        frame(FrameType.HELLO, HELLO | {"versions": "1"}),
        b"GET / HTTP/1.1\r\nHost: b\r\n\r\n",
        frame(FrameType.HELLO, HELLO) + frame(FrameType.STOP, {"reason": ""}),
        b"",
    ],
    ids=[
        "heartbeat",
        "stop",
        "answer",
        "empty",
        "role",
        "never",
        "versions",
        "http",
        "hasty",
        "mute",
    ],
)
def test_a_client_that_does_not_greet_properly_is_told(first: bytes) -> None:
    async def scenario() -> None:
        async with raw_client() as (streams, greeted):
            streams[1].write(first)
            refusal = await answer(streams)
            assert (refusal["type"], refusal["code"]) == ("ERROR", "protocol")
            assert not greeted.done()

    run(scenario)


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (frame(FrameType.HELLO_ACK, HELLO_ACK | {"version": 9}), ProtocolError, "version 9"),
        (frame(FrameType.HELLO_ACK, HELLO_ACK | {"role": "liveness"}), ProtocolError, "role"),
        (frame(FrameType.HELLO, HELLO), ProtocolError, "HELLO came"),
        (frame(FrameType.ERROR, {"code": "version", "message": "no"}), PeerRefused, "^no$"),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", ProtocolError, "begins with b'SSH-'"),
        (b"", PeerClosed, "closed the connection"),
    ],
)
def test_a_server_that_does_not_greet_properly(
    reply: bytes, error: type[CheckpointError], message: str
) -> None:
    async def scenario() -> None:
        async def talk(streams: Streams) -> None:
            await streams[0].read(1000)
            streams[1].write(reply)

        async with raw_server(talk) as port:
            with pytest.raises(error, match=message):
                await connect("127.0.0.1", port, hello("a"))

    run(scenario)


def test_heartbeats_right_behind_the_greeting_are_welcome() -> None:
    async def scenario() -> None:
        async def talk(streams: Streams) -> None:
            await streams[0].read(1000)
            streams[1].write(frame(FrameType.HELLO_ACK, HELLO_ACK) + frame(FrameType.HEARTBEAT))
            await streams[0].read()

        async with raw_server(talk) as port:
            link = await connect("127.0.0.1", port, hello("a"))
            assert not link.closed
            await link.close()

    run(scenario)


def test_a_server_that_says_nothing_is_silent() -> None:
    async def scenario() -> None:
        async def talk(streams: Streams) -> None:
            await streams[0].read()

        async with raw_server(talk) as port:
            options = LinkOptions(connect_timeout=0.2)
            with pytest.raises(PeerSilent, match=r"did not answer within 0\.2 s"):
                await connect("127.0.0.1", port, hello("a"), options)

    run(scenario)


def test_a_host_that_refuses_is_alive() -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        with pytest.raises(PeerClosed, match="refused"):
            await connect("127.0.0.1", port, hello("a"))

    run(scenario)


def test_an_address_that_cannot_be_listened_on_is_named() -> None:
    async def scenario() -> None:
        async def accepted(link: Link) -> None:
            raise AssertionError

        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with pytest.raises(LinkError, match=f"cannot listen on 127.0.0.1:{port}"):
                await listen([("127.0.0.1", 0), ("127.0.0.1", port)], hello("b"), accepted)

    run(scenario)


# ---- Ends ----


def test_end_of_file_means_that_the_host_lives() -> None:
    async def scenario() -> None:
        async with links() as (near, far):
            await far.close()
            assert isinstance(await near.wait_closed(), PeerClosed)
            with pytest.raises(PeerClosed):
                await near.receive()
            with pytest.raises(PeerClosed):
                near.put(FrameType.HEARTBEAT)
            assert await far.wait_closed() is None
            with pytest.raises(LinkError, match="is closed"):
                await far.receive()

    run(scenario)


def test_a_reset_means_that_the_host_lives() -> None:
    async def scenario() -> None:
        async with raw_client() as (streams, greeted):
            streams[1].write(frame(FrameType.HELLO, HELLO))
            link = await greeted
            sock = streams[1].get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            streams[1].transport.abort()
            assert isinstance(await link.wait_closed(), PeerClosed)

    run(scenario)


def test_an_end_within_a_frame_is_said() -> None:
    async def scenario() -> None:
        async with raw_client() as (streams, greeted):
            streams[1].write(frame(FrameType.HELLO, HELLO))
            link = await greeted
            streams[1].write(frame(FrameType.STOP, {"reason": "x"})[:-1])
            streams[1].write_eof()
            assert "in the middle of a frame" in str(await link.wait_closed())

    run(scenario)


def test_frames_before_the_end_are_delivered() -> None:
    async def scenario() -> None:
        async with links() as (near, far):
            for number in range(3):
                near.put(FrameType.STOP, encode_json({"reason": str(number)}))
            await near.flush()
            await near.close()
            await far.wait_closed()
            for _ in range(3):
                assert (await far.receive()).type is FrameType.STOP
            with pytest.raises(PeerClosed):
                await far.receive()

    run(scenario)


def test_an_error_frame_ends_both() -> None:
    async def scenario() -> None:
        async with links() as (near, far):
            await near.fail("internal", "the disk is full")
            failure = await far.wait_closed()
            assert isinstance(failure, PeerRefused)
            assert (failure.code, str(failure)) == ("internal", "the disk is full")
            assert near.closed

    run(scenario)


def test_the_first_failure_is_kept() -> None:
    async def scenario() -> None:
        async with links() as (near, _):
            near.end(PeerSilent("first"))
            near.end(ProtocolError("second"), "protocol")
            assert str(await near.wait_closed()) == "first"
            with pytest.raises(PeerSilent, match="first"):
                await near.flush()

    run(scenario)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ETIMEDOUT, PeerSilent),
        (errno.EHOSTUNREACH, PeerSilent),
        (errno.ENETUNREACH, PeerSilent),
        (errno.ENETDOWN, PeerSilent),
        (errno.ECONNRESET, PeerClosed),
        (errno.EPIPE, PeerClosed),
        (errno.ECONNREFUSED, PeerClosed),
        (errno.EADDRNOTAVAIL, LinkError),
    ],
)
def test_what_an_error_number_says_of_the_peer(number: int, kind: type[LinkError]) -> None:
    error = link_error(OSError(number, "why"), "h:1")
    assert type(error) is kind
    assert str(error) == f"connection with h:1: {os.strerror(number)}"


def test_the_resolver_says_nothing_of_the_peer() -> None:
    error = link_error(socket.gaierror(-2, "Name or service not known"), "h:1")
    assert type(error) is LinkError


def test_bytes_against_the_protocol_are_answered_with_an_error() -> None:
    async def scenario() -> None:
        async with raw_client() as (streams, greeted):
            streams[1].write(frame(FrameType.HELLO, HELLO))
            link = await greeted
            assert (await answer(streams))["type"] == "HELLO_ACK"
            streams[1].write(b"\0" * 24)
            assert (await answer(streams))["code"] == "protocol"
            assert isinstance(await link.wait_closed(), ProtocolError)

    run(scenario)


def test_closing_does_not_wait_for_a_peer_that_takes_nothing() -> None:
    async def scenario() -> None:
        async with raw_client() as (streams, greeted):
            streams[1].write(frame(FrameType.HELLO, HELLO))
            link = await greeted
            for _ in range(100):
                # Never read at the other end; far beyond what sockets hold.
                link.put(FrameType.ERROR, encode_json({"code": "", "message": "x" * 900_000}))
            begin = time.monotonic()
            await link.close()
            assert time.monotonic() - begin < 10

    run(scenario)


# ---- Limits ----


def test_reading_stops_when_nobody_takes_the_frames_and_that_is_no_silence() -> None:
    async def scenario() -> None:
        payload = bytes(1 << 20)
        async with links() as (near, far):

            async def flood() -> None:
                for _ in range(64):
                    near.put(FrameType.PAGES, payload, epoch=1)
                    await near.flush()

            flooding = asyncio.create_task(flood())
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(flooding), 2)
            queued = sum(found.size for found in far._frames)
            assert MAX_QUEUED < queued < MAX_QUEUED + (2 << 20)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(far.wait_silent(0.1), 0.5)
            for _ in range(64):
                assert len((await far.receive()).payload) == 1 << 20
            await flooding

    run(scenario)


# ---- Addresses ----


def test_addresses_are_written_so_that_they_can_be_read_back() -> None:
    assert format_address(("10.0.0.1", 7)) == "10.0.0.1:7"
    assert format_address(("fd00::1", 7)) == "[fd00::1]:7"
