# SPDX-License-Identifier: Apache-2.0
"""The lab made ready for a run, whether the guest is where it should be, and what is kept of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vagrant.demolib.hosts import DAEMON_LOG, Events, await_event, domains, kemari
from vagrant.lablib.command import say
from vagrant.lablib.errors import LabError
from vagrant.lablib.guest import DATA
from vagrant.lablib.guest import NAME as GUEST
from vagrant.lablib.lab import Lab, Options
from vagrant.lablib.network import HOSTS


@contextmanager
def ready(lab: Lab, options: Options, logs: Path, *, keep: bool = False) -> Iterator[None]:
    """A lab that is up and as new; afterwards its logs are in ``logs``, and it is down.

    A lab that is up already is made ready again, and stays up.

    :param keep: leave it up
    :raises LabError: it did not come up
    """
    was_up = lab.network.is_up
    logs.mkdir(parents=True, exist_ok=True)
    for name in HOSTS:
        kept_log(logs, name).unlink(missing_ok=True)
    try:
        lab.up(options)
        if was_up:
            say("the lab is up already: it is made ready again, and stays up afterwards")
            lab.install()
            lab.reset()
        for name in HOSTS:
            _await_daemon(lab, name)
        yield
    finally:
        keep_logs(lab, logs)
        if not keep and not was_up:
            lab.down()


def _await_daemon(lab: Lab, name: str) -> None:
    events = Events(lab, name)
    try:
        events.wait("daemon")
    finally:
        events.close()


def kept_log(folder: Path, name: str) -> Path:
    """Where the log of a host's daemon is kept."""
    return folder / f"kemarid-{name}.log"


def keep_logs(lab: Lab, folder: Path) -> None:
    """Fetch what the daemons logged, as far as their hosts have power."""
    for name, host in lab.hosts.items():
        if host.is_running:
            try:
                text = lab.ssh(name, f"cat {DAEMON_LOG}", timeout=60).stdout
                kept_log(folder, name).write_text(text)
            except (LabError, OSError) as error:
                say(f"the log of kemarid on host {name} could not be kept: {error}")


def misplaced(lab: Lab, owner: str) -> list[str]:
    """One sentence for everything that speaks against the guest being on this host alone.

    :raises LabError: the host has no power
    """
    return [
        f"`xl list` on host {name} has {', '.join(names) or 'no guest'}; "
        f"expected {GUEST if name == owner else 'no guest'}"
        for name in HOSTS
        if lab.hosts[name].is_running
        for names in [domains(lab, name)]
        if (GUEST in names) != (name == owner)
    ]


def other_role(lab: Lab, host: str, expected: str) -> list[str]:
    """One sentence if the daemon there has another role for the guest than expected."""
    role = kemari(lab, host, "status", GUEST).value[0]["role"]
    if role == expected:
        return []
    return [f"`kemari status` on host {host} says that its role is {role}; expected {expected}"]


#: The standby's disk as a power cut leaves it, once its journal was replayed: on a copy.
_REPLICA = "/root/guest/looked-at.img"
_REPLAY = f"cp {DATA} {_REPLICA} && {{ e2fsck -y -E journal_only {_REPLICA} || [ $? -lt 4 ]; }}"
#: The databases' programs want to write to what they look at.
_LOOKED_AT = "/root/guest/looked-at"
_TAKE_FILES = f"""
modprobe loop && rm -rf {_LOOKED_AT} && mkdir {_LOOKED_AT} &&
  mount -o loop,ro,noload {{image}} /mnt && cp -r /mnt/* {_LOOKED_AT} && umount /mnt
"""
_SQLITE_CHECK = """
import sqlite3, sys
for name in ("wal.db", "rollback.db"):
    found = sqlite3.connect(name).execute("PRAGMA integrity_check").fetchall()
    if found != [("ok",)]:
        sys.exit(f"{name}: {found}")
"""
#: What looks at a disk -> its command, in this order.
_LOOKS = {
    "e2fsck": "e2fsck -fn {image}",
    "taking the files": _TAKE_FILES,
    "redis-check-aof": f"cd {_LOOKED_AT} && redis-check-aof appendonlydir/appendonly.aof.manifest",
    "sqlite's check": f"cd {_LOOKED_AT} && python3 -c '{_SQLITE_CHECK}'",
}


def end_and_check_disks(lab: Lab, primary: str, standby: str) -> list[str]:
    """Shut the protected guest down and look at its disk on both hosts.

    On the one host the file system was left in good order, on the other as a power cut leaves it,
    with nothing of the shutdown's last moments.

    :return: one sentence for everything that is wrong with a file system or a database
    :raises LabError: the guest did not end in good order, or a host has no power
    """
    with _told_from_now(lab, primary, "ended"), _told_from_now(lab, standby, "stood-down"):
        lab.guest_stop(primary)
    if names := domains(lab, primary):
        return [f"host {primary} still has {', '.join(names)} after the guest has ended"]
    lab.ssh(standby, _REPLAY)
    found = []
    for name, image in ((primary, DATA), (standby, _REPLICA)):
        for what, command in _LOOKS.items():
            result = lab.ssh(name, command.replace("{image}", image), check=False)
            if result.status != 0:
                say(result.stdout[-2000:] + result.stderr[-2000:])
                found.append(f"{what} on host {name} ended with exit status {result.status}")
    return found


@contextmanager
def _told_from_now(lab: Lab, host: str, name: str) -> Iterator[None]:
    """What happens inside must have the daemon there tell of such an event."""
    now = float(lab.ssh(host, "date +%s.%N").stdout)
    yield
    await_event(lab, host, name, now)
