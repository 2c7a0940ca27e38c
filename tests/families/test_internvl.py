# SPDX-License-Identifier: Apache-2.0
"""InternVL's two formats: its own pixel shuffle, its own statistics, pixels of half precision."""

from typing import Any

import numpy as np
import pytest
import torch

from evs_vllm.core.scorers import PixelChange
from evs_vllm.errors import ConfigError
from evs_vllm.families.base import PixelStats
from evs_vllm.families.internvl import InternVLChat
from evs_vllm.testing import synthetic_clip
from tests.families.processing import WHOLE, adapter_for, clip_in, pixels_in, process, processor_for

pytestmark = pytest.mark.vllm

FIRST_SHUFFLE = {"hf_overrides": {"ps_version": "v1"}}


def test_first_pixel_shuffle_swaps_rows_and_columns(model_dir: Any) -> None:
    processor = processor_for(model_dir("internvl_chat"), WHOLE, **FIRST_SHUFFLE)
    frames = np.full((2, 112, 112, 3), 100, dtype=np.uint8)
    frames[1, 60, 5] = 137  # row 2, column 0
    changed = PixelChange().score(clip_in(processor, process(processor, frames)).tokens)[1]
    assert changed.nonzero().flatten().tolist() == [0 * 4 + 2]
    assert isinstance(adapter_for(processor), InternVLChat)
    # That is where the model puts it: the same shuffle on the numbers of the patches.
    from vllm.model_executor.models.internvl import InternVLChatModel

    patches = torch.zeros(1, 8, 8, 1)
    patches[0, 60 // 14, 5 // 14] = 1

    class Model:
        ps_version = "v1"

    shuffled = InternVLChatModel.pixel_shuffle(Model(), patches)  # type: ignore[arg-type]
    assert shuffled.reshape(16, 4).sum(dim=1).nonzero().flatten().tolist() == [2]


def test_half_precision_pixels_are_near(model_dir: Any) -> None:
    """bfloat16 rounds normalised pixels to about two grey levels, before they reach us."""
    frames = synthetic_clip(3, (112, 112), "noise", seed=3)
    half, single = (processor_for(model_dir("internvl"), WHOLE, dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert pixels_in(process(half, frames)).dtype == torch.bfloat16
    near, exact = (clip_in(processor, process(processor, frames)).tokens.int() for processor in (half, single))
    assert (near - exact).abs().max() <= 2


def test_statistics_of_the_own_format_are_those_of_its_processor() -> None:
    from vllm.transformers_utils.processors.internvl import IMAGENET_MEAN, IMAGENET_STD

    assert InternVLChat(None).stats == PixelStats(IMAGENET_MEAN, IMAGENET_STD)


def test_reuse_is_refused_with_the_first_pixel_shuffle(model_dir: Any) -> None:
    with pytest.raises(ConfigError, match="pixel shuffle"):
        processor_for(model_dir("internvl_chat"), {"rate": 0.5, "encoder": "reuse"}, **FIRST_SHUFFLE)
