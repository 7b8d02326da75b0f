# SPDX-License-Identifier: Apache-2.0
"""Running other programs, and saying what is going on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from vagrant.lablib.errors import LabError
from vagrant.lablib.recipe import NEEDED

# Debian does not put these into an ordinary user's PATH.
SYSTEM_PATH = ("/usr/sbin", "/sbin")


def extend_path() -> None:
    """Make programs such as mkfs.ext4 and ip findable for an ordinary user."""
    have = os.environ.get("PATH", os.defpath).split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join([*have, *(p for p in SYSTEM_PATH if p not in have)])


def check_programs(packages: Sequence[str]) -> None:
    """Check that the programs of these Debian packages are there.

    :raises LabError: one is not, with the package that has it
    """
    missing = [p for p in packages if any(shutil.which(x) is None for x in NEEDED[p])]
    if missing:
        raise LabError(
            f"The lab needs the Debian package{'s' if len(missing) > 1 else ''} "
            f"{', '.join(missing)}: apt-get install --no-install-recommends {' '.join(missing)}"
        )


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    stdin: str = "",
    timeout: float = 600,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a program to its end and return what it printed.

    :param stdin: text that it reads
    :param timeout: seconds that it may take
    :param env: variables set in addition to our own
    :raises LabError: it could not be run, failed, or took longer than ``timeout`` seconds
    """
    words = [str(a) for a in argv]
    name = Path(words[0]).name
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            input=stdin,
            timeout=timeout,
            env={**os.environ, **(env or {})},
            text=True,
            errors="replace",
            capture_output=True,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        printed = late.stderr or late.stdout or b""
        text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        raise LabError(f"{name} did not end within {timeout:.0f} s.", text[-4000:]) from None
    except OSError as error:
        raise LabError(f"{name} could not be run: {error.strerror}.") from None
    if done.returncode != 0:
        raise LabError(
            f"{name} failed with exit status {done.returncode}.",
            f"command: {' '.join(words)}\n{(done.stdout + done.stderr)[-4000:]}",
        )
    return done.stdout


def say(text: str) -> None:
    """Tell the user what is going on; standard output is kept for results."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def step(text: str) -> Iterator[None]:
    """Tell the user that something takes its time, and afterwards how much of it."""
    say(f"{text} ...")
    begin = time.monotonic()
    yield
    say(f"{text}: done in {time.monotonic() - begin:.1f} s")


def rooted(argv: Sequence[str | Path]) -> list[str]:
    """The command, run such that our own files look as if they belonged to root."""
    words = [str(a) for a in argv]
    return words if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", *words]
