# SPDX-License-Identifier: Apache-2.0
"""LLaVA: which patches a token of the released OneVision reads, the end of positions, and where reuse is refused."""

from typing import Any

import pytest
import torch

from evs_vllm.errors import ConfigError, RequestError
from evs_vllm.families.llava import LlavaOnevision
from evs_vllm.testing import synthetic_clip
from tests.families.processing import process, processor_for

pytestmark = pytest.mark.vllm


def test_released_onevision_reads_pairs_of_patches() -> None:
    """27 x 27 patches to 14 x 14: a token's block is where bilinear resizing reads, found by resizing itself."""

    class Config:
        class vision_config:
            image_size, patch_size = 384, 14

    starts, block = LlavaOnevision(Config).block_starts()
    read = torch.nn.functional.interpolate(torch.eye(27)[None], size=14, mode="linear")[0]  # (source, target)
    assert block == 28
    for token, start in enumerate(starts):
        assert read[:, token].nonzero().flatten().tolist() == [start // 14, start // 14 + 1]


def test_clip_longer_than_the_models_positions_is_refused(model_dir: Any) -> None:
    """As long as the prompt fits unpruned, whatever the context length; then not, unless numbered sequentially."""
    short = {"text_config": {"max_position_embeddings": 512}}
    evs = {"rate": 0.9, "request_overrides": "any"}
    processor = processor_for(model_dir("llava_next_video"), evs, hf_overrides=short, max_model_len=512)
    text = len(process(processor, synthetic_clip(1, (64, 64)))["prompt_token_ids"]) - 16
    most = (512 - 32 - 1 - text) // 16
    process(processor, synthetic_clip(most, (64, 64)))
    with pytest.raises(RequestError, match=r"the model has 512.*'sequential'"):
        process(processor, synthetic_clip(most + 1, (64, 64)))
    process(processor, synthetic_clip(most + 1, (64, 64)), evs_positions="sequential")


@pytest.mark.parametrize(
    ("override", "reason"),
    [({"vision_feature_select_strategy": "full"}, "class token"), ({"spatial_pool_stride": 3}, "leaves out")],
)
def test_reuse_is_refused_where_it_would_be_wrong(model_dir: Any, override: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        processor_for(model_dir("llava_next_video"), {"rate": 0.5, "encoder": "reuse"}, hf_overrides=override)
