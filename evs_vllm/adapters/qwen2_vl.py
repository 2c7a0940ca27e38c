# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL and Qwen2.5-VL, and what shares their pixel rows.

The processor gives (T*h*w, C*2*14*14) patch rows ordered (t, h/2, w/2, 2, 2): the 4 patches of one merged token are
consecutive rows, each row holds (channel, frame of the unit, row, column). The clip is one run of the same placeholder.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evs_vllm.adapters.base import Clip, FamilyAdapter, PixelStats, to_uint8

PIXELS = "pixel_values_videos"
GRID = "video_grid_thw"

# vLLM sizes the cos/sin cache of M-RoPE at this multiple of max_position_embeddings
# (vllm/model_executor/layers/rotary_embedding/mrope.py, positions_factor).
MROPE_CACHE_FACTOR = 4


class Qwen2VL(FamilyAdapter):
    """Adapter of the Qwen2-VL row order."""

    def clip(self, item: Mapping[str, Any], hf_config: Any, stats: PixelStats) -> Clip | None:
        if PIXELS not in item:
            return None
        vision = hf_config.vision_config
        merge = vision.spatial_merge_size
        units, height, width = (int(x) for x in item[GRID])
        rows = to_uint8(item[PIXELS], vision.in_channels, stats)
        grid = (units, height // merge, width // merge)
        return Clip(rows.reshape(units, grid[1] * grid[2], -1), grid)

    def frames(self, item: Mapping[str, Any], hf_config: Any, stats: PixelStats) -> np.ndarray:
        vision = hf_config.vision_config
        merge, patch, channels = vision.spatial_merge_size, vision.patch_size, vision.in_channels
        units, height, width = (int(x) for x in item[GRID])
        rows = to_uint8(item[PIXELS], channels, stats)
        patches = rows.reshape(units, height // merge, width // merge, merge, merge, channels, -1, patch, patch)
        # (unit, frame of the unit, block row, row, pixel row, block column, column, pixel column, channel)
        frames = patches.permute(0, 6, 1, 3, 7, 2, 4, 8, 5)
        return frames.reshape(-1, height * patch, width * patch, channels).cpu().numpy()

    def select_clips(self, batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
        grids: torch.Tensor = batch[GRID]
        ends = np.concatenate([[0], np.cumsum(grids.prod(dim=-1).cpu().numpy())])
        pixels = batch[PIXELS][ends[start] : ends[stop]]
        per_clip = {key: value[start:stop] for key, value in batch.items() if key != PIXELS}
        return {PIXELS: pixels, **per_clip}

    def max_position(self, hf_config: Any) -> int:
        text = hf_config.get_text_config()
        rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
        length = text.max_position_embeddings
        if rope.get("rope_type") == "yarn":
            length = int(rope.get("original_max_position_embeddings", length) * rope.get("factor", 1))
        return MROPE_CACHE_FACTOR * length
