# SPDX-License-Identifier: Apache-2.0
"""A disk's server whose files fail: what the guest is told, and what is believed later."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from diskbuffer import bitmap
from diskbuffer.bitmap import Bitmap
from diskbuffer.control import Control
from diskbuffer.errors import ServerError
from diskbuffer.status import Flag
from tests.unit.disk_client import NbdClient
from tests.unit.disk_pair import CHUNK, PRIMARY, SIZE, do, joined, run, until
from tests.unit.disk_server import DiskServer
from tests.unit.kemari_pair import await_true

SOURCE = Path(__file__).with_name("disk_faults.c")
#: What fails of the bitmap when its folder has become read-only.
READ_ONLY = ("pwrite:bitmap", "fdatasync:bitmap", "unlink:bitmap")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


class Failing:
    """A disk's server, and what is to fail in it.

    :ivar server: it
    :ivar told: is there once a flush has failed because of ``writeback``
    :ivar gate: if it is made a FIFO, that flush is answered once somebody has opened it to write
    """

    def __init__(self, folder: Path, library: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self.server = DiskServer(folder / "primary", SIZE)
        self._faults = folder / "faults"
        self._faults.mkdir()
        self.told, self.gate = self._faults / "told", self._faults / "gate"
        self._library = library
        self._patch = patch

    def start(self, **config: object) -> NbdClient:
        """Serve, and connect."""
        with self._patch.context() as patch:
            patch.setenv("LD_PRELOAD", str(self._library))
            patch.setenv("KEMARI_FAULTS", str(self._faults))
            return self.server.start(**config)

    def resize(self, size: int) -> None:
        """Give the disk and its copy another size, before anything serves them."""
        for path in (self.server.target, self._folder / "copy.img"):
            path.touch()
            os.truncate(path, size)

    def fail(self, error: int, *faults: str) -> None:
        """From now on calls fail; see ``disk_faults.c``."""
        for fault in faults:
            made = self._faults / "made"
            made.write_text(str(error))
            made.rename(self._faults / fault)

    def mend(self, *faults: str) -> None:
        """They fail no more."""
        for fault in faults:
            (self._faults / fault).unlink()

    def marks(self) -> list[tuple[int, int]]:
        """The runs of marked chunks in the file, which is believed."""
        marks = bitmap.load(self.server.bitmap, SIZE)
        assert marks is not None
        return marks.runs()


@pytest.fixture
def failing(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Failing]:
    failing = Failing(tmp_path, library, monkeypatch)
    yield failing
    failing.server.stop(signal.SIGKILL)


def refuses(call: Callable[..., object], *arguments: object) -> None:
    """The guest is told of an error."""
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        call(*arguments)


# ---- The bitmap ----


def test_a_change_that_cannot_be_marked_is_refused_however_often_it_is_tried(
    failing: Failing,
) -> None:
    Bitmap(SIZE, str(uuid.uuid4()), PRIMARY).save(failing.server.bitmap)
    client = failing.start()
    failing.fail(errno.EROFS, *READ_ONLY)
    # The disk's first write is a sequential one: it marks 1 MiB ahead.
    for chunk in (0, 0, 1, 40):
        refuses(client.write, chunk * CHUNK, b"x" * 512)
    assert failing.server.target.read_bytes() == bytes(SIZE)
    assert failing.marks() == []
    failing.mend(*READ_ONLY)
    client.write(0, b"x" * 512)
    client.close()
    assert failing.marks() == [(0, 17), (40, 1)]


def test_marks_of_a_merge_that_could_not_be_written_let_no_change_through(failing: Failing) -> None:
    Bitmap(SIZE, str(uuid.uuid4()), PRIMARY).save(failing.server.bitmap)

    async def body() -> None:
        client = await asyncio.to_thread(failing.start)
        control = await Control.connect(failing.server.folder / "control", lambda line: None)
        failing.fail(errno.EIO, *READ_ONLY)
        with pytest.raises(ServerError, match="cannot be written"):
            await control.ask("merge 3+2")
        await asyncio.to_thread(refuses, client.write, 3 * CHUNK, b"x" * 512)
        failing.mend(*READ_ONLY)
        await do(client.write, 3 * CHUNK, b"x" * 512)
        await control.close()
        client.close()

    run(body)
    assert failing.marks() == [(3, 2)]


@pytest.mark.parametrize("fault", ["open:bitmap", "pread:bitmap"])
def test_a_bitmap_that_could_not_be_read_is_not_believed_after_a_change(
    failing: Failing, fault: str
) -> None:
    Bitmap(SIZE, str(uuid.uuid4()), PRIMARY).save(failing.server.bitmap)
    failing.fail(errno.EIO, fault)
    client = failing.start()
    assert not failing.server.figures().flags & Flag.TRACKING
    assert failing.marks() == []  # nothing was changed: it is still true
    failing.fail(errno.EIO, "unlink:bitmap")
    for _ in range(2):
        refuses(client.write, 0, b"x" * 512)
    failing.mend("unlink:bitmap")
    client.write(0, b"x" * 512)
    client.close()
    assert not failing.server.bitmap.exists()


# ---- The target ----


def test_a_write_back_that_failed_is_told_to_the_guest_whoever_flushed_first(
    failing: Failing, tmp_path: Path
) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(lambda: failing.start(clean=0.02))
        async with joined(failing.server, tmp_path) as pair:
            await pair.equalise()
            await do(client.write, 5 * CHUNK, b"x" * 512)
            failing.fail(errno.EIO, "writeback:disk.img")
            await pair.seal()
            await pair.settle()
            await until(failing.told.exists)  # by the flush before marks are cleared
            await asyncio.to_thread(refuses, client.flush)
            assert failing.marks() == [(5, 1)]
        client.close()

    run(body)


def test_a_write_back_that_failed_is_told_by_every_flush_from_then_on(failing: Failing) -> None:
    """The next one may be of another program in the guest, whose data it was."""
    client, other = failing.start(), failing.server.connect()
    client.flush()
    failing.fail(errno.EIO, "writeback:disk.img")
    refuses(client.flush)
    refuses(other.flush)
    failing.mend("writeback:disk.img")
    refuses(client.flush)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        client.write(0, b"x" * 512, fua=True)
    client.write(0, b"x" * 512)


def test_a_write_back_that_failed_is_told_by_all_flushes_at_the_same_time(failing: Failing) -> None:
    client, other = failing.start(), failing.server.connect()
    os.mkfifo(failing.gate)
    failing.fail(errno.EIO, "writeback:disk.img")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.flush)
        await_true(failing.told.exists, "the kernel has told the first one")
        second = pool.submit(other.flush)
        early = wait([second], timeout=0.2).done
        failing.gate.open("wb").close()
        refuses(first.result)
        refuses(second.result)
    assert not early, "it was answered before the first one had told of the error"


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_discard_that_is_not_supported_leaves_the_same_on_both_hosts(
    failing: Failing, tmp_path: Path, error: int
) -> None:
    async def body() -> None:
        client = await asyncio.to_thread(failing.start)
        async with joined(failing.server, tmp_path) as pair:
            await pair.begin()
            await pair.sync()
            await do(client.write, 0, b"x" * SIZE)
            failing.fail(error, "fallocate:disk.img")
            await do(client.trim, 3 * CHUNK, 2 * CHUNK)
            await do(client.trim, 9 * CHUNK, CHUNK)
            await do(client.zero, 20 * CHUNK, CHUNK)
            await until(lambda: pair.disk.progress().left == 0)
            await pair.seal()
            await pair.settle()
            contents = failing.server.target.read_bytes()
            assert pair.copy.read_bytes() == contents
            assert contents[20 * CHUNK : 21 * CHUNK] == bytes(CHUNK)
            # Where it said that it makes no holes at all, it is not asked again.
            assert contents.count(b"junk") == (1 if error == errno.EOPNOTSUPP else 2)
            assert failing.server.figures().errors == 0
        client.close()

    run(body)


def test_a_range_whose_change_failed_is_copied_wherever_copying_stood(
    failing: Failing, tmp_path: Path
) -> None:
    """The list of what is left ends within a byte of the bitmap."""
    chunks = 20
    failing.resize(chunks * CHUNK)

    async def body() -> None:
        client = await asyncio.to_thread(failing.start)
        async with joined(failing.server, tmp_path) as pair:
            await pair.begin()
            await pair.sync()
            for chunk in range(chunks):
                failing.fail(errno.EIO, "pwrite:disk.img")
                await asyncio.to_thread(refuses, client.write, chunk * CHUNK, b"x" * 512)
                failing.mend("pwrite:disk.img")
                await until(lambda: pair.disk.progress().left == 0)
        client.close()

    run(body)
