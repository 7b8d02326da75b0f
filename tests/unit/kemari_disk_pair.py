# SPDX-License-Identifier: Apache-2.0
"""Two daemons and a guest with a disk: all real but the hypervisor and the kernel's nbd driver.

The guest writes each request into its disk before it answers, through an NBD connection, as blkback
does for a real one: number k into sector k + 1, and how many it has had into sector 0.
"""

from __future__ import annotations

import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint.driver import Disk
from checkpoint.memory import MemoryGuest
from diskbuffer import metadata
from tests.unit.disk_client import NbdClient
from tests.unit.disk_server import DiskServer
from tests.unit.kemari_pair import Machine, Pair, await_true

MIB = 1 << 20
SIZE = 8 * MIB
TARGET = "/dev/vg0/web"
SECTOR = 512
_NUMBER = struct.Struct("<Q")


class Side:
    """One host's disk.

    :param storage: in shared mode, what both hosts reach
    :ivar at_revival: (requests that the revived guest remembers, contents of the disk) of then
    """

    def __init__(self, folder: Path, machine: Machine, storage: Path | None = None) -> None:
        self.machine = machine
        self.shared = storage is not None
        self.client: NbdClient | None = None
        self.at_revival: tuple[int, bytes] | None = None
        paths = machine.config.paths
        self.server = DiskServer(
            folder / machine.name,
            SIZE,
            run=paths.run / "disks" / "1-51712",
            states=paths.state / "disks",
            target=storage,
        )
        machine.hypervisor.write_disk = self.write
        machine.hypervisor.reached = self.reached

    def serve(self, **config: object) -> None:
        """What block-kemari does when a guest, or a shell, is made."""
        known = metadata.load(self.server.state / "state.json")
        role = known.role if known is not None else metadata.Role.DISK
        assert role is not metadata.Role.HELD, "block-kemari would not serve it"
        if self.shared:
            config["shared"] = "true"
        config.setdefault("replica", str(role is metadata.Role.REPLICA).lower())
        self.client = self.server.start(**config)

    def reached(self, point: str) -> None:
        if point == "create_shell":
            self.stop()
            self.serve()
        if point == "revived":
            (guest,) = self.machine.hypervisor.guests.values()
            with guest.lock:
                self.at_revival = (guest.answered, self.server.target.read_bytes())

    def write(self, guest: MemoryGuest, number: int) -> None:
        assert self.client is not None
        self.client.write(SECTOR * (number + 1), _NUMBER.pack(number) * 64)
        self.client.write(0, _NUMBER.pack(guest.answered))

    def stop(self) -> None:
        if self.client is not None:
            self.client.close()
            self.client = None
        self.server.stop(signal.SIGKILL)


class DiskPair(Pair):
    """Two hosts, and a guest with a disk on a.

    :param storages: of each host, in shared mode
    """

    def __init__(
        self, folder: Path, storages: dict[str, Path] | None = None, **changes: Any
    ) -> None:
        super().__init__(folder, guest="none", **changes)
        self.name = "web"
        self.a.hypervisor.destroy_domain("none")
        self.sides = {
            name: Side(folder, each, storages[name] if storages else None)
            for name, each in self.machines.items()
        }
        for name, machine in self.machines.items():
            machine.locate = self.locate(name)
        disk = Disk(51712, "xvda", TARGET, writable=True, shared=storages is not None)
        self.guest = self.a.hypervisor.boot("web", disks=[disk])

    def locate(self, name: str) -> Callable[[str], Path]:
        """Both hosts have the target at the same path; here, each in its own folder."""
        target = self.sides[name].server.target
        return lambda path: target if path == TARGET else Path(path)

    def __enter__(self) -> DiskPair:
        super().__enter__()
        return self

    def __exit__(self, *given: object) -> None:
        super().__exit__(*given)
        for side in self.sides.values():
            side.stop()

    def power_cut(self, name: str) -> None:
        """A host is gone, and its disk's server with it."""
        self.machines[name].power_cut()
        self.sides[name].stop()

    def power_on(self, machine: Machine) -> None:
        """A host comes back, without guests; its disk is as it was."""
        side = self.sides[machine.name]
        machine.power_on()
        machine.hypervisor.write_disk = side.write
        machine.hypervisor.reached = side.reached

    def check_disk(self, data: bytes, requests: int) -> None:
        """The disk holds exactly the first ``requests`` requests."""
        assert _NUMBER.unpack_from(data)[0] == requests
        sectors = b"".join(_NUMBER.pack(number) * 64 for number in range(requests))
        assert data[SECTOR : SECTOR + len(sectors)] == sectors
        assert not any(data[SECTOR + len(sectors) : SECTOR * 2000]), "a write of a later epoch"

    def check_revival(self, name: str) -> None:
        """What the guest remembered when it came to life is what its disk held then."""
        side = self.sides[name]
        await_true(lambda: side.at_revival, "the guest has come to life")
        assert side.at_revival is not None
        self.check_disk(side.at_revival[1], side.at_revival[0])
