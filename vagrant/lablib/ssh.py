# SPDX-License-Identifier: Apache-2.0
"""Commands on the hosts, over one lasting ssh connection to each.

A login takes seconds when the host is emulated; a command over a connection that is there already
takes a fraction of one.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vagrant.lablib.errors import LabError
from vagrant.lablib.network import HOSTS, MANAGEMENT_ADDRESS, Network

CONFIG = """\
Host *
    User root
    IdentityFile key
    IdentitiesOnly yes
    UserKnownHostsFile known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    CheckHostIP no
    PreferredAuthentications publickey
    ConnectTimeout 120
    LogLevel ERROR
    ControlPath ctl-%n
    ControlMaster no
    ServerAliveInterval 30
    ServerAliveCountMax 10
"""


@dataclass(frozen=True, slots=True)
class Result:
    """What a command on a host came to.

    :ivar status: its exit status; 255 also stands for a connection that broke
    """

    status: int
    stdout: str
    stderr: str


class Ssh:
    """Ways into the hosts of one lab.

    ssh is always run in the state folder, with relative names: the name of a socket must be short.
    """

    def __init__(self, state: Path, network: Network) -> None:
        self._state = state
        self._network = network

    def set_up(self, key: Path, host_key: str) -> None:
        """Write what ssh needs to know, and pin the hosts' key.

        :param key: the private key
        :param host_key: the hosts' public key, type and text
        """
        config = CONFIG
        for name in HOSTS:
            config += f"Host {name}\n    HostName {MANAGEMENT_ADDRESS[name]}\n"
        (self._state / "ssh_config").write_text(config)
        own = self._state / "key"
        own.unlink(missing_ok=True)
        own.touch(mode=0o600)
        own.write_text(key.read_text())
        names = ",".join([*MANAGEMENT_ADDRESS.values(), *HOSTS])
        (self._state / "known_hosts").write_text(f"{names} {host_key}\n")

    def argv(self, host: str, *options: str) -> list[str]:
        """The words of an ssh command to a host; to be run in the state folder."""
        return [*self._network.enter(), "ssh", "-F", "ssh_config", *options, host]

    def connect(self, host: str) -> None:
        """Open the lasting connection.

        :raises LabError: the host does not let us in
        """
        self.disconnect(host)
        options = ["-o", "ControlMaster=yes", "-o", "ControlPersist=yes", "-N", "-f"]
        with (self._state / f"ssh-{host}.log").open("w") as log:
            # The connection stays in the background and must not hold on to our own output.
            done = subprocess.run(
                self.argv(host, *options),
                cwd=self._state,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=300,
                check=False,
            )
        if done.returncode != 0:
            said = (self._state / f"ssh-{host}.log").read_text()
            raise LabError(f"Host {host} is up but does not let ssh in.", said)

    def disconnect(self, host: str) -> None:
        """Close the lasting connection, if there is one; commands in it end with status 255."""
        control = self._state / f"ctl-{host}"
        if control.exists():
            argv = self.argv(host, "-O", "exit")
            subprocess.run(argv, cwd=self._state, capture_output=True, timeout=60, check=False)
            control.unlink(missing_ok=True)

    def run(self, host: str, command: str, *, timeout: float = 300, stdin: bytes = b"") -> Result:
        """Run a shell command on a host to its end.

        :raises LabError: it took longer than ``timeout`` seconds
        """
        try:
            done = subprocess.run(
                [*self.argv(host), command],
                cwd=self._state,
                input=stdin,
                capture_output=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LabError(
                f"The command on host {host} did not end within {timeout:.0f} s: {command}"
            ) from None
        return Result(
            done.returncode,
            done.stdout.decode(errors="replace"),
            done.stderr.decode(errors="replace"),
        )

    def interactive(self, host: str, command: Sequence[str]) -> int:
        """Run a command, or a shell, with our own standard input and output."""
        options = [] if command else ["-t"]
        return subprocess.run(
            [*self.argv(host, *options), *command], cwd=self._state, check=False
        ).returncode
