# SPDX-License-Identifier: Apache-2.0
"""The whole lab: two hosts, their network, the guest, and the project under test in them."""

from __future__ import annotations

import fcntl
import json
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vagrant.lablib import guest as guests
from vagrant.lablib.command import check_programs, say, step
from vagrant.lablib.errors import LabError
from vagrant.lablib.guest import GuestOptions, guest_layer, wait_for_service
from vagrant.lablib.host import Host, Machine
from vagrant.lablib.image import (
    Base,
    Layer,
    LayerFile,
    build_base,
    host_layer,
    layer_digest,
    tar_of,
    write_disk,
)
from vagrant.lablib.network import HOSTS, LINKS, Network, guest_addresses
from vagrant.lablib.project import project_layer
from vagrant.lablib.recipe import NEEDED, recipe_for
from vagrant.lablib.ssh import Result, Ssh

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DEFAULT_SUITE = "bookworm"
LISTING = "usr/lib/kemari-lab/files"


@dataclass(frozen=True, slots=True)
class Options:
    """What can be chosen when a lab is brought up.

    :ivar suite: Debian's release in Dom0
    :ivar machine: what the hosts are like
    :ivar guest: what the guest is like
    :ivar project: whether the project under test is installed in the hosts
    """

    suite: str = DEFAULT_SUITE
    machine: Machine = field(default_factory=Machine)
    guest: GuestOptions = field(default_factory=GuestOptions)
    project: bool = True

    def to_json(self) -> str:
        """Text that :meth:`from_json` reads."""
        return json.dumps(asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Options:
        """The options that :meth:`to_json` wrote."""
        read: dict[str, Any] = json.loads(text)
        kernel = read["guest"].pop("kernel")
        return cls(
            read["suite"],
            Machine(**read["machine"]),
            GuestOptions(**read["guest"], kernel=Path(kernel) if kernel else None),
            read["project"],
        )


class Lab:
    """One lab; all that is known of it is in its state folder.

    :param state: the state folder, made when needed
    """

    def __init__(self, state: Path | None = None) -> None:
        self.state = (state or REPOSITORY / "lab-state").absolute()
        self.network = Network(self.state)
        self.ssh_client = Ssh(self.state, self.network)
        self.hosts = {name: Host(name, self.state, self.network) for name in HOSTS}

    # ---- options, locking ----

    @property
    def _options_file(self) -> Path:
        return self.state / "options.json"

    @property
    def options(self) -> Options:
        """What the lab was brought up with.

        :raises LabError: it never was
        """
        try:
            return Options.from_json(self._options_file.read_text())
        except FileNotFoundError:
            raise LabError(f"There is no lab in {self.state}; `lab up` starts one.") from None

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.state.mkdir(parents=True, exist_ok=True)
        with (self.state / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def host(self, name: str) -> Host:
        """A host by its name.

        :raises LabError: there is none of that name
        """
        if name not in self.hosts:
            raise LabError(f"No host {name!r} in the lab; expected {' or '.join(HOSTS)}.")
        return self.hosts[name]

    # ---- building ----

    def build(self, options: Options) -> Base:
        """Build the base of a suite and this lab's disk, as far as they are not there already.

        While the lab is up its disk stays as it is; `install` changes what is on the hosts.

        :raises LabError: something needed is missing or failed
        """
        check_programs(list(NEEDED))
        with self._lock():
            base = build_base(recipe_for(options.suite))
            layer = self._layer(base, options)
            if not self.network.is_up:
                self._write_disk(base, layer)
        return base

    def _layer(self, base: Base, options: Options) -> dict[str, LayerFile]:
        """Everything above the base, and a list of it."""
        layer = {**host_layer(), **guest_layer(base, options.guest)}
        if options.project:
            layer.update(project_layer(REPOSITORY, base.recipe, self.state))
        listing = "".join(f"{path}\n" for path in sorted(layer))
        layer[LISTING] = LayerFile(listing.encode())
        return layer

    def _write_disk(self, base: Base, layer: Layer) -> None:
        digest = f"{base.folder.name} {layer_digest(layer)}"
        noted = self.state / "dom0.digest"
        disk = self.state / "dom0.img"
        if not disk.exists() or not noted.exists() or noted.read_text() != digest:
            with step("installing project and guest into Dom0's disk"):
                noted.unlink(missing_ok=True)
                write_disk(base, layer, disk)
                noted.write_text(digest)

    # ---- up and down ----

    def up(self, options: Options) -> None:
        """Bring the lab up, from fresh disks; hosts without power are booted if it is up already.

        :raises LabError: a host did not come up or is impossible, or the lab runs with another
            suite
        """
        check_programs(list(NEEDED))
        options.machine.check()
        with self._lock():
            running = [host for host in self.hosts.values() if host.is_running]
            if running and self.network.is_up:
                if self.options.suite != options.suite:
                    raise LabError(
                        f"The lab in {self.state} is up with suite {self.options.suite}; take it "
                        "down first, or name another folder with --state."
                    )
            else:
                self._down()
                base = build_base(recipe_for(options.suite))
                self._write_disk(base, self._layer(base, options))
                self._options_file.write_text(options.to_json())
                link = self.state / "base"
                link.unlink(missing_ok=True)
                link.symlink_to(base.folder)
                self.ssh_client.set_up(base.key, base.host_key)
                for host in self.hosts.values():
                    host.fresh_disk()
                self.network.up()
            self._boot([name for name in HOSTS if not self.hosts[name].is_running])

    def _boot(self, names: Sequence[str]) -> None:
        if not names:
            return
        machine = self.options.machine
        booting = {name: self.hosts[name].power_on(machine) for name in names}

        def wait(name: str) -> None:
            seconds = booting[name].wait()
            self.ssh_client.connect(name)
            say(f"host {name} is up after {seconds:.0f} s")

        self._on_hosts(names, wait)

    def boot(self, name: str) -> None:
        """Give a host its power back and wait until it is up; its disk is as it was.

        :raises LabError: it has power, or did not come up
        """
        host = self.host(name)
        with self._lock():
            if host.is_running:
                raise LabError(f"Host {name} has power already.")
            self.network.enter()
            self._boot([name])

    def power_cut(self, name: str) -> None:
        """Take a host's power away: SIGKILL of its QEMU, no goodbye on any connection.

        :raises LabError: it has none
        """
        host = self.host(name)
        if not host.power_cut():
            raise LabError(f"Host {name} has no power already.")
        self.ssh_client.disconnect(name)

    def _down(self) -> None:
        for name, host in self.hosts.items():
            host.power_cut()
            if self.network.is_up:
                self.ssh_client.disconnect(name)
        self.network.down()

    def down(self) -> None:
        """Take everything down; logs stay."""
        with self._lock():
            self._down()

    # ---- use ----

    def _link(self, link: str) -> str:
        if link not in LINKS:
            raise LabError(f"No link {link!r} in the lab; expected {' or '.join(LINKS)}.")
        return link

    def unplug(self, name: str, link: str) -> None:
        """Make a link of a host silent, in both directions.

        :raises LabError: there is no such host or link, or the lab is down
        """
        self.network.set_link(self.host(name).name, self._link(link), plugged=False)

    def plug(self, name: str, link: str) -> None:
        """Have a link of a host carry again.

        :raises LabError: there is no such host or link, or the lab is down
        """
        self.network.set_link(self.host(name).name, self._link(link), plugged=True)

    def ssh(
        self,
        name: str,
        command: str,
        *,
        check: bool = True,
        timeout: float = 300,
        stdin: bytes = b"",
    ) -> Result:
        """Run a shell command on a host to its end.

        :param check: raise if its exit status is not 0
        :param timeout: seconds that it may take
        :raises LabError: the host has no power, or the command failed or took too long
        """
        if not self.host(name).is_running:
            raise LabError(f"Host {name} has no power; `lab boot {name}` starts it.")
        result = self.ssh_client.run(name, command, timeout=timeout, stdin=stdin)
        if check and result.status != 0:
            raise LabError(
                f"The command on host {name} failed with exit status {result.status}: {command}",
                (result.stdout + result.stderr)[-4000:],
            )
        return result

    def net_argv(self, argv: Sequence[str]) -> list[str]:
        """The command that runs this one at the client's place, outside both hosts."""
        return [*self.network.enter(), *argv]

    def run_in_net(
        self, argv: Sequence[str], *, check: bool = True, timeout: float = 300
    ) -> Result:
        """Run a program at the client's place to its end.

        :raises LabError: the lab is down, or the program failed or took too long
        """
        try:
            done = subprocess.run(
                self.net_argv(argv),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LabError(
                f"The client's program did not end within {timeout:.0f} s: {' '.join(argv)}"
            ) from None
        if check and done.returncode != 0:
            raise LabError(
                f"The client's program failed with exit status {done.returncode}: {' '.join(argv)}",
                (done.stdout + done.stderr)[-4000:],
            )
        return Result(done.returncode, done.stdout, done.stderr)

    # ---- the guest ----

    def guest_start(self, name: str, options: GuestOptions | None = None) -> None:
        """Create the guest on a host and wait until its service answers.

        :param options: other than those the lab was brought up with
        :raises LabError: it is impossible, could not be created, or did not answer
        """
        wanted = options or self.options.guest
        wanted.check()
        if options is not None:
            self.write(name, guest_layer(self._base(), options))
        self._make_disks(name, wanted)
        self.ssh(name, f"xl create /{wanted.config_path}")
        try:
            wait_for_service(self.network, address=guest_addresses(wanted.number)[0])
        except LabError as error:
            shown = self.ssh(name, f"xl list; tail -n 30 /var/log/xen/xl-{wanted.name}*.log")
            raise LabError(str(error), shown.stdout) from None

    def _make_disks(self, name: str, options: GuestOptions) -> None:
        """The guest's disks: on the host where it starts, and as much room on the other.

        :raises LabError: a host has no room or no power
        """
        for host in HOSTS if options.disk_mib or options.scratch_mib else ():
            steps = [f"rm -f {guests.DATA} {guests.SCRATCH}"]
            if options.disk_mib and not options.storage:
                steps.append(f"truncate -s {options.disk_mib}M {guests.DATA}")
            if options.disk_mib and host == name:
                steps.append(f"{guests.MAKE_FS} {options.storage or guests.DATA}")
            if options.scratch_mib:
                # Written, because holes are read without a disk.
                steps.append(f"head -c {options.scratch_mib}M /dev/zero >{guests.SCRATCH}")
            self.ssh(host, " && ".join([*steps, "sync"]))

    def guest_stop(self, name: str, *, timeout: float = 300) -> None:
        """Ask the guest on a host to shut down, and wait until it is gone.

        :raises LabError: it is not there, or did not shut down
        """
        # xl does not wait until the toolstack has cleaned up, which is when the name is free again.
        gone = f"while xl domid {guests.NAME} >/dev/null 2>&1; do :; done"
        self.ssh(name, f"xl shutdown -w {guests.NAME} >/dev/null && {gone}", timeout=timeout)

    # ---- files and the project ----

    def write(self, name: str, layer: Layer) -> None:
        """Write files to a running host, so that they are there after a power cut, too.

        :raises LabError: they could not be written
        """
        self.ssh(name, "tar -x -f - -C / --no-same-owner && sync", stdin=tar_of(layer))

    def install(self) -> None:
        """Put the project as it is now onto the running hosts, and restart kemarid there.

        :raises LabError: no host runs, the project cannot be built or a host did not take it
        """
        with self._lock():
            names = [name for name in HOSTS if self.hosts[name].is_running]
            if not names:
                raise LabError("No host has power; `lab up` installs the project by itself.")
            options = replace(self.options, project=True)
            layer = self._layer(self._base(), options)

            def to_host(name: str) -> None:
                self.ssh(name, f"cd / && xargs -r rm -f -- < {LISTING}")
                self.write(name, layer)
                self.ssh(name, "/usr/lib/kemari-lab/kemarid-up")

            self._on_hosts(names, to_host)

    def reset(self, *, reprotect: bool = True, heartbeat_ms: int = 1000) -> None:
        """Make a lab that was used ready for the next use, in seconds.

        Links are plugged, hosts have power, no guest is left, and kemarid runs without a memory of
        what was protected.

        :param reprotect: whether a guest is protected again, by itself, after a failover
        :param heartbeat_ms: silence that means death
        :raises LabError: the lab is down, or a host did not do it
        """
        with self._lock():
            for name in HOSTS:
                for link in LINKS:
                    self.network.set_link(name, link, plugged=True)
            self._boot([name for name in HOSTS if not self.hosts[name].is_running])
            lines = [f"reprotect = {str(reprotect).lower()}", f"heartbeat_ms = {heartbeat_ms}"]
            command = shlex.join(["/usr/lib/kemari-lab/reset", *lines])
            self._on_hosts(HOSTS, lambda name: self.ssh(name, command))

    def _on_hosts(self, names: Sequence[str], action: Callable[[str], object]) -> None:
        with ThreadPoolExecutor() as pool:
            for waiting in [pool.submit(action, name) for name in names]:
                waiting.result()

    def _base(self) -> Base:
        """What this lab was brought up from, also if the recipe was changed since."""
        return Base((self.state / "base").resolve(), recipe_for(self.options.suite))

    def status(self) -> dict[str, Any]:
        """What there is and how it is, as JSON values."""
        try:
            suite: str | None = self.options.suite
        except LabError:
            suite = None
        is_up = self.network.is_up
        return {
            "state": str(self.state),
            "suite": suite,
            "up": is_up,
            "hosts": {
                name: {
                    "power": host.is_running,
                    "pid": host.pid,
                    "unplugged": self.network.unplugged(name) if is_up else [],
                }
                for name, host in self.hosts.items()
            },
        }
