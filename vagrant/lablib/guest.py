# SPDX-License-Identifier: Apache-2.0
"""The demo's guest: what it is made of, its configuration, and waiting for its service."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vagrant.lablib import programs
from vagrant.lablib.command import check_programs, run
from vagrant.lablib.errors import LabError
from vagrant.lablib.image import HERE, LayerFile, guest_initramfs
from vagrant.lablib.initramfs import Entry, Modules, program
from vagrant.lablib.network import GUEST_IPV4, MAX_GUESTS, Network, guest_mac
from vagrant.lablib.recipe import GUEST_MODULES

NAME = "demo"
ECHO_PORT = 7777
COMMAND_PORT = 7070
FOLDER = "root/guest"
EXTRA = "console=hvc0 quiet xen.fifo_events=0 clocksource=tsc tsc=reliable"
START_TIMEOUT = 300.0
DATABASE_PORT = 6379
#: What the guest's databases write to; the same path on both hosts.
DATA = f"/{FOLDER}/data.img"
MAKE_FS = "mkfs.ext4 -q -F -m 0 -J size=4"
#: Bytes that nobody needs, for measurements.
SCRATCH = f"/{FOLDER}/scratch.img"
#: What the service consists of beside its own source.
DEMO = ("-pthread", str(HERE / "guest" / "io.c"))


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """What the guest is like.

    :ivar number: which of several guests it is; only the first, 0, may have disks
    :ivar vcpus: number of virtual CPUs
    :ivar memory_mib: its memory
    :ivar extra: its kernel's command line
    :ivar disk_mib: size of its disk, on which databases write; 0: it has none
    :ivar scratch_mib: size of a further disk, ``xvdc``, with nothing on it; 0: it has none
    :ivar benchmark: it has the benchmark's loads, and a database that keeps everything in memory
    :ivar storage: block device that both hosts reach, to be that disk; "": each has a file
    :ivar kernel: None for Dom0's own kernel, or a folder on this machine that holds
        ``boot/vmlinuz-VERSION`` and ``lib/modules/VERSION`` as a Debian kernel package does
    """

    number: int = 0
    vcpus: int = 1
    memory_mib: int = 128
    extra: str = EXTRA
    kernel: Path | None = None
    disk_mib: int = 0
    scratch_mib: int = 0
    benchmark: bool = False
    storage: str = ""

    @property
    def name(self) -> str:
        """What xl calls it."""
        return f"{NAME}{self.number or ''}"

    @property
    def config_path(self) -> str:
        """Its configuration in a host, below ``/``."""
        return f"root/guest{self.number or ''}.cfg"

    def check(self) -> None:
        """:raises LabError: there cannot be such a guest"""
        if not 0 <= self.number < MAX_GUESTS:
            raise LabError(f"No guest {self.number} in a lab; expected 0 to {MAX_GUESTS - 1}.")
        if self.number and (self.disk_mib or self.scratch_mib):
            raise LabError(f"The guest {self.name} cannot have disks; expected the first, {NAME}.")


class Dom0(Protocol):
    """Where the guest's kernel and user space come from."""

    @property
    def guest_kernel(self) -> str:
        """Where its kernel is, as guests are to boot it."""
        ...

    @property
    def guest_modules(self) -> list[Entry]:
        """That kernel's drivers for a guest, in loading order."""
        ...

    @property
    def busybox(self) -> bytes:
        """A statically linked busybox."""
        ...

    @property
    def disk(self) -> Path:
        """An image of its root file system."""
        ...


class Installed:
    """This machine's own system as a :class:`Dom0`.

    :param tree: where the modules of its kernels are
    :raises LabError: it has no kernel with modules, or no busybox
    """

    def __init__(self, tree: Path = Path("/lib/modules")) -> None:
        folders = sorted(tree.glob("*/modules.dep"), key=os.path.getmtime)
        if not folders:
            raise LabError(f"{tree} holds no kernel's modules; expected those of Debian's kernel.")
        self.guest_kernel = f"/boot/vmlinuz-{folders[-1].parent.name}"
        self.guest_modules = Modules(folders[-1].parent).entries(GUEST_MODULES)
        busybox = shutil.which("busybox")
        if busybox is None:
            raise LabError("There is no busybox; expected Debian's busybox-static.")
        self.busybox = Path(busybox).read_bytes()

    @property
    def disk(self) -> Path:
        """:raises LabError: always, for a running system is no image"""
        raise LabError("A guest with the benchmark's programs needs the lab; see docs/lab.md.")


def compile_program(name: str, *more: str) -> bytes:
    """Compile one of the guest's programs; linked statically, it needs nothing else in the guest.

    :param name: of its source in ``vagrant/guest``, without ``.c``
    :param more: other sources and libraries, as words for the compiler
    :raises LabError: there is no C compiler, or it failed
    """
    check_programs(["gcc"])
    with tempfile.TemporaryDirectory(prefix=f"kemari-{name}-") as work:
        out, source = Path(work) / name, HERE / "guest" / f"{name}.c"
        run(["gcc", "-static", "-O2", "-s", "-std=c11", "-o", out, source, *more])
        return out.read_bytes()


def config(options: GuestOptions, kernel: str) -> str:
    """The guest's configuration for xl.

    :param kernel: path of its kernel in Dom0
    """
    text = (HERE / "guest" / "guest.cfg").read_text()
    extra = options.extra + (f" number={options.number}" if options.number else "")
    text = text.replace("@NAME@", options.name).replace("@MAC@", guest_mac(options.number))
    text = text.replace("@KERNEL@", kernel).replace("@EXTRA@", extra)
    text = text.replace("@MEMORY@", str(options.memory_mib)).replace("@VCPUS@", str(options.vcpus))
    target = f"shared:{options.storage}" if options.storage else DATA
    disks = []
    if options.disk_mib:
        disks.append(f"vdev=xvda,access=rw,target={target}")
        disks.append(f"vdev=xvdb,access=ro,target=/{programs.PLACE}")
    if options.scratch_mib:
        disks.append(f"vdev=xvdc,access=rw,target={SCRATCH}")
    lines = [f'    "script=block-kemari,{disk}",\n' for disk in disks]
    return text + (f"disk = [\n{''.join(lines)}]\n" if disks else "")


def _foreign_kernel(folder: Path) -> tuple[bytes, list[Entry]]:
    kernels = sorted((folder / "boot").glob("vmlinuz-*"))
    if len(kernels) != 1:
        raise LabError(f"{folder}/boot holds {len(kernels)} kernels (vmlinuz-*); expected one.")
    version = kernels[0].name.removeprefix("vmlinuz-")
    tree = folder / "lib" / "modules" / version
    if not tree.is_dir():
        tree = folder / "usr" / "lib" / "modules" / version
    return kernels[0].read_bytes(), Modules(tree).entries(GUEST_MODULES)


def guest_layer(base: Dom0, options: GuestOptions) -> dict[str, LayerFile]:
    """The guest's files in a host.

    :raises LabError: the kernel asked for is not there, or the service cannot be compiled
    """
    files: dict[str, LayerFile] = {}
    if options.kernel is None:
        kernel, modules = base.guest_kernel, base.guest_modules
    else:
        image, modules = _foreign_kernel(options.kernel)
        kernel = f"/{FOLDER}/vmlinuz"
        files[f"{FOLDER}/vmlinuz"] = LayerFile(image)
    user_space = [program("bin/demo", compile_program("demo", *DEMO))]
    if options.disk_mib:
        transactions = compile_program("transactions", "-lsqlite3", "-lm")
        user_space.append(program("bin/transactions", transactions))
    if options.benchmark:
        user_space.append(program("bin/load", compile_program("load", "-lz")))
        user_space += programs.entries(base.disk)
    initramfs = guest_initramfs(base.busybox, modules, user_space)
    files[f"{FOLDER}/initramfs"] = LayerFile(initramfs)
    files[options.config_path] = LayerFile(config(options, kernel).encode(), stat.S_IFREG | 0o644)
    return files


# Run in the namespace.  A connection attempt waits in the kernel while nobody answers for the
# address; only a refusal comes back at once.
_PROBE = """
import socket, sys, time
address, port, timeout = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
end = time.monotonic() + timeout
while (left := end - time.monotonic()) > 0:
    try:
        with socket.create_connection((address, port), timeout=min(left, 20)) as service:
            service.settimeout(max(left, 1))
            service.sendall(b"probe\\n")
            if service.recv(100).startswith(b"probe 1 "):
                sys.exit(0)
    except (ConnectionRefusedError, ConnectionResetError):
        time.sleep(0.2)
    except OSError:
        pass
sys.exit(1)
"""


def wait_for_service(
    network: Network, timeout: float = START_TIMEOUT, address: str = GUEST_IPV4
) -> None:
    """Wait until the guest's service answers a client outside the hosts.

    :raises LabError: it did not within ``timeout`` seconds
    """
    probe = ["python3", "-c", _PROBE, address, str(ECHO_PORT), str(timeout)]
    if subprocess.run([*network.enter(), *probe], check=False).returncode != 0:
        raise LabError(
            f"The guest's service at {address} port {ECHO_PORT} did not answer "
            f"within {timeout:.0f} s."
        )
