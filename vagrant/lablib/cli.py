# SPDX-License-Identifier: Apache-2.0
"""The lab as a command."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vagrant.lablib.command import extend_path, say
from vagrant.lablib.errors import LabError
from vagrant.lablib.guest import GuestOptions
from vagrant.lablib.host import Machine
from vagrant.lablib.lab import DEFAULT_SUITE, Lab, Options
from vagrant.lablib.network import HOSTS, LINKS
from vagrant.lablib.recipe import NEEDED, RECIPES


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Options that are understood before and after the command's name."""
    suppress = argparse.SUPPRESS
    parser.add_argument(
        "--state", type=Path, default=suppress, metavar="DIR", help="folder of the lab (lab-state)"
    )
    parser.add_argument(
        "--suite", choices=list(RECIPES), default=suppress, help=f"Debian in Dom0 ({DEFAULT_SUITE})"
    )


def _add_guest_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("guest")
    default = GuestOptions()
    group.add_argument("--guest-vcpus", type=int, metavar="N", help=f"({default.vcpus})")
    group.add_argument("--guest-memory", type=int, metavar="MIB", help=f"({default.memory_mib})")
    group.add_argument(
        "--guest-kernel",
        type=Path,
        metavar="DIR",
        help="folder with boot/vmlinuz-* and lib/modules/* (Dom0's kernel)",
    )
    group.add_argument(
        "--guest-disk", type=int, metavar="MIB", help="size of a disk with a database on it (none)"
    )
    group.add_argument(
        "--guest-benchmark",
        action="store_true",
        default=None,
        help="with the benchmark's loads, and a database in memory",
    )
    group.add_argument("--guest-extra", metavar="TEXT", help=f'kernel options ("{default.extra}")')


def _guest_options(args: argparse.Namespace, given: GuestOptions) -> GuestOptions:
    kernel = args.guest_kernel
    return GuestOptions(
        vcpus=given.vcpus if args.guest_vcpus is None else args.guest_vcpus,
        memory_mib=given.memory_mib if args.guest_memory is None else args.guest_memory,
        extra=given.extra if args.guest_extra is None else args.guest_extra,
        kernel=given.kernel if kernel is None else kernel.absolute(),
        disk_mib=given.disk_mib if args.guest_disk is None else args.guest_disk,
        benchmark=given.benchmark if args.guest_benchmark is None else args.guest_benchmark,
    )


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    _add_options(common)
    parser = argparse.ArgumentParser(
        prog="lab", description="Two Xen hosts in software emulation.", parents=[common]
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help_text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help_text, description=help_text, parents=[common])

    def host(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("host", choices=HOSTS, metavar="HOST", help=" or ".join(HOSTS))
        return sub

    build = command("build", "build the hosts' disk, as far as it is not in the cache")
    _add_guest_options(build)
    up = command("up", "bring both hosts up, from fresh disks")
    machine = Machine()
    up.add_argument(
        "--no-project", action="store_true", help="leave the project under test out of the hosts"
    )
    up.add_argument("--host-cpus", type=int, default=machine.cpus, help="(%(default)s)")
    up.add_argument(
        "--dom0-cpus",
        type=int,
        default=machine.dom0_cpus,
        metavar="N",
        help="of these, for Dom0 alone; 0: it shares all with guests (%(default)s)",
    )
    up.add_argument("--host-memory", type=int, default=machine.memory_mib, help="MiB (%(default)s)")
    _add_guest_options(up)
    command("install", "put the project as it is now onto the running hosts")
    command("reset", "plug links, boot hosts, destroy guests, restart kemarid")
    command("down", "take everything down; logs stay")
    status = command("status", "show what runs")
    status.add_argument("--json", action="store_true")
    ssh = host(command("ssh", "run a command, or a shell, on a host"))
    ssh.add_argument("argv", nargs=argparse.REMAINDER, metavar="CMD")
    console = host(command("console", "show a host's console log"))
    console.add_argument("-f", "--follow", action="store_true", help="and what comes")
    host(command("power-cut", "take a host's power away"))
    host(command("boot", "give a host its power back"))
    for name, text in (("unplug", "make a link silent"), ("plug", "have a link carry again")):
        sub = host(command(name, text))
        sub.add_argument("link", choices=LINKS, metavar="LINK", help=" or ".join(LINKS))
    command("logs", "show where logs are, and the end of each")
    net = command("net", "run a command at the client's place, outside both hosts")
    net.add_argument("argv", nargs=argparse.REMAINDER, metavar="CMD")
    guest = command("guest", "start or stop the guest on a host")
    guest.add_argument("action", choices=["start", "stop"])
    host(guest)
    _add_guest_options(guest)
    command("packages", "print the Debian packages that the lab needs on this machine")
    return parser


def _status(lab: Lab, as_json: bool) -> None:
    status = lab.status()
    if as_json:
        print(json.dumps(status, indent=2))
        return
    print(f"lab in {status['state']}: {'up' if status['up'] else 'down'}, suite {status['suite']}")
    for name, host in status["hosts"].items():
        power = f"power on (process {host['pid']})" if host["power"] else "no power"
        cut = f", unplugged: {' '.join(host['unplugged'])}" if host["unplugged"] else ""
        print(f"host {name}: {power}{cut}")


def _logs(lab: Lab) -> None:
    for name, host in lab.hosts.items():
        print(f"==> {host.console_log} <==\n{host.console_tail(20)}")
        if host.is_running:
            files = "/var/log/kemari/*.log /var/log/xen/*.log"
            shown = lab.ssh(name, f"tail -n 20 {files}", check=False)
            print(f"==> host {name} <==\n{shown.stdout}")


def _console(lab: Lab, name: str, follow: bool) -> None:
    host = lab.host(name)
    sys.stdout.write(host.console_tail(10**9) + "\n")
    if follow:
        sys.stdout.flush()
        with host.open_console() as console:
            while data := console.recv(65536):
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()


def _run(args: argparse.Namespace) -> int:
    lab = Lab(getattr(args, "state", None))
    suite: str = getattr(args, "suite", DEFAULT_SUITE)
    match args.command:
        case "build":
            lab.build(Options(suite, guest=_guest_options(args, GuestOptions())))
        case "up":
            machine = Machine(
                memory_mib=args.host_memory, cpus=args.host_cpus, dom0_cpus=args.dom0_cpus
            )
            guest = _guest_options(args, GuestOptions())
            lab.up(Options(suite, machine, guest, project=not args.no_project))
        case "install":
            lab.install()
        case "reset":
            lab.reset()
        case "down":
            lab.down()
        case "status":
            _status(lab, args.json)
        case "ssh":
            if not lab.host(args.host).is_running:
                raise LabError(f"Host {args.host} has no power; `lab boot {args.host}` starts it.")
            return lab.ssh_client.interactive(args.host, args.argv)
        case "console":
            _console(lab, args.host, args.follow)
        case "power-cut":
            lab.power_cut(args.host)
        case "boot":
            lab.boot(args.host)
        case "unplug":
            lab.unplug(args.host, args.link)
        case "plug":
            lab.plug(args.host, args.link)
        case "logs":
            _logs(lab)
        case "net":
            argv = args.argv or [os.environ.get("SHELL", "/bin/sh")]
            return subprocess.run(lab.net_argv(argv), check=False).returncode
        case "guest":
            if args.action == "start":
                given = lab.options.guest
                wanted = _guest_options(args, given)
                lab.guest_start(args.host, None if wanted == given else wanted)
                say("the guest's service answers")
            else:
                lab.guest_stop(args.host)
        case "packages":
            print(" ".join(NEEDED))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    extend_path()
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except LabError as error:
        if error.details:
            say(error.details.rstrip())
        width = shutil.get_terminal_size().columns
        say(f"{'-' * min(width, 20)}\nlab: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
