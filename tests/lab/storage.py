# SPDX-License-Identifier: Apache-2.0
"""A storage beside the two hosts: one image, served by NBD from the client's place in the lab."""

from __future__ import annotations

import os
import subprocess
from types import TracebackType
from typing import Self

from tests.lab.protection_world import World
from vagrant.lablib.guest import GuestOptions
from vagrant.lablib.lab import Lab

#: Behind those that block-kemari takes first.
DEVICE = "/dev/nbd12"
ADDRESS = "10.77.0.254"
PORT = 10809


class Storage:
    """See the module's text; a context manager.

    :ivar image: the file behind it
    """

    def __init__(self, lab: Lab, mib: int) -> None:
        self._lab = lab
        self.image = lab.state / "storage.img"
        with self.image.open("wb") as file:
            os.truncate(file.fileno(), mib << 20)
        words = ["nbdkit", "-f", "-i", ADDRESS, "-p", str(PORT), "file", os.fspath(self.image)]
        self._server = subprocess.Popen(
            lab.net_argv(words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(lab.state / "storage.log").open("w"),
        )

    def attach(self, host: str) -> None:
        """Have a host reach it (idempotent)."""
        reached = f"[ -e /sys/block/{DEVICE.rpartition('/')[2]}/pid ]"
        self._lab.ssh(host, f"{reached} || nbd-client {ADDRESS} {PORT} {DEVICE} -b 512")

    def detach(self, host: str) -> None:
        """Have a host let it go."""
        self._lab.ssh(host, f"nbd-client -d {DEVICE}", check=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.kill()
        self._server.wait()


class SharedWorld(World):
    """A world whose guest has its disk on a storage that both hosts reach."""

    def __init__(self, lab: Lab, storage: Storage, mib: int) -> None:
        super().__init__(lab, GuestOptions(disk_mib=mib, storage=DEVICE))
        self._storage = storage

    def boot(self, host: str) -> None:
        """As :meth:`World.boot`; the storage is there again as well."""
        super().boot(host)
        self._storage.attach(host)

    def _anew(self) -> None:
        super()._anew()
        for host in self.lab.hosts:
            self._storage.attach(host)
