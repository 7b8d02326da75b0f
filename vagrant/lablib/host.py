# SPDX-License-Identifier: Apache-2.0
"""One Xen host: a QEMU process, its disk and its console."""

from __future__ import annotations

import os
import re
import select
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from vagrant.lablib.command import run
from vagrant.lablib.errors import LabError
from vagrant.lablib.network import ALL_LINKS, HOSTS, Network, tap
from vagrant.lablib.process import Remembered

# Under emulation a busy machine can take many times as long as an idle one.
BOOT_TIMEOUT = 600.0
TAIL_LINES = 40

# `-cpu max` does not work in software emulation: with SMAP Xen crashes Dom0, with RDTSCP PVH guests
# are killed.  SVM with nested paging is what gives Xen its dirty log.  QEMU 7.2 emulates CMPXCHG16B
# wrongly, so it is left out: see "What emulation means" in docs/lab.md.
CPU = "qemu64,+svm,+npt,+nrip-save,-vgif,+ssse3,+sse4.1,+sse4.2,+popcnt,-cx16"


@dataclass(frozen=True, slots=True)
class Machine:
    """What a host's hardware is like.

    :ivar memory_mib: all memory
    :ivar dom0_mib: what Dom0 has of it; the rest is for guests
    :ivar cpus: number of physical CPUs
    :ivar dom0_cpus: so many of them are Dom0's, and no guest's; 0: it shares all with guests
    """

    memory_mib: int = 1792
    dom0_mib: int = 900
    cpus: int = 1
    dom0_cpus: int = 0

    @classmethod
    def for_guest(cls, memory_mib: int) -> Machine:
        """As usual, with memory for a guest of any size, and for what Xen keeps of it."""
        usual = cls()
        more = max(0, memory_mib - (usual.memory_mib - usual.dom0_mib) // 2)
        return cls(memory_mib=usual.memory_mib + more + more // 32)

    def check(self) -> None:
        """:raises LabError: there cannot be such a machine"""
        if self.cpus < 1:
            raise LabError(f"A host cannot have {self.cpus} CPUs; expected at least one.")
        if not 0 <= self.dom0_cpus < self.cpus:
            raise LabError(
                f"Dom0 cannot have {self.dom0_cpus} of {self.cpus} CPUs to itself; expected at "
                "least one for guests."
            )


class Host:
    """A host of one lab; files are in its own folder within the lab's state folder."""

    def __init__(self, name: str, state: Path, network: Network) -> None:
        self.name = name
        self._state = state
        self._relative = Path(f"host-{name}")
        self._folder = state / self._relative
        self._network = network
        self._process = Remembered(self._folder / "qemu.json")

    @property
    def is_running(self) -> bool:
        """Whether it has power."""
        return self._process.pid is not None

    @property
    def pid(self) -> int | None:
        """Number of its QEMU process, or None without power."""
        return self._process.pid

    @property
    def console_log(self) -> Path:
        """Everything that Xen, Dom0's kernel and its first program printed, all boots."""
        return self._folder / "console.log"

    def fresh_disk(self) -> None:
        """Forget what the host wrote to its disk since the lab began."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self.console_log.unlink(missing_ok=True)
        overlay = self._folder / "disk.qcow2"
        overlay.unlink(missing_ok=True)
        run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "../dom0.img", overlay],
            timeout=60,
        )

    def power_on(self, machine: Machine) -> Booting:
        """Start it.

        :raises LabError: QEMU could not be started
        """
        folder = self._relative
        pid_file = self._folder / "qemu.pid"
        pid_file.unlink(missing_ok=True)
        console = self._folder / "console.sock"
        console.unlink(missing_ok=True)
        seen = self.console_log.stat().st_size if self.console_log.exists() else 0
        kernel = f"base/vmlinuz console=hvc0 quiet net.ifnames=0 panic=5 labname={self.name}"
        xen = (
            f"com1=115200,8n1 console=com1 dom0_mem={machine.dom0_mib}M,max:{machine.dom0_mib}M "
            "loglvl=warning"
        )
        if machine.dom0_cpus:
            xen += f" dom0_max_vcpus={machine.dom0_cpus} dom0_vcpus_pin"
            kernel += f" labguests={machine.dom0_cpus}-{machine.cpus - 1}"
        argv = ["qemu-system-x86_64", "-name", f"host {self.name}", "-nodefaults"]
        argv += ["-display", "none", "-no-reboot", "-daemonize", "-pidfile", f"{folder}/qemu.pid"]
        argv += ["-accel", "tcg,tb-size=256", "-cpu", CPU]
        argv += ["-smp", str(machine.cpus), "-m", str(machine.memory_mib)]
        # Relative names: QEMU's multiboot loader splits at commas and blanks.
        argv += ["-kernel", "base/xen.elf", "-append", xen]
        argv += ["-initrd", f"{kernel},base/initramfs"]
        # cache=unsafe leaves out fsync on this machine's disk, which does not lose power.
        argv += ["-drive", f"file={folder}/disk.qcow2,if=virtio,format=qcow2,cache=unsafe"]
        argv += ["-chardev"]
        argv += [
            f"socket,id=console,path={folder}/console.sock,server=on,wait=off,"
            f"logfile={folder}/console.log,logappend=on"
        ]
        argv += ["-serial", "chardev:console"]
        for number, link in enumerate(ALL_LINKS):
            mac = f"52:54:00:7{number}:00:0{HOSTS.index(self.name) + 1}"
            interface = tap(self.name, link)
            argv += ["-netdev", f"tap,id={link},ifname={interface},script=no,downscript=no"]
            argv += ["-device", f"virtio-net-pci,netdev={link},mac={mac}"]
        run([*self._network.enter(), *argv], cwd=self._state, timeout=120)
        self._process.note(int(pid_file.read_text()))
        return Booting(self, seen)

    def power_cut(self) -> bool:
        """Take the power away at once: SIGKILL, no goodbye on any connection.

        :returns: whether it had power
        """
        return self._process.kill()

    def console_tail(self, lines: int = TAIL_LINES) -> str:
        """The end of the console log."""
        try:
            text = self.console_log.read_bytes().decode(errors="replace")
        except FileNotFoundError:
            return "(nothing on the console)"
        return "\n".join(text.replace("\r", "").splitlines()[-lines:])

    def open_console(self) -> socket.socket:
        """Connect to the running host's console.

        :raises LabError: it has no power
        """
        if not self.is_running:
            raise LabError(f"Host {self.name} has no power; `lab boot {self.name}` starts it.")
        # The name of a socket is limited to 108 bytes (unix(7)); that of a folder is not.
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        near = os.open(self._folder, os.O_PATH | os.O_DIRECTORY)
        try:
            connection.connect(f"/proc/self/fd/{near}/console.sock")
        finally:
            os.close(near)
        return connection


class Booting:
    """A host on its way up.

    :param seen: length of the console log, in bytes, when it got power
    """

    def __init__(self, host: Host, seen: int) -> None:
        self._host = host
        self._began = time.monotonic()
        self._seen = seen
        self._console = host.open_console()

    def wait(self, timeout: float = BOOT_TIMEOUT) -> float:
        """Wait until it says on its console that it is ready.

        :returns: seconds since it got power
        :raises LabError: it did not within ``timeout`` seconds, lost power, or said that it failed
        """
        host = self._host
        ready = re.compile(rb"^LAB HOST \w+ READY", re.MULTILINE)
        failed = re.compile(rb"^LAB FAILED: ([^\r\n]*)", re.MULTILINE)
        with self._console as console:
            while True:
                # The log has everything from the first byte on; the socket tells when to look.
                text = host.console_log.read_bytes()[self._seen :]
                if ready.search(text):
                    return time.monotonic() - self._began
                reason = failed.search(text)
                if reason:
                    said = reason.group(1).decode(errors="replace")
                    raise LabError(f"Host {host.name} did not come up: {said}.", self._tail())
                left = self._began + timeout - time.monotonic()
                if left <= 0 or not select.select([console], [], [], left)[0]:
                    raise LabError(
                        f"Host {host.name} did not say that it is ready within {timeout:.0f} s.",
                        self._tail(),
                    )
                if not console.recv(65536):
                    raise LabError(f"Host {host.name} went off while it booted.", self._tail())

    def _tail(self) -> str:
        path = self._host.console_log
        return f"The end of {path}:\n{self._host.console_tail()}"
