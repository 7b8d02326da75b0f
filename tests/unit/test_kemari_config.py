# SPDX-License-Identifier: Apache-2.0
"""The configuration: everything that is right is taken, everything else is named."""

from __future__ import annotations

import socket
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kemari.config import Address, Config, load, parse, parse_address
from kemari.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_an_empty_file_means_the_defaults() -> None:
    config = parse({})
    assert config.host == socket.gethostname().partition(".")[0]
    assert config.listen == (Address("0.0.0.0", 7799),)
    assert (config.heartbeat, config.interval_ms, config.on_standby_loss) == (1.0, 1000, "release")
    assert config.tls is None


def test_everything_is_read() -> None:
    config = parse(
        tomllib.loads(
            """
            host = "a"
            listen = ["10.78.0.1", "[fd00::1]:7000"]
            also = ["10.77.0.1:7799"]
            heartbeat_ms = 500
            interval_ms = 200
            on_standby_loss = "hold"
            pace = "throughput"
            compression = "zstd"
            reference_percent = 25
            buffer_limit = 1000000
            resume = false
            [peers]
            b = ["10.78.0.2"]
            [tls]
            cert = "/c"
            key = "/k"
            ca = "/a"
            [paths]
            state = "/s"
            """
        )
    )
    assert config.listen == (Address("10.78.0.1", 7799), Address("fd00::1", 7000))
    assert config.resolve_peer("b") == (Address("10.78.0.2", 7799),)
    assert config.resolve_peer("10.0.0.1:80") == (Address("10.0.0.1", 80),)
    assert config.heartbeat == 0.5
    assert config.reference_percent == 25
    assert config.pace == "throughput"
    assert config.tls is not None
    assert config.tls.ca == Path("/a")
    assert config.paths.ledger == Path("/s/guests")
    assert config.paths.socket == Path("/run/kemari/kemarid.sock")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("colour = 1", "colour is not a known key"),
        ("heartbeat_ms = 5", "heartbeat_ms is 5; expected 200 to 60000"),
        ("heartbeat_ms = true", "heartbeat_ms is true or false; expected a whole number"),
        ('heartbeat_ms = "1"', "heartbeat_ms is a string; expected a whole number"),
        ('resume = "yes"', "resume is a string; expected true or false"),
        ('on_standby_loss = "pray"', "expected one of release, hold"),
        ('pace = "fast"', "expected one of latency, adaptive, throughput"),
        ('compression = "gzip"', "expected one of none, lz4, zstd"),
        ('listen = "10.0.0.1"', "listen is a string; expected a list"),
        ("listen = []", "listen is empty"),
        ("listen = [1]", "listen holds a whole number; expected addresses as strings"),
        ('also = ["10.0.0.1:99999"]', "also: '10.0.0.1:99999' is not an address"),
        ('host = "a b"', "host is 'a b'; expected letters"),
        ('[tls]\ncert = "/c"', "tls.key is missing"),
        ('[tls]\ncert = "c"\nkey = "/k"\nca = "/a"', "tls.cert is 'c'; expected an absolute path"),
        ('[paths]\nrun = "/r"\ncellar = "/c"', "paths.cellar is not a known key"),
        ("[peers]\nb = []", "peers.b is empty"),
    ],
)
def test_what_is_wrong_is_named(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(tomllib.loads(text))
    assert problem in str(raised.value)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("host = ")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load(broken)
    broken.write_text("heartbeat_ms = 1")
    with pytest.raises(ConfigError, match=r"broken\.toml: heartbeat_ms is 1"):
        load(broken)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


def test_the_example_is_right_and_complete() -> None:
    path = ROOT / "dom0-tools" / "config" / "kemari.toml"
    assert load(path).host == "a"
    keys = set(Config.__dataclass_fields__)
    text = path.read_text()
    page = (ROOT / "docs" / "configuration.md").read_text()
    manual = (ROOT / "dom0-tools" / "man" / "kemari.toml.5").read_text()
    for key in keys:
        assert key in text, f"{key} is not in the example"
        assert f"`{key}`" in page or f"`[{key}]`" in page, f"{key} is not in the reference"
        assert key in manual, f"{key} is not in the manual page"


def test_every_commented_default_is_the_default() -> None:
    text = (ROOT / "dom0-tools" / "config" / "kemari.toml").read_text()
    lines = [line[2:] for line in text.splitlines() if line.startswith("# ") and " = " in line]
    defaults = [line for line in lines if line.split(" ")[0] in Config.__dataclass_fields__]
    assert len(defaults) >= 6
    assert parse(tomllib.loads("\n".join(defaults))) == parse({})


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = parse_address(text)
    except ConfigError:
        return
    assert parse_address(str(address)) == address
    assert 0 <= address.port <= 65535
