# SPDX-License-Identifier: Apache-2.0
"""Which reference is that of a model folder."""

from __future__ import annotations

import json
from pathlib import Path

from tests.reference.frames import FramesReference
from tests.reference.gemma4 import Gemma4Reference
from tests.reference.ovis import OvisReference

OWN = {
    "Gemma4ForConditionalGeneration": Gemma4Reference,
    "Gemma4UnifiedForConditionalGeneration": Gemma4Reference,
    "Ovis2_5": OvisReference,
}


def reference_for(directory: Path) -> FramesReference:
    """The reference of a model of `tests/e2e/test_frame_families.py`."""
    (architecture,) = json.loads((directory / "config.json").read_text())["architectures"]
    return OWN.get(architecture, FramesReference)(directory)
