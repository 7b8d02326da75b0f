# SPDX-License-Identifier: Apache-2.0
"""Our own rules, broken one at a time: a harness that misses one is not finished.

Each :class:`Mutant` is a change of the source text, made in a copy of the tree.  The texts that are
to be replaced must be there exactly once, so that a mutant cannot quietly stop to be one when the
code changes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Edit:
    """One replacement.

    :ivar path: below the root of the repository
    """

    path: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """One broken rule.

    :ivar name: short
    :ivar rule: what is no longer done
    :ivar edits: how
    :ivar tests: files for pytest that judge it where the simulation cannot: it has neither Xen nor
        a kernel's network
    :ivar disks: whether it is about the guest's disk, so that runs with one are tried first
    :ivar shown_by: the case of the sweep to be tried before all others; "" for none
    """

    name: str
    rule: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...] = ()
    disks: bool = False
    shown_by: str = ""

    @property
    def simulated(self) -> bool:
        """Whether the simulation runs the changed code."""
        shared = ("diskbuffer/shared.py", "diskbuffer/held.py")
        beyond = ("checkpoint/xen/", "netbuffer/", *shared)
        return not all(edit.path.startswith(beyond) for edit in self.edits)
