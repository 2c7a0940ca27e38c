# SPDX-License-Identifier: Apache-2.0
"""Ovis2.5: pixel rows in the order of Qwen2-VL; an indicator row before and one after the clip's tokens.

Ordinary RoPE, so what Qwen2-VL's adapter says of positions does not apply. Indicators are rows of the encoder's output
like all others and have the same placeholder.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from evs_vllm.core.clip import Clip
from evs_vllm.core.plan import BoolArray, Layout, RetentionPlan
from evs_vllm.families.base import FamilyAdapter, PixelStats
from evs_vllm.families.qwen2_vl import GRID, Qwen2VL
from evs_vllm.families.qwen2_vl import PIXELS as QWEN_PIXELS

PIXELS = "video_pixel_values"

_ROWS = Qwen2VL()


class Ovis25(FamilyAdapter):
    """Adapter of Ovis2.5."""

    def clip(self, item: Mapping[str, Any], hf_config: Any, stats: PixelStats) -> Clip | None:
        return _ROWS.clip(*_as_qwen2_vl(item, hf_config), stats) if PIXELS in item else None

    def frames(self, item: Mapping[str, Any], hf_config: Any, stats: PixelStats) -> np.ndarray:
        return _ROWS.frames(*_as_qwen2_vl(item, hf_config), stats)

    def select_clips(
        self, batch: Mapping[str, Any], plans: Sequence[RetentionPlan], start: int, stop: int
    ) -> dict[str, Any]:
        return {key: value[start:stop] for key, value in batch.items()}

    def layout(self, token_ids: Sequence[int], is_embed: BoolArray | None, clip: Clip) -> Layout:
        layout = super().layout(token_ids, is_embed, clip)
        is_visual = layout.is_visual.copy()
        is_visual[[0, -1]] = False
        return Layout(layout.token_ids, layout.is_embed, is_visual)


def _as_qwen2_vl(item: Mapping[str, Any], hf_config: Any) -> tuple[dict[str, Any], Any]:
    """The clip's rows and the config under the names that Qwen2-VL has for them."""
    vit = hf_config.vit_config
    vision = SimpleNamespace(
        spatial_merge_size=vit.hidden_stride, patch_size=vit.patch_size, in_channels=vit.num_channels
    )
    return {QWEN_PIXELS: item[PIXELS], GRID: item["video_grids"][0]}, SimpleNamespace(vision_config=vision)
