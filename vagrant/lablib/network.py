# SPDX-License-Identifier: Apache-2.0
"""The lab's network: a namespace of its own, which is also the client's place outside the hosts.

Root makes a network namespace, an ordinary user first a user namespace in which it may.  Nothing is
changed in the machine's own network, and any number of labs use the same addresses side by side.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from vagrant.lablib.command import run
from vagrant.lablib.errors import LabError
from vagrant.lablib.process import Remembered

HOSTS = ("a", "b")
LINKS = ("lan", "repl")
# A third one, for the lab's own ssh only, so that a host with unplugged links can be looked at.
ALL_LINKS = (*LINKS, "mgmt")

LAN_ADDRESS = {"a": "10.77.0.1", "b": "10.77.0.2"}
MANAGEMENT_ADDRESS = {"a": "10.79.0.1", "b": "10.79.0.2"}
GUEST_IPV4 = "10.77.0.10"
GUEST_IPV6 = "fd77::10"
#: Guests that a lab may have at once.
MAX_GUESTS = 10

HOLD = "echo ready; exec >&-; exec sleep infinity"
TUN = Path("/dev/net/tun")


def guest_addresses(number: int) -> tuple[str, str]:
    """(IPv4, IPv6) addresses of a guest, numbered from 0 to :data:`MAX_GUESTS` - 1."""
    return GUEST_IPV4.removesuffix("0") + str(number), GUEST_IPV6.removesuffix("0") + str(number)


def guest_mac(number: int) -> str:
    """MAC address of a guest, numbered likewise."""
    return f"00:16:3e:77:00:1{number}"


def tap(host: str, link: str) -> str:
    """Name of the network device that is the other end of a host's link."""
    return f"{host}-{link}"


def _commands() -> str:
    """What makes the network, as one batch for ip(8)."""
    lines = ["link set lo up"]
    for link in ALL_LINKS:
        lines.append(f"link add {link} type bridge mcast_snooping 0")
    # No router and no duplicates here: addresses are usable at once.
    lines += [
        "link set lan addrgenmode none",
        "addr add 10.77.0.254/24 dev lan",
        "addr add fd77::254/64 dev lan nodad",
        "link set repl addrgenmode none",
        "link set mgmt addrgenmode none",
        "addr add 10.79.0.254/24 dev mgmt",
    ]
    for host in HOSTS:
        for link in ALL_LINKS:
            name = tap(host, link)
            lines.append(f"tuntap add dev {name} mode tap")
            lines.append(f"link set {name} addrgenmode none master {link} up")
    lines += [f"link set {link} up" for link in ALL_LINKS]
    return "\n".join(lines) + "\n"


class Network:
    """The namespace of one lab.

    :param folder: the lab's state folder
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._holder = Remembered(folder / "network.json")

    @property
    def is_up(self) -> bool:
        """Whether the namespace is there."""
        return self._holder.pid is not None

    def up(self) -> None:
        """Make the namespace and everything in it, if it is not there.

        :raises LabError: this machine or user may not make it
        """
        if self.is_up:
            return
        if not os.access(TUN, os.R_OK | os.W_OK):
            raise LabError(
                f"{TUN} cannot be opened for reading and writing by this user; Debian's udev "
                "gives it mode 0666."
            )
        # The holder says "ready" from inside and then does nothing for ever; it is in no way tied
        # to the command that started it.
        holder = subprocess.Popen(
            [*self._unshare(), "sh", "-c", HOLD],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=(self._folder / "network.log").open("w"),
            start_new_session=True,
            cwd="/",
            text=True,
        )
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            raise LabError(
                "This user may not make a network namespace; expected "
                f"`{' '.join(self._unshare())} true` to work.",
                (self._folder / "network.log").read_text(),
            )
        self._holder.note(holder.pid)
        try:
            run([*self.enter(), "ip", "-batch", "-"], stdin=_commands(), timeout=60)
        except LabError as error:
            self._holder.kill()
            raise LabError(
                "The lab's network could not be made in its namespace.", f"{error}\n{error.details}"
            ) from None

    def down(self) -> None:
        """Remove the namespace; the network in it goes with it."""
        self._holder.kill()

    def enter(self) -> list[str]:
        """Words that, put before a command, run it in the namespace.

        :raises LabError: the lab is down
        """
        pid = self._holder.pid
        if pid is None:
            raise LabError(f"The lab in {self._folder} is down; `lab up` starts it.")
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(pid), *user, "--net"]

    @staticmethod
    def _unshare() -> list[str]:
        # Root needs no user namespace, and some places (a chroot, say) do not allow one.
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        return ["unshare", *user, "--net"]

    def set_link(self, host: str, link: str, plugged: bool) -> None:
        """Connect or cut one link of a host, in both directions; its carrier stays on.

        :raises LabError: the lab is down
        """
        state = "up" if plugged else "down"
        run([*self.enter(), "ip", "link", "set", tap(host, link), state], timeout=60)

    def unplugged(self, host: str) -> list[str]:
        """The links of a host that are cut."""
        cut = []
        for link in LINKS:
            shown = run([*self.enter(), "ip", "-o", "link", "show", tap(host, link)], timeout=60)
            flags = shown.partition("<")[2].partition(">")[0].split(",")
            if "UP" not in flags:
                cut.append(link)
        return cut
