# SPDX-License-Identifier: Apache-2.0
"""All broken rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from tests.prove.mutant import Mutant
from tests.prove.mutants_capture import CAPTURE
from tests.prove.mutants_disks import DISKS
from tests.prove.mutants_epochs import EPOCHS
from tests.prove.mutants_owner import OWNER
from tests.prove.mutants_replicas import REPLICAS

_MUTANTS: Final = (*EPOCHS, *CAPTURE, *OWNER, *DISKS, *REPLICAS)

#: Mutant -> the case of the sweep that has shown it, where no undisturbed course does.
SHOWN_BY: Final = {
    "release-too-much": "talk_and_stop/rings-copied:knock:4/hold/seed 0",
    "output-closed-after-unpause": "talk_and_stop/rings-copied:knock:4/hold/seed 0",
    "late-ack-trusted": "talk_and_stop/got-ack:stall:6/hold/seed 0",
    "stale-output-let-go": "talk_and_stop/got-ack:stall:6/hold/seed 0",
    "unverified-epoch": "talk_and_stop/got-pages:peer-power:7/hold/seed 2",
    "data-before-rings": "talk_and_stop/pages-copied:knock:4/hold/seed 0",
    "granted-pages-skipped": "talk_and_stop/paused:knock:4/hold/seed 0",
    "state-before-pause": "talk_and_stop/pause:knock:4/hold/seed 0",
    "unrecorded-takeover-left-so-by-a-restart": "unrecorded/takeover-recorded:kill:1/hold/seed 0",
    "debt-forgotten-with-a-full-disk": "talk_and_stop/got-state:peer-full-stall:1/release/seed 0",
    "straggler-forgotten": "talk_and_stop/got-state:peer-full-stall:1/release/seed 0",
    "gone-copy-taken-for-the-new-one": "brought_back/abandon-destroyed:kill:1/release/seed 0",
    "policy-after-handover-and-restart": "carried_over/ledger-written:stall-long:10/release/seed 0",
    "own-stall-is-their-silence": "primary_killed/put-stand-down:stall-long:1/release/seed 7",
    "guest-left-paused": "declined/paused:kill:2/hold/seed 0",
    "shell-left": "talk_and_stop/promised:kill:1/hold/seed 0",
    "disk-applied-before-commit": "talk_and_stop/got-writes:peer-power:5/hold/seed 2/disk",
    "disk-half-an-epoch": "talk_and_stop/got-writes:peer-power:8/hold/seed 0/disk",
    "disk-closed-after-unpause": "talk_and_stop/paused:knock:4/hold/seed 0/disk",
    "disk-fit-while-syncing": "talk_and_stop/replica-apply:power:1/hold/seed 0/disk",
    "disk-flush-ignored": "talk_and_stop/replica-written:power:7/hold/seed 3/disk",
    "marks-cleared-when-sent": "talk_and_stop/replica-written:power:7/hold/seed 6/disk",
    "mark-cleared-without-applied": "talk_and_stop/replica-written:power:7/hold/seed 0/disk",
}

MUTANTS: Final[tuple[Mutant, ...]] = tuple(
    replace(mutant, shown_by=SHOWN_BY.get(mutant.name, "")) for mutant in _MUTANTS
)
