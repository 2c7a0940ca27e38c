# SPDX-License-Identifier: Apache-2.0
"""Gemma 4: patches of a frame, pooled k x k (k = 3) to a token; text and brackets around each frame.

The processor gives (F, patches, side * side * 3) rows in raster order, filled up with rows at (-1, -1), and the
(x, y) coordinates. One frame is one unit; all frames of a clip have one size. Without a tower (the unified models) the
processor pools: a row is a token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evs_vllm.core.clip import Clip, TokenPixels
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.families.base import FamilyAdapter, PixelStats, to_uint8

PIXELS = "pixel_values_videos"
COORDINATES = "pixel_position_ids_videos"
COUNTS = "video_frame_counts"


class Gemma4(FamilyAdapter):
    """Adapter of Gemma 4. No encoder reuse: a tower is Hugging Face's module, which takes whole frames only."""

    def pixel_stats(self, processor: Any) -> PixelStats:
        source = processor.image_processor  # frames go through it, not through the video processor
        if source.do_normalize:
            return PixelStats(tuple(source.image_mean), tuple(source.image_std))
        return PixelStats((0.0,) * 3, (1.0,) * 3)

    def clip(self, item: Mapping[str, Any]) -> Clip | None:
        if PIXELS not in item:
            return None
        vision, patches = self.config.vision_config, self._patches(item)
        pool = vision.patch_size * vision.pooling_kernel_size // patches.shape[3]
        count, rows, columns = patches.shape[:3]
        grid = (count, rows // pool, columns // pool)
        side = patches.shape[3]
        blocks = patches.reshape(count, grid[1], pool, grid[2], pool, side, side, 3)
        tokens = blocks.permute(0, 1, 3, 2, 4, 7, 5, 6).reshape(count, grid[1] * grid[2], -1)
        return Clip(tokens, grid, TokenPixels(pool, 3, 1, side))

    def frames(self, item: Mapping[str, Any]) -> np.ndarray:
        patches = self._patches(item)
        count, rows, columns, side = patches.shape[:4]
        return patches.transpose(2, 3).reshape(count, rows * side, columns * side, 3).cpu().numpy()

    def flat_rows(self, batch: Mapping[str, Any], plans: Sequence[RetentionPlan]) -> dict[str, Sequence[int]]:
        return {name: [plan.num_units for plan in plans] for name in (PIXELS, COORDINATES)}

    def _patches(self, item: Mapping[str, Any]) -> torch.Tensor:
        """(F, rows, columns, side, side, 3) uint8."""
        coordinates = item[COORDINATES][0]
        columns, rows = (int(size) for size in coordinates.amax(dim=0) + 1)
        values = item[PIXELS][:, : rows * columns]
        count, side = len(values), round((values.shape[-1] / 3) ** 0.5)
        channels_first = values.reshape(-1, side * side, 3).transpose(1, 2).flatten(1)
        pixels = to_uint8(channels_first, 3, self.stats).view(count, rows, columns, 3, side, side)
        return pixels.permute(0, 1, 2, 4, 5, 3)
