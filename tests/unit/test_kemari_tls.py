# SPDX-License-Identifier: Apache-2.0
"""Mutual TLS between two daemons: who has no certificate of the authority is told nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from kemari.config import Tls
from kemari.errors import ConfigError, KemariError
from kemari.host import tls_contexts
from tests.unit.kemari_pair import Pair

FOLDER = Path(__file__).parent / "tls"
OURS = Tls(FOLDER / "host-ours.pem", FOLDER / "host-ours.key", FOLDER / "ca-ours.pem")
THEIRS = Tls(FOLDER / "host-theirs.pem", FOLDER / "host-theirs.key", FOLDER / "ca-theirs.pem")


def test_a_power_cut_over_tls(tmp_path: Path) -> None:
    with Pair(tmp_path, tls=OURS) as pair:
        pair.protect()
        pair.talk(10)
        pair.a.power_cut()
        pair.talk(10)
        pair.check_answers()


@pytest.mark.parametrize("other", [None, THEIRS], ids=["plain", "another-authority"])
@pytest.mark.parametrize("host", ["a", "b"])
def test_a_stranger_is_refused(tmp_path: Path, host: str, other: Tls | None) -> None:
    with Pair(tmp_path, tls=OURS, tls_of={host: other}) as pair:
        with pytest.raises(KemariError, match="No kemarid answers"):
            pair.protect()
        pair.talk(3)
        pair.check_answers()
        assert not pair.b.hypervisor.shells


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"tls: .*none\.pem"):
        tls_contexts(Tls(FOLDER / "none.pem", OURS.key, OURS.ca))
