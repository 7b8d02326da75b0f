# SPDX-License-Identifier: Apache-2.0
"""A disk served by nbdkit with the project's plug-in, for tests."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

import diskbuffer
from diskbuffer.metadata import state_folder
from diskbuffer.status import Figures, StatusPage
from tests.unit.disk_client import NbdClient

END_SECONDS = 30.0


class DiskServer:
    """See the module's text.

    :param run: the disk's folder, if it is to be elsewhere
    :param states: folder of all durable folders, if this one is to be where daemons look for it
    :param target: what is to be served, if it is there already
    :ivar folder: what the hotplug script calls the disk's folder
    :ivar target: the file that is served
    :ivar state: its durable folder
    :ivar bitmap: where its bitmap is, if there is one
    """

    def __init__(
        self,
        folder: Path,
        size: int = 4 << 20,
        *,
        run: Path | None = None,
        states: Path | None = None,
        target: Path | None = None,
    ) -> None:
        nbdkit = shutil.which("nbdkit")
        assert nbdkit, "nbdkit is not installed; .ci/packages installs it"
        self._nbdkit = nbdkit
        self._process = -1
        self.folder = run or folder / "run"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.target = target or folder / "disk.img"
        self.state = state_folder(self.target, states) if states else folder / "state"
        self.state.mkdir(parents=True, exist_ok=True)
        self.bitmap = self.state / "bitmap"
        (self.state / "target").write_text(f"{self.target}\n")
        if not (self.folder / "state").is_symlink():
            (self.folder / "state").symlink_to(self.state)
        if not self.target.exists():
            self.target.touch()
            os.truncate(self.target, size)

    def launch(self, *, limit: int = 0, **config: object) -> None:
        """Serve; returns once the server listens.

        :param limit: the size in bytes that the server may make files, 0 for any
        :raise RuntimeError: with what it said when it ended instead
        """
        words = [f"{key}={value}" for key, value in config.items()]
        for name in ("nbd", "pid"):
            (self.folder / name).unlink(missing_ok=True)
        argv: list[str | Path] = [
            self._nbdkit,
            "--unix",
            self.folder / "nbd",
            "--pidfile",
            self.folder / "pid",
        ]
        argv += ["--threads", "8", diskbuffer.plugin(), f"target={self.target}"]
        argv += [f"dir={self.folder}", f"bitmap={self.bitmap}", *words]
        if limit:
            # Ignored, the signal is an error of the write, as a full disk would be.
            argv = ["env", "--ignore-signal=XFSZ", "prlimit", f"--fsize={limit}:", *argv]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.decode())
        # The server says that it runs a moment before it has written down as which process.
        pid = self.folder / "pid"
        end = time.monotonic() + END_SECONDS
        while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
            time.sleep(0.005)
        self._process = os.pidfd_open(int(pid.read_text()))

    def start(self, **config: object) -> NbdClient:
        """Serve, and connect."""
        self.launch(**config)  # type: ignore[arg-type]
        return self.connect()

    def connect(self) -> NbdClient:
        """Another connection."""
        return NbdClient(self.folder / "nbd")

    def figures(self) -> Figures:
        """What the status page says."""
        page = StatusPage(self.folder / "status")
        try:
            return page.figures()
        finally:
            page.close()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the server, and wait until it has ended (idempotent)."""
        if self._process < 0:
            return
        signal.pidfd_send_signal(self._process, number)
        poll = select.poll()  # not select: a process with frozen daemons has many descriptors
        poll.register(self._process, select.POLLIN)
        ended = poll.poll(END_SECONDS * 1000)
        os.close(self._process)
        self._process = -1
        assert ended, f"nbdkit did not end within {END_SECONDS:g} s"
