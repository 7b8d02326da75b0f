# SPDX-License-Identifier: Apache-2.0
"""How long tests wait for what has to come."""

from __future__ import annotations

import os
from typing import Final

PATIENCE: Final = float(os.environ.get("KEMARI_TEST_PATIENCE", "60"))
"""Seconds.  Generous: a loaded machine must not fail a test.

A broken rule often shows only in that nothing comes: whoever breaks rules on purpose sets
``KEMARI_TEST_PATIENCE`` lower.
"""
