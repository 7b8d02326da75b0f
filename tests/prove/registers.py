# SPDX-License-Identifier: Apache-2.0
"""Clients of the guest's registers, and the checker's judgement on all that they were told."""

from __future__ import annotations

from pathlib import Path

from tests.prove.histories import judge
from vagrant.demolib.program import Program
from vagrant.lablib.lab import Lab


class Registers(Program):
    """The clients.

    :param options: words of their command line
    :raises LabError: the lab is down
    """

    def __init__(self, lab: Lab, errors: Path, *options: str) -> None:
        words = ["vagrant.demolib.registers", *options]
        super().__init__(lab, "registers' client", words, errors)

    @property
    def count(self) -> int:
        """How many operations were answered so far."""
        return len(self.events("done"))

    def stop(self) -> list[str]:
        """Have them ask no more; a sentence for everything that no single machine would answer.

        :raises LabError: they did not end
        :raises tests.prove.linearizable.Undecided: they were told too much at a time
        """
        end = self.result()
        broken = [f"register connection {i} ended: {why}" for i, why in end["broken"].items()]
        judgements = judge([*self.events("done"), end])
        return broken + [each for judgement in judgements for each in judgement.sentences()]
