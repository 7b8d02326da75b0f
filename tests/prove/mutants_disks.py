# SPDX-License-Identifier: Apache-2.0
"""Broken rules of shared disks: who writes to what both hosts reach, and what of it comes back.

No simulated guest has a shared disk; a real nbdkit and the standby's end judge these.
"""

from __future__ import annotations

from typing import Final

from tests.prove.mutant import Edit, Mutant

_REPLICA: Final = "diskbuffer/shared.py"
_HELD: Final = "diskbuffer/held.py"
_TESTS: Final = ("tests/unit/test_shared_disk.py", "tests/property/test_shared_disk.py")
_DAEMONS: Final = ("tests/unit/test_kemari_shared.py",)

DISKS: Final[tuple[Mutant, ...]] = (
    Mutant(
        "shared-not-issued-again",
        "what a dead primary may not have issued is issued by the standby",
        (
            Edit(
                _REPLICA,
                "            for record, _end in self._sealed:\n",
                "            for record, _end in list(self._sealed)[:0]:\n",
            ),
        ),
        _TESTS,
    ),
    Mutant(
        "shared-out-of-order",
        "it is issued in order",
        (
            Edit(
                _REPLICA,
                "            for record, _end in self._sealed:\n",
                "            for record, _end in reversed(self._sealed):\n",
            ),
        ),
        _TESTS,
    ),
    Mutant(
        "shared-half-epoch",
        "a change of an epoch that was not acknowledged never reaches the target",
        (
            Edit(
                _REPLICA,
                "        self.discard()\n        await asyncio.to_thread(self._issue)\n",
                "        self._sealed += self._staged\n"
                "        await asyncio.to_thread(self._issue)\n",
            ),
        ),
        _TESTS,
    ),
    Mutant(
        "shared-forgotten-early",
        "the standby forgets what was issued, and no more",
        (
            Edit(
                _REPLICA,
                "        if self._issued != position:\n",
                "        if self._sealed:\n            self._sealed.popleft()\n"
                "        if self._issued != position:\n",
            ),
        ),
        _TESTS,
    ),
    Mutant(
        "shared-not-compared",
        "a standby that reaches another target acknowledges nothing",
        (
            Edit(
                _REPLICA,
                "            await asyncio.to_thread(self._compare, seen)\n",
                "",
            ),
        ),
        _TESTS,
    ),
    Mutant(
        "shared-served-anew",
        "while changes are held, no other server of this host serves the target",
        (Edit(_HELD, "            *(Role.HELD, ", "            *(Role.DISK, "),),
        _TESTS,
    ),
    Mutant(
        "shared-policy-release",
        "a guest with a shared disk goes on only with its standby's promise",
        (
            Edit(
                "kemari/protection.py",
                "            may_release = not self._disks.shared.disks\n",
                "            may_release = True\n",
            ),
        ),
        _DAEMONS,
    ),
    Mutant(
        "shared-handed-over-in-flight",
        "a primary that hands its guest over issues nothing more",
        (Edit("kemari/protection.py", "            await self._disks.halt()\n", ""),),
        _DAEMONS,
    ),
    Mutant(
        "shared-answer-of-another-command",
        "the answer to a command whose caller was cancelled is nobody else's",
        (
            Edit(
                "diskbuffer/control.py",
                "                    answer = await asked\n",
                "                    answer = await asked\n"
                "            except asyncio.CancelledError:\n"
                "                self._asked.remove(asked)\n"
                "                raise\n",
            ),
        ),
        ("tests/unit/test_disk_control.py",),
    ),
    Mutant(
        "shared-not-dropped",
        "what a copy that has moved away held is never issued",
        (
            Edit(
                "kemari/shared.py",
                '        await self._each("drop")\n',
                '        await self._each("release")\n',
            ),
        ),
        _DAEMONS,
    ),
)
