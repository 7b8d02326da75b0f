# SPDX-License-Identifier: Apache-2.0
"""The simulated world's twin of the disk's server against the plug-in in a real nbdkit.

Both are given the same to do; both must answer, record, mark and count the same.
"""

from __future__ import annotations

import heapq
import random
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from diskbuffer.bitmap import Bitmap
from diskbuffer.status import StatusPage
from tests.prove.diskserver import DiskServer as Twin
from tests.prove.localsocket import Line
from tests.prove.storage import Files, Target
from tests.unit.disk_server import DiskServer

SIZE = 1 << 20
SHIFT = 14
CLEAN = 0.05
WAIT = 20.0
#: Figures that both must show.
SAME = ("size", "flags", "session", "state", "position", "sync_total", "sync_left", "dirty")


class Hand:
    """A clock that is turned by hand; see :class:`tests.prove.diskserver.Timer`."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []

    def soon(self, most: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + most, len(self._due), call))

    def turn(self, seconds: float) -> None:
        end = self.now + seconds
        while self._due and self._due[0][0] <= end:
            self.now, _, call = heapq.heappop(self._due)
            call()
        self.now = end


class Heard:
    """The daemon's end of a connection to the twin."""

    def __init__(self) -> None:
        self.data = b""

    def answer(self, data: bytes) -> None:
        self.data += data

    def hang_up(self) -> None:
        self.data += b"(end)"


class Both:
    """The plug-in and its twin, with the same disk and the same bitmap."""

    def __init__(self, folder: Path, contents: bytes, marks: Bitmap | None, replica: bool) -> None:
        self.real = DiskServer(folder / "real", SIZE)
        self.real.target.write_bytes(contents)
        mine = folder / "twin"
        (mine / "state").mkdir(parents=True)
        for path in (self.real.bitmap, mine / "state" / "bitmap") if marks else ():
            cast(Bitmap, marks).save(path)
        self.client = self.real.start(clean=CLEAN, replica=str(replica).lower())
        self.clock = Hand()
        self.target = Target(contents, lambda first, end: None)
        self.bitmap = mine / "state" / "bitmap"
        files = Files(mine / "state", lambda: None)
        self.twin = Twin(self.clock, self.target, files, mine, replica=replica, clean=CLEAN)
        self.page = StatusPage(mine / "status")
        self._line = self._accept()
        self._control = self._dial()
        self.stream: tuple[socket.socket, Heard] | None = None

    def _accept(self) -> Heard:
        line = Heard()
        self.twin.accept(cast(Line, line))
        return line

    def _dial(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(WAIT)
        sock.connect(str(self.real.folder / "control"))
        return sock

    def ask(self, command: str) -> str:
        """Have both carry out a command; their answer, which must be one and the same."""
        self._control.sendall(f"{command}\n".encode())
        said = ""
        while not said.endswith("\n"):
            said += self._control.recv(1).decode()
            if said.endswith("\n") and said.startswith("!"):
                said = ""  # news, which come when they come
        self._line.data = b""
        self.twin.hear(cast(Line, self._line), f"{command}\n".encode())
        assert self._line.data.decode() == said, command
        return said.strip()

    def begin(self) -> None:
        """Open a stream at both."""
        sock, line = self._dial(), self._accept()
        sock.sendall(b"stream\n")
        said = b""
        while not said.endswith(b"\n"):
            said += sock.recv(1)
        self.twin.hear(cast(Line, line), b"stream\n")
        assert line.data == said
        line.data = b""
        self.stream = (sock, line)

    def records(self) -> bytes:
        """All that came in the stream since the last call."""
        assert self.stream is not None
        sock, line = self.stream
        self.clock.turn(0.02)
        data = b""
        while len(data) < len(line.data):
            data += sock.recv(len(line.data) - len(data))
        assert data == line.data
        line.data = b""
        return data

    def await_figures(self) -> dict[str, Any]:
        """What both pages show; the plug-in's threads may take a moment."""
        self.clock.turn(0.02)
        figures = self.page.figures()
        mine = {name: getattr(figures, name) for name in SAME}
        end = time.monotonic() + WAIT
        while True:
            theirs = {name: getattr(self.real.figures(), name) for name in SAME}
            if theirs == mine or time.monotonic() > end:
                break
            time.sleep(0.005)
        assert theirs == mine
        return mine

    def change(self, chance: random.Random) -> None:
        """The guest does something."""
        offset = chance.randrange(0, SIZE - 8192)
        length = chance.randrange(1, 8192)
        match chance.choice(("write", "write", "trim", "flush")):
            case "write":
                data = chance.randbytes(length)
                self.client.write(offset, data)
                assert self.twin.write(offset, data)
            case "trim":
                self.client.trim(offset, length)
                assert self.twin.discard(offset, length)
            case "flush":
                self.client.flush()
                self.twin.flush()

    def end(self) -> None:
        self.client.close()
        self._control.close()
        if self.stream is not None:
            self.stream[0].close()
        self.real.stop(signal.SIGKILL)
        self.twin.end()


Make = Callable[..., Both]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Both] = []

    def both(seed: int, *, marks: bool = True, replica: bool = False) -> Both:
        chance = random.Random(seed)
        contents = bytearray(chance.randbytes(SIZE))
        contents[5 << SHIFT : 7 << SHIFT] = bytes(2 << SHIFT)
        pair, peer = (str(uuid.UUID(int=chance.getrandbits(128))) for _ in range(2))
        known = Bitmap(SIZE, pair, peer, 3, SHIFT)
        known.add([(4, 4), (chance.randrange(10, 40), 3)])
        made.append(Both(tmp_path, bytes(contents), known if marks else None, replica))
        return made[-1]

    yield both
    for each in made:
        each.end()


@pytest.mark.parametrize("seed", range(4))
def test_both_record_mark_copy_and_clear_the_same(make: Make, seed: int) -> None:
    both, chance = make(seed), random.Random(seed)
    assert both.ask("hello") == f"ok 1 {SIZE} 4"
    for _ in range(5):
        both.change(chance)
    both.ask("load")
    both.ask("merge 50+2 60+1")
    both.begin()
    for _ in range(20):
        both.change(chance)
        both.records()
    assert both.await_figures()["sync_left"] > 0
    both.ask("sync 0")
    assert both.records().count(b"\0") > 0
    assert both.await_figures()["sync_left"] == 0
    for _ in range(20):
        both.change(chance)
    both.records()
    assert both.real.bitmap.read_bytes() == both.bitmap.read_bytes()
    position = both.await_figures()["position"]
    both.ask(f"applied 1 {position}")
    for _ in range(8):
        both.clock.turn(CLEAN)
    assert both.page.figures().dirty == 0
    both.await_figures()
    assert both.real.target.read_bytes() == both.target.now == both.target.stable
    assert both.real.bitmap.read_bytes() == both.bitmap.read_bytes()


def test_both_refuse_the_same(make: Make) -> None:
    both = make(0)
    for command in ("merge 64+1", "merge 0+0", "sync 0", "applied 1 0", "nonsense", "activate"):
        both.ask(command)
    both.begin()
    for command in ("load", "stream", "applied 1 1", "applied 2 0", "sync 0"):
        both.ask(command)
    both.await_figures()


def test_both_are_replicas_until_told_otherwise(make: Make) -> None:
    both = make(0, replica=True)
    assert not both.twin.write(0, b"x")
    with pytest.raises(OSError, match=r"Operation not permitted|Read-only"):
        both.client.write(0, b"x")
    both.ask("stream")
    assert both.await_figures()["flags"] == 2
    assert both.ask("activate") == "ok"
    both.change(random.Random(1))
    assert both.await_figures()["flags"] == 4


def test_both_go_on_without_a_bitmap(make: Make) -> None:
    both = make(0, marks=False)
    both.ask("load")
    both.ask("stream")
    both.ask("merge 0+1")
    both.change(random.Random(1))
    both.await_figures()


def test_a_reader_that_goes_away_ends_the_stream_of_both(make: Make) -> None:
    both = make(0)
    both.begin()
    assert both.stream is not None
    both.stream[0].close()
    both.twin.hear(cast(Line, both.stream[1]), b"")
    assert both.await_figures()["state"] == 2
    both.begin()
    assert both.await_figures()["session"] == 2


def test_both_serve_a_guest(make: Make) -> None:
    both = make(2)
    both.change(random.Random(3))
    assert both.client.read(5, 100) == both.twin.read(5, 100)
