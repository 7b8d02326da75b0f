# SPDX-License-Identifier: Apache-2.0
"""The configuration file, ``/etc/kemari/kemari.toml``, as checked data classes.

Every key has a default; a key that is not known, has the wrong type or is out of range is an error
that names the key and says what was expected.  ``docs/configuration.md`` is the reference.
"""

from __future__ import annotations

import dataclasses
import re
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kemari.errors import ConfigError
from kemari.pace import ADAPTIVE, PACES

DEFAULT_PATH: Final = Path("/etc/kemari/kemari.toml")
DEFAULT_PORT: Final = 7799

#: What to do with the guest's output when the standby is lost and does not answer.
STANDBY_LOSS_POLICIES: Final = ("release", "hold")
COMPRESSIONS: Final = ("none", "lz4", "zstd")
#: Least and greatest ``interval_ms``.
INTERVAL_MS: Final = (10, 60_000)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """A TCP address, written ``host:port`` or ``[v6]:port``."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(untrusted_text: str, *, default_port: int | None = DEFAULT_PORT) -> Address:
    """Parse ``host``, ``host:port``, ``[v6]`` or ``[v6]:port``.

    :param default_port: the port when the text has none; ``None`` makes the port obligatory
    :raise ConfigError: when the text is none of these
    """
    match = re.fullmatch(
        r"(?:\[(?P<six>[0-9A-Fa-f:.%\w-]+)\]|(?P<host>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?",
        untrusted_text,
    )
    port: int | None = None
    if match:
        port = int(match["port"]) if match["port"] else default_port
    if match is None or port is None or port > 65535 or len(untrusted_text) > 300:
        raise ConfigError(f"{untrusted_text[:80]!r} is not an address; expected host:port")
    return Address(match["six"] or match["host"], port)


@dataclass(frozen=True, slots=True)
class Tls:
    """Mutual TLS of the replication link; all three files or none."""

    cert: Path
    key: Path
    ca: Path


@dataclass(frozen=True, slots=True)
class Paths:
    """Where things are kept.

    :ivar state: durable state: ledger and event log
    :ivar run: control socket
    """

    state: Path = Path("/var/lib/kemari")
    run: Path = Path("/run/kemari")

    @property
    def socket(self) -> Path:
        """The control socket."""
        return self.run / "kemarid.sock"

    @property
    def ledger(self) -> Path:
        """Folder of the ownership records, one file per guest."""
        return self.state / "guests"

    @property
    def log(self) -> Path:
        """The event log, JSON lines."""
        return self.state / "events.jsonl"


@dataclass(frozen=True, slots=True)
class Config:
    """Checked configuration; units in the names.

    :ivar host: this host's name in messages and in ``kemari status``
    :ivar listen: addresses for replication; the first is what peers connect to
    :ivar also: further addresses at which this host is reachable (other networks)
    :ivar peers: addresses of hosts by name, so that ``kemari start GUEST NAME`` works
    :ivar heartbeat_ms: silence on every path for this long means that the other host is dead
    :ivar interval_ms: longest time between two checkpoints of an idle guest
    :ivar on_standby_loss: fate of held output when the standby is lost and does not answer
    :ivar pace: one of :data:`kemari.pace.PACES`
    :ivar compression: of replicated pages
    :ivar reference_percent: share of a guest's memory that the primary keeps a copy of at most
    :ivar buffer_limit: bytes of held output per guest above which the guest is stalled
    :ivar disk_rate: bytes per second at which a disk is copied at most; 0 for no limit
    :ivar resume: a restarted daemon protects the guests again that it protected before
    :ivar reprotect: a guest that came here by a failover is protected again, to where it came from
    """

    host: str = ""
    listen: tuple[Address, ...] = (Address("0.0.0.0", DEFAULT_PORT),)
    also: tuple[Address, ...] = ()
    peers: Mapping[str, tuple[Address, ...]] = field(default_factory=dict)
    heartbeat_ms: int = 1000
    interval_ms: int = 1000
    on_standby_loss: str = "release"
    pace: str = ADAPTIVE
    compression: str = "lz4"
    reference_percent: int = 100
    buffer_limit: int = 16 << 20
    disk_rate: int = 0
    resume: bool = True
    reprotect: bool = True
    tls: Tls | None = None
    paths: Paths = field(default_factory=Paths)

    @property
    def heartbeat(self) -> float:
        """Heartbeat time-out in seconds."""
        return self.heartbeat_ms / 1000

    def resolve_peer(self, untrusted_text: str) -> tuple[Address, ...]:
        """Addresses of a standby given by name (from ``[peers]``) or by address, best first.

        :raise ConfigError: when it is neither
        """
        known = self.peers.get(untrusted_text)
        return known if known else (parse_address(untrusted_text),)


@dataclass(frozen=True, slots=True)
class Options:
    """Options of ``kemari start``.

    :ivar interval_ms: longest time between two checkpoints
    :ivar interval_only: checkpoints by the timer only, not for held output
    :ivar pace: one of :data:`kemari.pace.PACES`
    :ivar compression: of replicated pages
    """

    interval_ms: int = 1000
    interval_only: bool = False
    pace: str = ADAPTIVE
    compression: str = "lz4"


# ---- Reading --------------------------------------------------------------------------------


class _Table:
    """A TOML table that is taken apart key by key; what is left over is an error."""

    def __init__(self, untrusted: Mapping[str, Any], where: str) -> None:
        self._rest = dict(untrusted)
        self._where = where

    def _name(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def take(self, key: str, kind: type, default: Any) -> Any:
        value = self._rest.pop(key, default)
        if value is default:
            return value
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(
                f"{self._name(key)} is {_toml_type(value)}; expected {_TOML_TYPES[kind]}"
            )
        return value

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        value: int = self.take(key, int, default)
        if not low <= value <= high:
            raise ConfigError(f"{self._name(key)} is {value}; expected {low} to {high}")
        return value

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        value: str = self.take(key, str, default)
        if value not in allowed:
            raise ConfigError(
                f"{self._name(key)} is {value!r}; expected one of {', '.join(allowed)}"
            )
        return value

    def addresses(self, key: str, default: tuple[Address, ...]) -> tuple[Address, ...]:
        values: list[Any] | None = self.take(key, list, None)
        if values is None:
            return default
        found = []
        for value in values:
            if not isinstance(value, str):
                raise ConfigError(
                    f"{self._name(key)} holds {_toml_type(value)}; expected addresses as strings"
                )
            try:
                found.append(parse_address(value))
            except ConfigError as error:
                raise ConfigError(f"{self._name(key)}: {error}") from None
        return tuple(found)

    def path(self, key: str, default: Path | None) -> Path:
        text: str | None = self.take(key, str, None)
        if text is None:
            if default is None:
                raise ConfigError(f"{self._name(key)} is missing; expected a path")
            return default
        if not text.startswith("/"):
            raise ConfigError(f"{self._name(key)} is {text!r}; expected an absolute path")
        return Path(text)

    def table(self, key: str) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = self.take(key, dict, None)
        return found

    def names(self) -> list[str]:
        return list(self._rest)

    def end(self) -> None:
        if self._rest:
            names = ", ".join(sorted(self._name(key) for key in self._rest))
            raise ConfigError(f"{names} is not a known key")


_TOML_TYPES: Final = {
    bool: "true or false",
    int: "a whole number",
    str: "a string",
    list: "a list",
    dict: "a table",
}


def _toml_type(value: object) -> str:
    for kind, name in _TOML_TYPES.items():
        if isinstance(value, kind):
            return name
    return f"a {type(value).__name__}"


def parse(untrusted: Mapping[str, Any]) -> Config:
    """Check a parsed TOML document.

    :raise ConfigError: naming the first key that is wrong, and what was expected
    """
    table = _Table(untrusted, "")
    host = table.take("host", str, "") or socket.gethostname().partition(".")[0]
    if not _NAME.match(host):
        raise ConfigError(
            f"host is {host[:80]!r}; expected letters, digits, dot, dash or underscore, at most 63"
        )
    listen = table.addresses("listen", Config.__dataclass_fields__["listen"].default)  # type: ignore[arg-type]
    if not listen:
        raise ConfigError("listen is empty; expected at least one address")
    config = Config(
        host=host,
        listen=listen,
        also=table.addresses("also", ()),
        peers=_peers(table.table("peers")),
        heartbeat_ms=table.integer("heartbeat_ms", 1000, 200, 60_000),
        interval_ms=table.integer("interval_ms", 1000, *INTERVAL_MS),
        on_standby_loss=table.choice("on_standby_loss", "release", STANDBY_LOSS_POLICIES),
        pace=table.choice("pace", ADAPTIVE, PACES),
        compression=table.choice("compression", "lz4", COMPRESSIONS),
        reference_percent=table.integer("reference_percent", 100, 1, 100),
        buffer_limit=table.integer("buffer_limit", 16 << 20, 1 << 16, 1 << 30),
        disk_rate=table.integer("disk_rate", 0, 0, 1 << 40),
        resume=table.take("resume", bool, True),
        reprotect=table.take("reprotect", bool, True),
        tls=_tls(table.table("tls")),
        paths=_paths(table.table("paths")),
    )
    table.end()
    return config


def _peers(untrusted: Mapping[str, Any] | None) -> dict[str, tuple[Address, ...]]:
    if untrusted is None:
        return {}
    table = _Table(untrusted, "peers")
    peers = {}
    for name in table.names():
        peers[name] = table.addresses(name, ())
        if not _NAME.match(name) or not peers[name]:
            raise ConfigError(f"peers.{name} is empty; expected a host name and its addresses")
    return peers


def _tls(untrusted: Mapping[str, Any] | None) -> Tls | None:
    if untrusted is None:
        return None
    table = _Table(untrusted, "tls")
    tls = Tls(table.path("cert", None), table.path("key", None), table.path("ca", None))
    table.end()
    return tls


def _paths(untrusted: Mapping[str, Any] | None) -> Paths:
    if untrusted is None:
        return Paths()
    table = _Table(untrusted, "paths")
    defaults = Paths()
    found = {
        each.name: table.path(each.name, getattr(defaults, each.name))
        for each in dataclasses.fields(Paths)
    }
    table.end()
    return Paths(**found)


def load(path: Path = DEFAULT_PATH) -> Config:
    """Read and check a configuration file; a missing default file means all defaults.

    :raise ConfigError: naming the file and what is wrong with it
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        if path == DEFAULT_PATH:
            return parse({})
        raise ConfigError(f"{path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return parse(tomllib.loads(text.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
