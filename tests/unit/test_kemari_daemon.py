# SPDX-License-Identifier: Apache-2.0
"""Daemon to daemon on the in-memory hypervisor: every decision, end to end."""

from __future__ import annotations

from pathlib import Path

from tests.unit.kemari_pair import Pair


def test_start_protects_and_output_waits_for_its_epoch(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        status = pair.protect()
        assert status["state"] == "protected"
        assert status["protected"] is True
        pair.talk(20)
        pair.check_answers()
        status = pair.a.status("web")
        assert status["statistics"]["checkpoints"] >= 20
        assert pair.b.status("web")["state"] == "ready"
