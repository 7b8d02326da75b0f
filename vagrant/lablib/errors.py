# SPDX-License-Identifier: Apache-2.0
"""What went wrong in the lab, in one sentence."""

from __future__ import annotations


class LabError(Exception):
    """A fact about the lab that stops the command, and what was expected instead.

    ``details`` is longer evidence, such as the end of a console log; it is shown after the
    sentence.
    """

    def __init__(self, sentence: str, details: str = "") -> None:
        super().__init__(sentence)
        self.details = details
        if details:
            self.add_note(details)
