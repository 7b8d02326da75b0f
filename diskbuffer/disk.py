# SPDX-License-Identifier: Apache-2.0
"""The changes of a guest's disk, on the host where the guest runs.

::

    begin(): mark what differs, open the stream      the server writes changes down from now on
    sync(): have what differs copied                 until synced
    position(): where the epoch ends                 while the guest is paused
    read(position): the epoch's records              while it runs on
    applied(position): the standby has them          bits may be cleared
    teardown()                                       the guest goes on; its changes are marked
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from diskbuffer import bitmap, metadata, stream
from diskbuffer.bitmap import Bitmap, Run
from diskbuffer.control import Control
from diskbuffer.errors import BitmapError, DiskError, MetadataError, ServerError, StreamLost
from diskbuffer.metadata import Fitness, Metadata, Role
from diskbuffer.status import Figures, Flag, StatusPage

BATCH_BYTES: Final = 2 << 20
"""Records are read in batches of about so many bytes; at most this and one record more."""

_MERGE_RUNS: Final = 200  # a line of the control socket has 8192 bytes


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the copying of what differs is, in bytes, rounded up to chunks.

    :ivar total: bytes that this session had or has to copy
    :ivar left: of these, bytes not yet in the stream
    """

    total: int
    left: int


class DiskBuffer:
    """One disk.  For one event loop; calls of one object one at a time, but for :meth:`position`.

    :param folder: the run folder of the disk's server, e.g. ``/run/kemari/disks/3-51712``
    :param news: called in the event loop with ``full``, ``synced``, or ``lost`` or ``ended`` and a
        sentence: changes are not written down any more, or the server is gone
    :param step: is told "marked" when all is marked as differing, "recorded" when the pair is on
        disk, "merged" when what the other host knows is, "streaming" when the stream is open
    :ivar size: of the disk, bytes; known after :meth:`open`
    :ivar taken: bytes of the stream that :meth:`read` has given out
    """

    def __init__(
        self,
        folder: Path,
        news: Callable[[str, str], None] | None = None,
        step: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = folder
        self.size = 0
        self.taken = 0
        self.target = ""
        self._news = news or (lambda event, text: None)
        self._step = step or (lambda step: None)
        self._control: Control | None = None
        self._page: StatusPage | None = None
        self._socket: socket.socket | None = None
        self._session = 0
        self._rest = bytearray()
        self._bitmap: Bitmap | None = None
        self._why = ""

    @property
    def pair(self) -> str:
        """The pair whose differences are known; "" if everything has to be copied."""
        return self._bitmap.pair if self._bitmap is not None else ""

    # ---- Setting up ----

    async def open(self) -> None:
        """Reach the server, and see whether its bitmap can be believed.

        :raise ServerError: there is none, it is of another version, or its queue is too long
        """
        try:
            self._page = await asyncio.to_thread(StatusPage, self.folder / "status")
            self._control = await Control.connect(self.folder / "control", self._heard)
            self.size, flags = await self._control.hello()
            if self.figures().limit > stream.QUEUE_BYTES:
                raise ServerError(
                    f"The disk's server has a queue of {self.figures().limit} bytes, expected at "
                    f"most {stream.QUEUE_BYTES}: more may be in one epoch than a replica takes"
                )
            self._bitmap = await asyncio.to_thread(self._believable)
            if self._bitmap is not None and not flags & Flag.TRACKING:
                self._bitmap, self._why = None, "The disk's server did not mark what changed"
        except BaseException:
            await self.teardown()
            raise

    def _believable(self) -> Bitmap | None:
        """The bitmap, if it and what is known of the disk fit each other; else :attr:`why`."""
        try:
            self.target = (self._state / "target").read_text().strip()
            known = metadata.load(self._state / "state.json")
            found = bitmap.load(self._state / "bitmap", self.size)
        except (BitmapError, MetadataError, OSError) as error:
            self._why = str(error)
            return None
        if known is None or found is None or known.pair != found.pair:
            self._why = "This disk was not copied before"
            return None
        return found

    @property
    def why(self) -> str:
        """Why everything has to be copied; "" if it has not."""
        return "" if self._bitmap is not None else self._why

    @property
    def _state(self) -> Path:
        return self.folder / "state"

    async def begin(
        self,
        *,
        pair: str,
        peer: str,
        generation: int,
        differing: Iterable[Run] | None,
        guest: str = "",
    ) -> None:
        """Open the stream: every change from now on is in it.

        :param pair: that of the two copies from now on
        :param peer: UUID of the other host
        :param differing: what the other host knows to differ; None: everything has to be copied
        :param guest: UUID of the guest whose disk it is
        :raise DiskError: it cannot; nothing is written down
        """
        control = self._controlled()
        if differing is None:
            fresh = Bitmap(self.size, pair, peer, generation)
            fresh.fill()
            await asyncio.to_thread(fresh.save, self._state / "bitmap")
            self._bitmap = fresh
            self._step("marked")
        elif self._bitmap is None or self._bitmap.pair != pair:
            raise BitmapError("Only a pair whose differences are known can be brought up to date")
        known = Metadata(
            Role.DISK, Fitness.CONSISTENT, self.size, pair, peer, generation, guest=guest
        )
        await asyncio.to_thread(known.save, self._state / "state.json")
        self._step("recorded")
        await control.ask("load")
        runs = list(differing or ())
        for start in range(0, len(runs), _MERGE_RUNS):
            words = (f"{first}+{count}" for first, count in runs[start : start + _MERGE_RUNS])
            await control.ask(f"merge {' '.join(words)}")
        self._step("merged")
        await self._open_stream()
        self._step("streaming")

    async def _open_stream(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket = sock
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(sock, os.fspath(self.folder / "control"))
            await loop.sock_sendall(sock, b"stream\n")
            line = bytearray()
            while not line.endswith(b"\n"):  # byte by byte: the stream begins behind it
                byte = await loop.sock_recv(sock, 1)
                if not byte:
                    raise ServerError("The disk's server closed the connection")
                line += byte
        except OSError as error:
            raise ServerError(f"The disk's server is gone: {error.strerror}") from None
        word, _, rest = line.decode(errors="replace").strip().partition(" ")
        if word != "ok":
            raise ServerError(f"The disk's server opens no stream: {rest}")
        self._session = int(rest)
        self.taken = 0
        self._rest.clear()

    # ---- Copying what differs ----

    async def sync(self, rate: int = 0) -> None:
        """Have what differs copied, in the stream; may be called again with another rate.

        :param rate: bytes per second at most; 0 for no limit
        :raise ServerError: there is no stream
        """
        await self._controlled().ask(f"sync {rate}")

    def progress(self) -> Progress:
        """How far that is."""
        figures = self.figures()
        shift = self._bitmap.shift if self._bitmap is not None else bitmap.SHIFT
        return Progress(figures.sync_total << shift, figures.sync_left << shift)

    # ---- Epochs ----

    def position(self) -> int:
        """Where the stream ends now; everything that was answered before is in front of it.

        No system call.  May be called from any thread.

        :raise StreamLost: changes are not written down any more
        """
        position = self._page.position(self._session) if self._page is not None else None
        if position is None or not self._session:
            raise StreamLost(self._why or f"Changes of {self.target} are not written down")
        return position

    async def read(self, upto: int) -> AsyncIterator[bytes]:
        """Batches of whole records from where the last call ended to ``upto``.

        :param upto: as :meth:`position` told
        :raise StreamLost: the stream ended before that
        """
        sock = self._socket
        if sock is None:
            raise StreamLost(self._why or f"There is no stream of {self.target}")
        loop = asyncio.get_running_loop()
        while self.taken < upto:
            have = len(self._rest)
            wanted = min(upto - self.taken - have, BATCH_BYTES)
            self._rest += bytes(wanted)
            with memoryview(self._rest) as view:
                while have < len(view):
                    try:
                        got = await loop.sock_recv_into(sock, view[have:])
                    except OSError as error:
                        raise StreamLost(f"The disk's server is gone: {error.strerror}") from None
                    if not got:
                        raise StreamLost(self._why or "The disk's server ended the stream")
                    have += got
            end = stream.whole(self._rest)
            if end == 0 and self.taken + have >= upto:
                raise DiskError(f"The stream of {self.target} has no record that ends at {upto}")
            if end:
                batch = bytes(memoryview(self._rest)[:end])
                del self._rest[:end]
                self.taken += end
                yield batch

    async def applied(self, position: int) -> None:
        """The standby has the stream up to there on stable storage.

        :raise ServerError: the position is not one of this stream
        """
        await self._controlled().ask(f"applied {self._session} {position}")

    def figures(self) -> Figures:
        """All figures of the server.

        :raise ServerError: it is not open
        """
        if self._page is None:
            raise ServerError("The disk's server was not reached")
        return self._page.figures()

    async def teardown(self) -> None:
        """End the stream; changes are only marked from then on (idempotent)."""
        self._session = 0
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._control is not None:
            control, self._control = self._control, None
            await control.close()
        if self._page is not None:
            page, self._page = self._page, None
            page.close()

    def _controlled(self) -> Control:
        if self._control is None:
            raise ServerError("The disk's server was not reached")
        return self._control

    def _heard(self, line: str) -> None:
        event, _, text = line.partition(" ")
        if event == "closed":
            event, text = "ended", f"The server of {self.target or self.folder} has ended"
        if event in ("lost", "ended"):
            self._why = text
        self._news(event, text)
