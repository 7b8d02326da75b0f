# SPDX-License-Identifier: Apache-2.0
"""Pages and machine state to frame payloads and back (``docs/protocol.md``: Pages, Machine state).

The encoder keeps a reference: a copy of what the standby has.  Pages equal to it are left out,
others become a zero flag, an XOR delta or the raw page; a batch of them is then compressed.  The
decoder takes the standby's memory itself as the base of deltas.  No I/O; the loops and compressors
release the GIL, so both may run in a thread.
"""

from __future__ import annotations

import errno
import mmap
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import lz4.block
import zstandard

from checkpoint import native
from checkpoint.driver import PAGE_SIZE, Staging
from checkpoint.errors import ProtocolError
from checkpoint.wire import MAX_STATE, Buffer

COMPRESSIONS = ("none", "lz4", "zstd")
"""Names of flags bits 0 and 1, by their value."""

MAX_BATCH_PAGES = 2040
"""So many raw pages, with their heads, just fit a PAGES frame."""

BATCH_PAGES = 256
"""Pages in a batch unless told otherwise: 1 MiB stays in a core's cache between the loops."""

LOOK_EVERY = 1024
"""Pages by which a reference grows between two looks at whether it may."""

_MAP_NORESERVE = 0x4000  # mmap(2); the module has no name for it

_COMPRESSION_MASK = 3
_STATE_XOR = 4
_PREFIX = struct.Struct("<II")

Compressor = Callable[[Buffer], bytes]


class Coded(NamedTuple):
    """Payload of a PAGES or STATE frame.

    :ivar flags: the frame's flags
    :ivar payload: the frame's payload
    :ivar pages: pages in it; 0 for a state
    """

    flags: int
    payload: bytes
    pages: int


class Verified(NamedTuple):
    """A batch that was checked for a guest of a known size.

    :ivar pages: pages in it
    :ivar body: its records
    """

    pages: int
    body: Buffer


@dataclass(slots=True)
class Figures:
    """What an encoder did, all in all.

    :ivar raw_bytes: pages and states given to it
    :ivar coded_bytes: payloads that came out
    :ivar unchanged: pages left out
    :ivar zero: pages sent as a flag
    :ivar delta: pages sent as a delta
    :ivar raw: pages sent whole
    :ivar forgotten: pages that had to make room in the reference for others
    """

    raw_bytes: int = 0
    coded_bytes: int = 0
    unchanged: int = 0
    zero: int = 0
    delta: int = 0
    raw: int = 0
    forgotten: int = 0

    def copy(self) -> Figures:
        """The figures as they are now."""
        return replace(self)


def _compressor(name: str, level: int) -> Compressor | None:
    if name == "lz4":
        return lambda data: bytes(
            lz4.block.compress(data, mode="fast", acceleration=level, store_size=False)
        )
    if name == "zstd":
        return zstandard.ZstdCompressor(level=level).compress
    if name == "none":
        return None
    raise ValueError(f"unknown compression {name!r}, expected one of {', '.join(COMPRESSIONS)}")


class Encoder:
    """The primary's side, for one session.

    The reference takes memory page by page as pages that are not all zero are sent, at most
    ``reference_pages`` pages: then those that were of no use lately are forgotten, and sent whole
    the next time.
    What :meth:`encode` yields must reach the standby in that order, all of it: after a lost payload
    only a new session with a new encoder brings both sides together again.

    :param pages: the guest's size
    :param compression: one of :data:`COMPRESSIONS`
    :param level: lz4: acceleration, zstd: level; higher is faster with lz4 and smaller with zstd
    :param whole: frames that the standby's backends may write too; never sent as a delta
    :param reference_pages: pages that the reference may hold, by default all; once a batch is
        encoded, and by at most a batch more until then
    :param spare: asked now and then as the reference grows: pages by which it may grow further,
        negative if it is to shrink; by default as many as it likes
    :ivar held: pages that it holds
    :raise ValueError: unknown compression, a frame outside of the guest, or a reference of nothing
    """

    def __init__(
        self,
        pages: int,
        *,
        compression: str = "lz4",
        level: int = 1,
        whole: Iterable[int] = (),
        reference_pages: int | None = None,
        spare: Callable[[], int] | None = None,
    ) -> None:
        self.pages = pages
        self.held = 0
        self.figures = Figures()
        self._compress = _compressor(compression, level)
        self._flags = COMPRESSIONS.index(compression)
        self._most = pages if reference_pages is None else reference_pages
        if self._most < 1:
            raise ValueError(f"a reference of {self._most} pages, expected at least 1")
        self._room = self._most
        self._spare = spare
        self._grown = 0
        self._memory = sparse(pages * PAGE_SIZE)
        self._reference = memoryview(self._memory)
        self._have = bytearray(pages)
        self._hand = 0
        self._forgotten = array("Q", bytes(8 * MAX_BATCH_PAGES))
        self._out = bytearray()
        self._state: bytes | None = None
        for gfn in whole:
            if not 0 <= gfn < pages:
                raise ValueError(f"frame {gfn} is outside of the guest's {pages} pages")
            self._have[gfn] = native.REF_WHOLE

    def encode(self, staging: Staging, batch_pages: int = BATCH_PAGES) -> Iterator[Coded]:
        """Payloads for the staged pages, none for a batch in which nothing changed.

        Each payload is made when it is asked for; ``staging`` must stay as it is until the last.

        :raise IndexError: a frame lies outside of the guest; its batch changed nothing
        """
        if not 1 <= batch_pages <= MAX_BATCH_PAGES:
            raise ValueError(f"a batch of {batch_pages} pages, expected 1 to {MAX_BATCH_PAGES}")
        if len(self._out) < batch_pages * native.RECORD_MOST:
            self._out = bytearray(batch_pages * native.RECORD_MOST)
        gfns, data = memoryview(staging.gfns), staging.data
        for first in range(0, staging.count, batch_pages):
            count = min(batch_pages, staging.count - first)
            used, unchanged, zero, delta, raw, held = native.encode_pages(
                gfns[first : first + count],
                count,
                data[first * PAGE_SIZE : (first + count) * PAGE_SIZE],
                self._reference,
                self._have,
                self._out,
            )
            figures = self.figures
            figures.raw_bytes += count * PAGE_SIZE
            figures.unchanged += unchanged
            figures.zero += zero
            figures.delta += delta
            figures.raw += raw
            self.held += held
            self._grown += held
            if self._spare is not None and self._grown >= LOOK_EVERY:
                self._grown = 0
                self._room = max(1, min(self._most, self.held + self._spare()))
            if self.held > self._room:
                self._forget(self.held - self._room)
            if used:
                pages = zero + delta + raw
                yield self._coded(memoryview(self._out)[:used], 0, pages, pages)

    def unlike(self, first: int, memory: memoryview) -> list[int]:
        """Frames from ``first`` on, one for each page of ``memory``, that are otherwise there.

        Without those of which the standby's content is not known here: never sent, forgotten, or
        written by its backends, too.
        """
        reference = self._reference[first * PAGE_SIZE : first * PAGE_SIZE + memory.nbytes]
        if bytes(memory) == bytes(reference):
            return []
        found = []
        for gfn, at in enumerate(range(0, memory.nbytes, PAGE_SIZE), first):
            page = slice(at, at + PAGE_SIZE)
            known = self._have[gfn] & native.REF_STATE == native.REF_SAME
            if known and bytes(memory[page]) != bytes(reference[page]):
                found.append(gfn)
        return found

    def close(self) -> None:
        """Give the reference's memory back, as much as the guest has (idempotent).

        No call of :meth:`encode` is under way, and none comes.
        """
        self._reference.release()
        self._memory.close()
        self.held = 0

    def _forget(self, count: int) -> None:
        """Give back the memory of so many pages of the reference."""
        self._hand, found = native.forget_pages(self._have, self._hand, count, self._forgotten)
        for first, length in _runs(self._forgotten[:found]):
            self._memory.madvise(mmap.MADV_DONTNEED, first * PAGE_SIZE, length * PAGE_SIZE)
        self.held -= found
        self.figures.forgotten += found

    def encode_state(self, state: bytes) -> Coded:
        """The payload for an epoch's machine state; each call is one epoch.

        :raise ValueError: the state is longer than the protocol allows
        """
        if len(state) + _PREFIX.size > MAX_STATE:
            raise ValueError(
                f"a machine state of {len(state)} bytes, at most {MAX_STATE - _PREFIX.size}"
            )
        body: Buffer = state
        flags = 0
        if self._state is not None and len(self._state) == len(state):
            body, flags = _xor(state, self._state), _STATE_XOR
        self._state = state
        self.figures.raw_bytes += len(state)
        return self._coded(body, flags, 0, 0)

    def _coded(self, body: Buffer, flags: int, first: int, pages: int) -> Coded:
        """Prefix (first field, length) and body, compressed if that makes it shorter."""
        prefix = _PREFIX.pack(first, len(body)) if first else _PREFIX.pack(len(body), 0)
        coded: Buffer = body
        if self._compress is not None and len(body) > 0:
            shorter = self._compress(body)
            if len(shorter) < len(body):
                coded, flags = shorter, flags | self._flags
        payload = b"".join((prefix, coded))
        self.figures.coded_bytes += len(payload)
        return Coded(flags, payload, pages)


class Decoder:
    """The standby's side, for one session; everything that it is given is untrusted.

    :param pages: the guest's size
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._state: bytes | None = None

    def verify(self, untrusted_flags: int, untrusted_payload: Buffer) -> Verified:
        """Check and unpack the payload of a PAGES frame; at most 8 MiB are allocated.

        :raise ProtocolError: it breaks the protocol
        """
        if len(untrusted_payload) < _PREFIX.size:
            raise ProtocolError("a batch is shorter than its prefix")
        count, length = _PREFIX.unpack_from(untrusted_payload)
        if not 1 <= count <= MAX_BATCH_PAGES:
            raise ProtocolError(f"a batch of {count} pages, expected 1 to {MAX_BATCH_PAGES}")
        if not 8 * count <= length <= native.RECORD_MOST * count:
            raise ProtocolError(f"a batch of {count} pages in {length} bytes")
        body = _unpack(untrusted_flags, memoryview(untrusted_payload)[_PREFIX.size :], length)
        try:
            found = native.verify_batch(body, self.pages)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        if found != count:
            raise ProtocolError(f"a batch of {found} pages says that it has {count}")
        return Verified(count, body)

    def apply(self, batch: Verified, memory: memoryview) -> None:
        """Bring ``memory`` up to date.

        :param memory: all of the guest, ``pages * PAGE_SIZE`` bytes
        :raise ValueError: ``memory`` is not as large as the guest; it is unchanged
        """
        if memory.nbytes != self.pages * PAGE_SIZE:
            raise ValueError(f"memory of {memory.nbytes} bytes for a guest of {self.pages} pages")
        native.apply_batch(batch.body, memory)

    def decode_state(self, untrusted_flags: int, untrusted_payload: Buffer) -> bytes:
        """The machine state in the payload of a STATE frame; each call is one epoch.

        :raise ProtocolError: it breaks the protocol
        """
        if len(untrusted_payload) < _PREFIX.size:
            raise ProtocolError("a machine state is shorter than its prefix")
        length, reserved = _PREFIX.unpack_from(untrusted_payload)
        if length > MAX_STATE or reserved:
            raise ProtocolError(f"a machine state of {length} bytes, at most {MAX_STATE}")
        body = bytes(
            _unpack(untrusted_flags, memoryview(untrusted_payload)[_PREFIX.size :], length)
        )
        if untrusted_flags & _STATE_XOR:
            if self._state is None or len(self._state) != length:
                raise ProtocolError("a machine state refers to one of its length that never came")
            body = bytes(_xor(body, self._state))
        self._state = body
        return body


def sparse(size: int) -> mmap.mmap:
    """Zeros that take memory page by page as they are first written, and none for being read.

    Nothing is cleared here, which for a large guest would stop the whole process for seconds.  A
    child process must run its own program at once: it has the object, but not the memory.
    """
    # Without a reservation: a guest may be larger than Dom0, whose memory is not counted that way.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    # A child would get copies of what is written until it runs its own program.
    memory.madvise(mmap.MADV_DONTFORK)
    try:
        # Not 2 MiB for a page.
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel that has no huge pages does not know of it
            raise
    return memory


def _runs(frames: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Frames that follow one another, as (first, how many)."""
    first = length = 0
    for frame in frames:
        if length and frame == first + length:
            length += 1
            continue
        if length:
            yield first, length
        first, length = frame, 1
    if length:
        yield first, length


def _unpack(untrusted_flags: int, untrusted_coded: memoryview, length: int) -> Buffer:
    """Decompress to exactly ``length`` bytes, allocating no more."""
    compression = untrusted_flags & _COMPRESSION_MASK
    if compression >= len(COMPRESSIONS):
        raise ProtocolError("a payload is compressed in an unknown way")
    name = COMPRESSIONS[compression]
    body: Buffer
    if name == "none":
        body = untrusted_coded
    elif name == "lz4":
        try:
            body = lz4.block.decompress(untrusted_coded, uncompressed_size=length)
        except (lz4.block.LZ4BlockError, ValueError) as error:
            raise ProtocolError("a payload is no lz4 block of the length it says") from error
    else:
        body = _unpack_zstd(untrusted_coded, length)
    if len(body) != length:
        raise ProtocolError(f"a payload unpacks to {len(body)} bytes, expected {length}")
    return body


def _unpack_zstd(untrusted_coded: memoryview, length: int) -> bytes:
    try:
        # The size in the frame's own header is what the library allocates.
        if zstandard.get_frame_parameters(untrusted_coded).content_size != length:
            raise ProtocolError("a zstd frame is not of the length that its payload says")
        return zstandard.ZstdDecompressor().decompress(untrusted_coded, max_output_size=length)
    except zstandard.ZstdError as error:
        raise ProtocolError("a payload is no valid zstd frame") from error


def _xor(one: bytes, other: bytes) -> bytearray:
    out = bytearray(len(one))
    native.xor(one, other, out)
    return out
