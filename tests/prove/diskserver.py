# SPDX-License-Identifier: Apache-2.0
"""A twin of the disk's server, in memory: ``diskbuffer/_plugin.c`` and its headers in Python.

It keeps ``docs/disk.md``: room, mark, change, record, in this order; the bitmap is a real file, and
so is the page of figures, so that the product reads what it always reads.  What the plug-in does in
threads happens here in steps of the simulation.  ``tests/unit/test_disk_twin.py`` gives both the
same to do and compares what they say.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Final, Protocol

from diskbuffer import bitmap, stream
from diskbuffer.bitmap import BLOCK_BYTES, HEADER_BYTES, Bitmap
from diskbuffer.errors import BitmapError
from diskbuffer.status import Figures, Flag, StreamState
from diskbuffer.stream import Flags, Kind, Record
from tests.prove.localsocket import Line
from tests.prove.storage import Files, Opened, Target

#: Bytes that are marked ahead of a sequential write.
AHEAD: Final = 1 << 20
#: Bytes that are copied as one record, and taken from the queue at once, at most.
COPY: Final = 256 << 10
#: Virtual seconds that a step of a thread takes, at most.
STEP: Final = 0.001
#: Bytes that may wait in the queue.
LIMIT: Final = 4 << 20

_PLACES: Final = {field.name: 8 * (1 + n) for n, field in enumerate(fields(Figures))}
_WORD: Final = struct.Struct("<Q")
_RUN: Final = re.compile(r"(\d+)\+(\d+)\Z")


class Refusal(Exception):
    """A command cannot be carried out, with the sentence."""


class Timer(Protocol):
    """What the server needs of a simulation."""

    @property
    def now(self) -> float:
        """Virtual seconds."""

    def soon(self, most: float, call: Callable[[], None]) -> None:
        """Call after at most so many virtual seconds."""


class Page:
    """The page of figures that is shared.

    :param path: where it is made
    """

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(descriptor, 4096)
        self._map = mmap.mmap(descriptor, 4096)
        os.close(descriptor)
        self._map[:8] = b"KMRIDISK"
        self.put("version", 1)

    def get(self, name: str) -> int:
        """A figure."""
        value: int = _WORD.unpack_from(self._map, _PLACES[name])[0]
        return value

    def put(self, name: str, value: int) -> None:
        """Set a figure."""
        _WORD.pack_into(self._map, _PLACES[name], value)

    def count(self, name: str, more: int = 1) -> None:
        """Add to a figure."""
        self.put(name, self.get(name) + more)

    def flag(self, flag: Flag, on: bool) -> None:
        """Set a flag, or take it away."""
        flags = self.get("flags")
        self.put("flags", flags | flag if on else flags & ~flag)

    def has(self, flag: Flag) -> bool:
        """Whether a flag is set."""
        return bool(self.get("flags") & flag)

    def close(self) -> None:
        """Unmap it here; whoever has it mapped keeps what it said last."""
        self._map.close()


class Marks:
    """The bitmap in use: the file, and what the server knows beside it.

    :ivar bits: as in the file
    :ivar touched: written or copied since the cleaning cycle began
    :ivar todo: not yet copied to the standby in this session
    """

    def __init__(self, path: Path, size: int, files: Files) -> None:
        found = bitmap.load(path, size)
        if found is None:
            raise BitmapError("there is no bitmap")
        self.shift, self.chunks = found.shift, found.chunks
        self.bits = set(_numbers(found))
        self.touched: set[int] = set()
        self.todo: set[int] = set()
        self.last_end = 0
        self._empty = Bitmap(size, found.pair, found.peer, found.generation, found.shift)
        self._files = files
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def covered(self, offset: int, length: int) -> range:
        """The chunks of a range."""
        return range(offset >> self.shift, ((offset + length - 1) >> self.shift) + 1)

    def mark(self, offset: int, length: int) -> None:
        """Mark a range before it is written; on return the marks are on stable storage."""
        covered = self.covered(offset, length)
        self.touched.update(covered)
        sequential = offset == self.last_end
        self.last_end = offset + length
        if self.bits.issuperset(covered):
            return
        end = covered.stop + (AHEAD >> self.shift if sequential else 0)
        self.add(range(covered.start, min(end, self.chunks)))

    def add(self, numbers: range) -> None:
        """Set bits, durably."""
        self.bits.update(numbers)
        self._write()
        self._files.sync(self._descriptor)

    def clean(self) -> None:
        """Clear the bits of all that is settled."""
        kept = self.bits & (self.touched | self.todo)
        if kept != self.bits:
            self.bits = kept
            self._write()

    def _write(self) -> None:
        bits = bytearray(len(self._empty.bits))
        for number in self.bits:
            bits[number // 8] |= 1 << number % 8
        for at in range(0, len(bits), BLOCK_BYTES):
            os.pwrite(self._descriptor, bits[at : at + BLOCK_BYTES], HEADER_BYTES + at)
        self._files.touched()

    def close(self) -> None:
        """Use it no more."""
        os.close(self._descriptor)


def _numbers(marks: Bitmap) -> list[int]:
    return [n for first, count in marks.runs(marks.chunks) for n in range(first, first + count)]


class DiskServer:
    """Serves one target.

    :param folder: where the product finds it, with a link ``state`` in it
    :param replica: refuse changes until told that this is the guest's disk
    :param clean: seconds that a bit rests before it is cleared
    """

    def __init__(
        self,
        timer: Timer,
        target: Target,
        files: Files,
        folder: Path,
        *,
        replica: bool,
        clean: float = 10.0,
    ) -> None:
        self.alive = True
        self.page = Page(folder / "status")
        self._timer = timer
        self._target = target
        # The guest's, and one for clearing marks: each is told of a failure, see _disk.h.
        self._opened, self._cleaner = Opened(target), Opened(target)
        self._sync_failed = False
        self._files = files
        self._bitmap = folder / "state" / "bitmap"
        self._clean_after = clean
        self._marks: Marks | None = None
        self._lines: dict[Line, bytes] = {}
        self._stream: Line | None = None
        self._queue = bytearray()
        self._applied = 0
        self._cycle: tuple[int, float] | None = None
        self._why = ""
        self._syncing = self._draining = self._told_full = False
        self._cursor = 0
        self.page.put("size", len(target.now))
        self.page.put("limit", LIMIT)
        self.page.flag(Flag.REPLICA, replica)
        if not replica:
            try:
                self._load()
            except Refusal:
                pass  # not tracked
        self._timer.soon(clean, self._if_alive(self._look_around))

    def end(self) -> None:
        """The process is no more."""
        if self.alive:
            self.alive = False
            for line in [*self._lines, *([self._stream] if self._stream else [])]:
                line.hang_up()
            self._close_marks()
            self.page.close()

    # ---- What blkback asks ----

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the disk."""
        return bytes(self._target.now[offset : offset + length])

    def write(self, offset: int, data: bytes) -> bool:
        """A change; False if it was refused."""
        return self._change(Record(Kind.WRITE, 0, offset, len(data), data))

    def discard(self, offset: int, length: int) -> bool:
        """Make a hole; False if it was refused."""
        return self._change(Record(Kind.ZERO, Flags.PUNCH, offset, length))

    def flush(self) -> bool:
        """Whether all that was answered is on stable storage.

        The plug-in goes on to fail until the disk is served anew; here the guest may write again.
        """
        if not self._flush(self._opened):
            self.page.count("errors")
            return False
        self._append(Record(Kind.FLUSH, 0, 0, 0))
        return True

    def _flush(self, opened: Opened) -> bool:
        if opened.flush():
            return True
        self._sync_failed = True
        return False

    def _change(self, record: Record) -> bool:
        if self.page.has(Flag.REPLICA):
            return False
        if self._marks is not None:
            self._marks.mark(record.offset, record.extent)
            self.page.put("dirty", len(self._marks.bits))
        self._target.write(record.offset, bytes(record.payload) or bytes(record.extent))
        self._append(record)
        return True

    # ---- The stream ----

    @property
    def _streaming(self) -> bool:
        return self.page.get("state") == StreamState.STREAMING

    def _append(self, record: Record) -> None:
        if not self._streaming:
            return
        data = stream.encode(record)
        if len(self._queue) + len(data) > LIMIT:
            # The guest would wait for room first; here nobody's patience is that long.
            self._break("Nothing was taken from the stream")
            return
        self._queue += data
        self.page.count("position", len(data))
        if len(self._queue) > LIMIT // 2 and not self._told_full:
            self._told_full = True
            self._tell("!full")
        if not self._draining:
            self._draining = True
            self._soon(self._drain)

    def _drain(self) -> None:
        self._draining = False
        if not self._streaming or self._stream is None:
            return
        part = bytes(self._queue[:COPY])
        del self._queue[: len(part)]
        self._stream.answer(part)
        self.page.count("drained", len(part))
        if len(self._queue) < LIMIT // 4:
            self._told_full = False
        if self._queue:
            self._draining = True
            self._soon(self._drain)

    def _break(self, why: str) -> None:
        if not self._streaming:
            return
        self.page.put("state", StreamState.BROKEN)
        self.page.flag(Flag.SYNCING, False)
        self._queue.clear()
        self._why = why
        if self._stream is not None:
            self._stream.hang_up()
            self._stream = None
        self._tell(f"!lost {why}")

    # ---- Copying what differs ----

    def _sync_step(self) -> None:
        marks = self._marks
        if not (self._streaming and self._syncing and marks is not None):
            return
        if not marks.todo:
            self._syncing = False
            self.page.flag(Flag.SYNCING, False)
            self._tell("!synced")
            return
        number = min((n for n in marks.todo if n >= self._cursor), default=min(marks.todo))
        self._copy(number, marks)
        marks.todo.discard(number)
        marks.touched.add(number)
        self._cursor = number + 1
        self.page.count("sync_left", -1)
        self._soon(self._sync_step)

    def _copy(self, number: int, marks: Marks) -> None:
        size = len(self._target.now)
        end = min((number + 1) << marks.shift, size)
        for offset in range(number << marks.shift, end, COPY):
            data = self.read(offset, min(COPY, end - offset))
            if any(data):
                record = Record(Kind.WRITE, Flags.SYNC, offset, len(data), data)
            else:
                record = Record(Kind.ZERO, Flags.PUNCH | Flags.SYNC, offset, len(data))
            self._append(record)

    # ---- Marks ----

    def _load(self) -> None:
        self._close_marks()
        try:
            self._marks = Marks(self._bitmap, len(self._target.now), self._files)
        except BitmapError as error:
            raise Refusal(str(error)) from error
        self.page.put("dirty", len(self._marks.bits))
        self.page.flag(Flag.TRACKING, True)

    def _close_marks(self) -> None:
        if self._marks is not None:
            self._marks.close()
            self._marks = None
            self.page.flag(Flag.TRACKING, False)

    def _look_around(self) -> None:
        """Clear what is settled, in cycles."""
        self._timer.soon(self._clean_after, self._if_alive(self._look_around))
        marks = self._marks
        if not self._streaming or marks is None:
            return
        if self._cycle is None:
            self._cycle = (self.page.get("position"), self._timer.now)
            marks.touched.clear()
            return
        position, began = self._cycle
        if self._applied < position or self._timer.now - began < self._clean_after:
            return
        if self._flush(self._cleaner) and not self._sync_failed:
            marks.clean()
            self.page.put("dirty", len(marks.bits))
        self._cycle = None

    def _soon(self, call: Callable[[], None]) -> None:
        self._timer.soon(STEP, self._if_alive(call))

    def _if_alive(self, call: Callable[[], None]) -> Callable[[], None]:
        return lambda: call() if self.alive else None

    # ---- Commands ----

    def accept(self, line: Line) -> None:
        """See :class:`tests.prove.localsocket.Listener`."""
        self._lines[line] = b""

    def hear(self, line: Line, data: bytes) -> None:
        """See :class:`tests.prove.localsocket.Listener`."""
        if not self.alive:
            return
        if line is self._stream:
            self._break("The reader closed the stream")
            return
        if not data:
            self._lines.pop(line, None)
            line.hang_up()
            return
        *commands, self._lines[line] = (self._lines[line] + data).split(b"\n")
        for command in commands:
            try:
                text = self.obey(line, command.decode())
            except Refusal as error:
                text = f"error {error}"
            line.answer(f"{text}\n".encode())

    def obey(self, line: Line, command: str) -> str:
        """Carry out a command; the line that answers it.

        :raise Refusal: it cannot be
        """
        match command.split(" "):
            case ["hello"]:
                return f"ok 1 {self.page.get('size')} {self.page.get('flags')}"
            case ["stream"]:
                return f"ok {self._begin(line)}"
            case ["load"]:
                if self._streaming:
                    raise Refusal("the bitmap is in use by a stream")
                self._load()
                return f"ok {self.page.get('dirty')}"
            case ["merge", *runs]:
                self._merge(runs)
            case ["sync", _rate]:
                if not self._streaming:
                    raise Refusal("there is no stream")
                if not self._syncing:
                    self._syncing = True
                    self._soon(self._sync_step)
                self.page.flag(Flag.SYNCING, True)
            case ["applied", session, position]:
                self._settle(int(session), int(position))
            case ["activate"]:
                if self.page.has(Flag.REPLICA):
                    self._load()
                self.page.flag(Flag.REPLICA, False)
            case _:
                raise Refusal("there is no such command")
        return "ok"

    def _begin(self, line: Line) -> int:
        if self.page.has(Flag.REPLICA):
            raise Refusal("the disk is a replica")
        if self._marks is None:
            raise Refusal("no bitmap is loaded")
        if self._stream is not None:
            raise Refusal("there is a stream already")
        session = self.page.get("session") + 1
        self._lines.pop(line, None)
        self._stream = line
        self._queue.clear()
        self._applied = self._cursor = 0
        self._cycle = None
        self._told_full = self._syncing = False
        self._marks.todo = set(self._marks.bits)
        for name in ("sync_total", "sync_left"):
            self.page.put(name, len(self._marks.todo))
        for name in ("position", "drained"):
            self.page.put(name, 0)
        self.page.put("session", session)
        self.page.put("state", StreamState.STREAMING)
        return session

    def _merge(self, runs: list[str]) -> None:
        marks = self._marks
        if marks is None:
            raise Refusal("no bitmap is loaded")
        for run in runs:
            found = _RUN.match(run)
            first, count = (int(found[1]), int(found[2])) if found else (0, 0)
            if count < 1 or first + count > marks.chunks:
                raise Refusal("a run is not one of this disk")
            marks.add(range(first, first + count))
        self.page.put("dirty", len(marks.bits))

    def _settle(self, session: int, position: int) -> None:
        if session != self.page.get("session") or position > self.page.get("position"):
            raise Refusal("that position is not of this stream")
        self._applied = max(self._applied, position)

    def _tell(self, news: str) -> None:
        for line in self._lines:
            line.answer(f"{news}\n".encode())
