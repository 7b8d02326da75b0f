# SPDX-License-Identifier: Apache-2.0
"""What the command line can ask of the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from checkpoint.driver import Disk
from kemari import __version__
from kemari.config import COMPRESSIONS, INTERVAL_MS, Options
from kemari.control import Progress
from kemari.disks import SourceDisks
from kemari.errors import NoSuchProtection, Refused
from kemari.ledger import Record, Role
from kemari.leftovers import disk_folders
from kemari.pace import PACES

if TYPE_CHECKING:
    from kemari.daemon import Daemon

MAX_TEXT = 300
MAX_LOG = 10_000


class Arguments:
    """The untrusted arguments of a request, taken one by one."""

    def __init__(self, untrusted: dict[str, Any]) -> None:
        self._untrusted = untrusted

    def text(self, key: str, default: str | None = None) -> str:
        """A non-empty string, or the default."""
        value = self._untrusted.get(key, default)
        if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT or not value.isprintable():
            if default is not None and value == default:
                return default
            raise Refused(f"{key} is not a proper text")
        return value

    def number(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number within bounds."""
        value = self._untrusted.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise Refused(f"{key} is {str(value)[:40]}; expected {low} to {high}")
        return value

    def choice(self, key: str, default: str, allowed: Sequence[str]) -> str:
        """One of some words."""
        value = self.text(key, default)
        if value not in allowed:
            raise Refused(f"{key} is {value!r}; expected {', '.join(allowed)}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._untrusted.get(key, default)
        if not isinstance(value, bool):
            raise Refused(f"{key} is not true or false")
        return value


Operation = Callable[[Arguments, Progress], Awaitable[Any]]


class Requests:
    """Carries out requests of the control socket."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._operations: dict[str, Operation] = {
            "ping": self._ping,
            "ping-peer": self._ping_peer,
            "check": self._check,
            "start": self._start,
            "stop": self._stop,
            "failover": self._failover,
            "forget": self._forget,
            "status": self._status,
            "list": self._list,
            "log": self._log,
        }

    async def handle(self, operation: str, untrusted: dict[str, Any], progress: Progress) -> Any:
        """See :data:`kemari.control.Handler`."""
        known = self._operations.get(operation)
        if known is None:
            raise Refused(f"{operation[:40]!r} is not an operation of kemarid {__version__}")
        return await known(Arguments(untrusted), progress)

    async def _ping(self, arguments: Arguments, progress: Progress) -> Any:
        config = self._daemon.host.config
        return {
            "host": config.host,
            "version": __version__,
            "hypervisor": self._daemon.host.hypervisor.name,
            "addresses": list(self._daemon.host.advertised),
            "peers": list(config.peers),
        }

    async def _ping_peer(self, arguments: Arguments, progress: Progress) -> Any:
        standby = self._daemon.host.config.resolve_peer(arguments.text("standby"))
        link, address = await self._daemon.host.connect_any(standby, "liveness")
        await link.close()
        return {
            "host": link.peer.host,
            "software": link.peer.software,
            "address": str(address),
        }

    async def _check(self, arguments: Arguments, progress: Progress) -> Any:
        domain = arguments.text("domain")
        name = await self._daemon.name_of(domain)
        known = self._daemon.protections.get(name)
        if known is not None and not known.machine.over:
            # Its memory and dirty log are in use; that it is protected says enough.
            return {"guest": name, "state": known.state}
        # Not tracked, so there is nothing to undo; untrack would let a paused guest run.
        source = await asyncio.to_thread(self._daemon.host.hypervisor.open_source, domain)
        await self._check_disks(source.disks)
        return {"guest": source.description.name, "pages": source.description.pages}

    async def _check_disks(self, disks: Sequence[Disk]) -> None:
        """:raise Refused: one of them has no server that could replicate it"""
        host = self._daemon.host
        found = SourceDisks(host.config.paths.run, host.locate, lambda why: None, _no_event)
        try:
            await found.open(disks)
        finally:
            await found.teardown()

    async def _start(self, arguments: Arguments, progress: Progress) -> Any:
        config = self._daemon.host.config
        domain = arguments.text("domain")
        options = Options(
            interval_ms=arguments.number("interval_ms", config.interval_ms, *INTERVAL_MS),
            interval_only=arguments.flag("interval_only"),
            pace=arguments.choice("pace", config.pace, PACES),
            compression=arguments.choice("compression", config.compression, COMPRESSIONS),
        )
        standby = config.resolve_peer(arguments.text("standby"))
        name = await self._daemon.name_of(domain)
        protection = self._daemon.under_way(name, standby, options)
        if protection is None:
            protection = await self._daemon.protect(domain, standby, options)
            # A client that goes away does not end the protection that it has asked for.
            self._daemon.host.spawn_quiet(protection.establish(), f"{domain}: start")
        if arguments.flag("wait", True):
            await protection.established(lambda figures: progress(figures.as_json()))
        return protection.status()

    async def _stop(self, arguments: Arguments, progress: Progress) -> Any:
        name = await self._daemon.name_of(arguments.text("domain"))
        said = await self._daemon.stop(name, force=arguments.flag("force"))
        return {"guest": name, "text": said}

    async def _failover(self, arguments: Arguments, progress: Progress) -> Any:
        name = await self._daemon.name_of(arguments.text("domain"))
        for session in self._daemon.sessions.values():
            if session.guest == name:
                raise Refused(
                    f"{name} runs on {session.primary}; expected it here, where it is to leave from"
                )
        protection = self._daemon.protections.get(name)
        if protection is None or protection.machine.over:
            raise NoSuchProtection(f"{name} is not protected on {self._daemon.host.config.host}")
        started = time.monotonic()
        await protection.failover()
        return {
            "guest": name,
            "host": protection.route.name,
            "generation": protection.generation + 1,
            "seconds": round(time.monotonic() - started, 3),
        }

    async def _forget(self, arguments: Arguments, progress: Progress) -> Any:
        name = await self._daemon.name_of(arguments.text("domain"))
        return await self._daemon.forget(name, force=arguments.flag("force"))

    async def _status(self, arguments: Arguments, progress: Progress) -> Any:
        wanted = arguments.text("domain", "")
        if not wanted:
            return await self._all()
        name = await self._daemon.name_of(wanted)
        for status in await self._all():
            if status["guest"] == name or status["uuid"] == wanted:
                return [status]
        raise NoSuchProtection(f"{name} is not protected on {self._daemon.host.config.host}")

    async def _list(self, arguments: Arguments, progress: Progress) -> Any:
        keys = ("guest", "role", "state", "protected", "peer", "generation")
        return [{key: status[key] for key in keys} for status in await self._all()]

    async def _all(self) -> list[dict[str, Any]]:
        """Everything that is known here, one entry for each guest."""
        daemon = self._daemon
        found = [recovery.status() for recovery in daemon.recoveries.values()]
        found += [session.status() for session in daemon.sessions.values() if session.uuid]
        begun = [each for each in daemon.protections.values() if not each.only_tried]
        found += [protection.status() for protection in begun]
        known = {status["guest"] for status in found}
        tried = (each.guest for each in daemon.protections.values() if each.only_tried)
        attempts = filter(None, map(daemon.host.ledger.by_name, tried))
        for record in (*daemon.again.values(), *attempts):
            if record.guest not in known:
                known.add(record.guest)
                again = f"{record.reason}; to be protected again when {record.peer} is back"
                found.append(_remembered(record) | {"why": again})
        here = {name for _, name in await asyncio.to_thread(daemon.host.hypervisor.domains)}
        for record in daemon.host.ledger:
            if record.guest in known:
                continue
            took_over = record.role is Role.OWNER and record.came_from and record.guest in here
            if record.role is Role.MOVED or took_over or await self._keeps_disks(record):
                found.append(_remembered(record))
        for status in found:
            status["host"] = daemon.host.config.host
            record_of = daemon.host.ledger.get(status["uuid"])
            status["came_from"] = record_of.came_from if record_of else ""
        return sorted(found, key=lambda status: str(status["guest"]))

    async def _keeps_disks(self, record: Record) -> bool:
        """Whether this host stood by for a guest, and its disks' copies are still nobody else's."""
        paths = self._daemon.host.config.paths
        return record.role is Role.RELEASED and bool(
            await asyncio.to_thread(disk_folders, paths, record)
        )

    async def _log(self, arguments: Arguments, progress: Progress) -> Any:
        guest = arguments.text("domain", "")
        journal = self._daemon.host.journal
        last = arguments.number("last", 1000, 1, MAX_LOG)
        entries = await asyncio.to_thread(lambda: journal.read(guest, last=last))
        if not arguments.flag("follow"):
            return entries
        for entry in entries:
            progress(entry)
        forget = journal.listen(
            lambda entry: progress(entry) if not guest or entry["guest"] == guest else None
        )
        with contextlib.closing(_Forget(forget)):
            await asyncio.get_running_loop().create_future()


def _no_event(event: str, text: str) -> None:
    """Nobody is told: a disk was only looked at."""


class _Forget:
    """Makes a function closeable."""

    def __init__(self, forget: Callable[[], None]) -> None:
        self.close = forget


def _remembered(record: Record) -> dict[str, Any]:
    """The status of a guest that only the ledger knows, or that is to be protected again."""
    role, state = {
        Role.MOVED: ("moved", "moved"),
        Role.RELEASED: ("none", "released"),
    }.get(record.role, ("owner", "unprotected"))
    return {
        "guest": record.guest,
        "uuid": record.uuid,
        "role": role,
        "state": state,
        "protected": False,
        "peer": record.peer,
        "generation": record.generation,
        "since": round(record.changed, 3),
        "why": record.reason,
    }
