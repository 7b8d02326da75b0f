# SPDX-License-Identifier: Apache-2.0
"""All broken rules."""

from __future__ import annotations

from typing import Final

from tests.prove.mutant import Mutant
from tests.prove.mutants_capture import CAPTURE
from tests.prove.mutants_disks import DISKS
from tests.prove.mutants_epochs import EPOCHS
from tests.prove.mutants_owner import OWNER
from tests.prove.mutants_replicas import REPLICAS

MUTANTS: Final[tuple[Mutant, ...]] = (*EPOCHS, *CAPTURE, *OWNER, *DISKS, *REPLICAS)
