# SPDX-License-Identifier: Apache-2.0
"""Native code touches nothing but its buffers: run under the sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"


@pytest.mark.parametrize(
    ("name", "said"), [("pages_fuzz", "damaged batches"), ("standstill_fuzz", "standstills")]
)
def test_native_code_under_sanitizers(tmp_path: Path, name: str, said: str) -> None:
    """``PAGES_FUZZ_ROUNDS`` and ``PAGES_FUZZ_SEED`` in the environment ask for more or others."""
    program = tmp_path / name
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run(
        [
            *compiler,
            *f"-std=c11 -g -O1 -Wall -Wextra -Werror {SANITIZERS}".split(),
            f"-I{HERE.parents[1] / 'checkpoint'}",
            # One of them does not need all of the loops.
            "-Wno-unused-function",
            str(HERE / f"{name}.c"),
            "-o",
            str(program),
        ],
        check=True,
    )
    rounds = os.environ.get("PAGES_FUZZ_ROUNDS", "2000")
    seed = os.environ.get("PAGES_FUZZ_SEED", "20261121")
    done = subprocess.run([str(program), rounds, seed], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
