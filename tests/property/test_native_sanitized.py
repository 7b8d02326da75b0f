# SPDX-License-Identifier: Apache-2.0
"""The compiled loops touch nothing but their buffers: run under the sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"


def test_page_loops_under_sanitizers(tmp_path: Path) -> None:
    """``PAGES_FUZZ_ROUNDS`` and ``PAGES_FUZZ_SEED`` in the environment ask for more or others."""
    program = tmp_path / "pages_fuzz"
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run(
        [
            *compiler,
            *f"-std=c11 -g -O1 -Wall -Wextra -Werror {SANITIZERS}".split(),
            f"-I{HERE.parents[1] / 'checkpoint'}",
            str(HERE / "pages_fuzz.c"),
            "-o",
            str(program),
        ],
        check=True,
    )
    rounds = os.environ.get("PAGES_FUZZ_ROUNDS", "2000")
    seed = os.environ.get("PAGES_FUZZ_SEED", "20261121")
    done = subprocess.run([str(program), rounds, seed], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "damaged batches" in done.stdout
