# SPDX-License-Identifier: Apache-2.0
"""Broken rules of the capture: in the simulated hypervisor, and on Xen."""

from __future__ import annotations

from typing import Final

from tests.prove.mutant import Edit, Mutant

_MEMORY: Final = "checkpoint/memory.py"
_XEN: Final = "checkpoint/xen/source.py"
_STILL: Final = "checkpoint/xen/standstill.py"
_SHORT: Final = "checkpoint/xen/shortcut.py"
_DIRTY: Final = "checkpoint/xen/dirty.py"
_LOG_TESTS: Final = ("tests/unit/test_xen_dirty.py",)
_XEN_TESTS: Final = ("tests/unit/test_xen_source.py", "tests/unit/test_xen_source_life.py")

CAPTURE: Final[tuple[Mutant, ...]] = (
    # ---- The capture, in the simulated hypervisor: can the harness see such a fault at all? ----
    Mutant(
        "data-before-rings",
        "rings are copied before the log is read and data is copied",
        (
            Edit(
                _MEMORY,
                '                self._gather([ring], staging)\n                reach("rings',
                '                reach("rings',
            ),
            Edit(
                _MEMORY,
                '                reach("pages-copied")\n',
                '                reach("pages-copied")\n'
                "                self._gather([ring], staging)\n",
            ),
        ),
    ),
    Mutant(
        "granted-pages-skipped",
        "pages under an active grant are copied each time",
        (
            Edit(
                _MEMORY,
                "self._gather([*granted, *written], staging)",
                "self._gather(written, staging)",
            ),
        ),
    ),
    Mutant(
        "ring-skipped",
        "a shared ring is copied each time, whatever the log says",
        (
            Edit(
                _MEMORY,
                "                self._gather([ring], staging)\n",
                "                self._gather([ring][: ring in guest.dirty], staging)\n",
            ),
        ),
    ),
    Mutant(
        "log-cleaned-twice",
        "what the dirty log says is copied before it is cleaned again",
        (
            Edit(
                _MEMORY,
                "                written = sorted(guest.dirty.difference(shared))\n",
                "                guest.dirty.intersection_update(sorted(guest.dirty)[1:])\n"
                "                written = sorted(guest.dirty.difference(shared))\n",
            ),
        ),
    ),
    Mutant(
        "state-before-pause",
        "the machine state is that of the moment of the capture",
        (
            Edit(
                _MEMORY,
                '            reach("pause")\n            guest.paused = True\n',
                '            early = guest.state()\n            reach("pause")\n'
                "            guest.paused = True\n",
            ),
            Edit(
                _MEMORY,
                "                staging.state = guest.state()\n",
                "                staging.state = early\n",
            ),
        ),
    ),
    # ---- The capture on Xen ----
    Mutant(
        "xen-data-before-rings",
        "on Xen, rings are copied before the log is read",
        (
            Edit(
                _XEN,
                "            still.copy_shared(staging)\n"
                '            reach("rings-copied")\n'
                "            still.read_log(keep)\n",
                "            still.read_log(keep)\n"
                "            still.copy_shared(staging)\n"
                '            reach("rings-copied")\n',
            ),
        ),
        _XEN_TESTS,
    ),
    Mutant(
        "xen-granted-pages-skipped",
        "on Xen, pages under an active grant for writing are copied each time",
        (
            Edit(
                _STILL,
                "self._under_grants = native.active_writable(self._entries, self._granted)",
                "self._under_grants = 0",
            ),
        ),
        _XEN_TESTS,
    ),
    Mutant(
        "xen-backends-not-awaited",
        "on Xen, a checkpoint waits until backends have answered",
        (Edit(_XEN, "            still.await_backends()\n", ""),),
        _XEN_TESTS,
    ),
    Mutant(
        "xen-clock-not-looked-at",
        "on Xen, a guest in the middle of its clock, or of xenstore, is not captured",
        (
            Edit(
                _STILL,
                "        self._rest.check(self._context, self._copies[self._special[0]])\n",
                "",
            ),
        ),
        _XEN_TESTS,
    ),
    Mutant(
        "xen-log-not-carried",
        "on Xen, what the log said is not lost with a failed attempt",
        (
            Edit(
                _STILL,
                "            self._carried = bytes(self._log.bitmap)",
                "            self._carried = None",
            ),
        ),
        _XEN_TESTS,
    ),
    Mutant(
        "xen-log-cleaned-unread",
        "on Xen, what was written while the log was looked at is not lost with its cleaning",
        (
            Edit(
                _DIRTY,
                "        # What backends wrote meanwhile is in this one.\n        self.clean()\n",
                "            seen = bytes(self.bitmap)\n        self.clean()\n"
                "        if keep > 0:\n"
                "            self.bitmap[:] = seen\n",
            ),
        ),
        _LOG_TESTS,
    ),
    Mutant(
        "xen-kept-log-without-a-look-at-the-mark",
        "on Xen, a log that is not cleaned is known to be ours",
        (
            Edit(
                _DIRTY,
                '            self._read_ours(_PEEK, "peek")\n',
                '            self._read(_PEEK, self._pages, "peek")\n',
            ),
        ),
        _LOG_TESTS,
    ),
    Mutant(
        "xen-output-closed-after-unpause",
        "on Xen, output is closed before the guest runs again",
        (
            Edit(
                _XEN,
                "            close_output()\n        begun = closed",
                "            pass\n        begun = closed",
            ),
            Edit(
                _XEN,
                "            self._let_go(leave_paused)\n",
                "            self._let_go(leave_paused)\n"
                "            if not waits:\n                close_output()\n",
            ),
        ),
        _XEN_TESTS,
    ),
    Mutant(
        "xen-output-closed-too-early",
        "on Xen, all output of a guest that is to stay paused is in its last epoch",
        (
            Edit(
                _XEN,
                "        waits = leave_paused or self._paused\n",
                "        waits = self._paused\n",
            ),
        ),
        _XEN_TESTS,
    ),
    Mutant(
        "xen-plan-of-earlier-devices",
        "on Xen, native code knows the rings that the guest has now",
        (
            Edit(
                _SHORT,
                "        self._rings = shared_rings\n        self._valid = False\n",
                "        self._rings = shared_rings\n",
            ),
        ),
        _XEN_TESTS,
    ),
    Mutant(
        "xen-log-without-a-mark",
        "on Xen, the log has its mark again before the guest runs",
        (
            Edit(
                _XEN,
                "            self._let_go(leave_paused)\n",
                "            if not leave_paused:\n                self.unpause()\n",
            ),
        ),
        _XEN_TESTS,
    ),
)
