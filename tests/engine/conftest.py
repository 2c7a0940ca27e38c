# SPDX-License-Identifier: Apache-2.0
"""A tiny model, and the plugin as every process of vLLM loads it."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def registered() -> None:
    """Twice is once."""
    from evs_vllm.engine.plugin import register

    register()
    register()


@pytest.fixture
def qwen2_5_vl(model_dir: Callable[[str], Path]) -> Path:
    return model_dir("qwen2_5_vl")
