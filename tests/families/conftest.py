# SPDX-License-Identifier: Apache-2.0
"""Processors and clips of every family's tiny model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evs_vllm.testing import synthetic_clip
from tests.families.facts import Facts
from tests.families.processing import UNITS, WHOLE, processor_for


@pytest.fixture(scope="module")
def model(family: str, model_dir: Callable[[str], Path]) -> Path:
    return model_dir(family)


@pytest.fixture(scope="module")
def whole(model: Path) -> Any:
    """A processor that leaves all pixels where they are."""
    return processor_for(model, WHOLE)


@pytest.fixture(scope="module")
def stock(model: Path) -> Any:
    """vLLM's own processor."""
    return processor_for(model, None)


@pytest.fixture(scope="module")
def ours(model: Path) -> Any:
    """A processor of a server that prunes, and lets requests ask for anything."""
    return processor_for(model, {"rate": 0.6, "request_overrides": "any"})


@pytest.fixture(scope="module")
def clip(facts: Facts) -> np.ndarray:
    """`UNITS` units that reach the model without resizing."""
    return synthetic_clip(UNITS * facts.unit_frames, facts.frame_size, moving=0.2)
