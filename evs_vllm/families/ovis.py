# SPDX-License-Identifier: Apache-2.0
"""Ovis2.5: pixel rows in the order of Qwen2-VL; an indicator row before and one after the clip's tokens.

Ordinary RoPE, so what Qwen2-VL's adapter says of positions does not apply. Indicators are rows of the encoder's output
like all others and have the same placeholder.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np

from evs_vllm.core.clip import Clip
from evs_vllm.core.plan import BoolArray, Layout
from evs_vllm.families.base import FamilyAdapter
from evs_vllm.families.qwen2_vl import GRID, Qwen2VL
from evs_vllm.families.qwen2_vl import PIXELS as QWEN_PIXELS

PIXELS = "video_pixel_values"


class Ovis25(FamilyAdapter):
    """Adapter of Ovis2.5."""

    pixels = PIXELS

    @property
    def judges_source(self) -> bool:
        return True

    def clip(self, item: Mapping[str, Any]) -> Clip | None:
        return self._rows.clip(_as_qwen2_vl(item)) if PIXELS in item else None

    def frames(self, item: Mapping[str, Any]) -> np.ndarray:
        return self._rows.frames(_as_qwen2_vl(item))

    @cached_property
    def _rows(self) -> Qwen2VL:
        """Reads the pixel rows, under the names that Qwen2-VL has for what the config says of them."""
        vit = self.config.vit_config
        vision = SimpleNamespace(
            spatial_merge_size=vit.hidden_stride, patch_size=vit.patch_size, in_channels=vit.num_channels
        )
        return Qwen2VL(SimpleNamespace(vision_config=vision), stats=self.stats)

    def layout(self, token_ids: Sequence[int], is_embed: BoolArray | None, clip: Clip) -> Layout:
        layout = super().layout(token_ids, is_embed, clip)
        is_visual = layout.is_visual.copy()
        is_visual[[0, -1]] = False
        return Layout(layout.token_ids, layout.is_embed, is_visual)


def _as_qwen2_vl(item: Mapping[str, Any]) -> dict[str, Any]:
    return {QWEN_PIXELS: item[PIXELS], GRID: item["video_grids"][0]}
