# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL and Qwen3.5, dense and mixture of experts.

Pixel rows and fields are Qwen2-VL's. In the prompt every unit stands between text of its own,
``<t seconds><vision_start>placeholders<vision_end>``; that text stays, also of a unit that keeps no token. With
positions `keep` such a unit still moves the text after it as far on as a whole one does; with `sequential` timestamps
and kept tokens are numbered alike, one after the other.
"""

from collections.abc import Mapping
from typing import Any

import torch

from evs_vllm.families.base import ReuseTower
from evs_vllm.families.qwen2_vl import Qwen2VL, Qwen2VLTower


class Qwen3VL(Qwen2VL):
    """Adapter of the Qwen3-VL prompt; deepstack features are further columns of the embedding rows and need nothing."""

    def reuse_tower(self, model: Any) -> ReuseTower:
        return Qwen3VLTower(model.visual)

    def position_span(self, item: Mapping[str, Any], grid: tuple[int, int, int]) -> int:
        # As get_mrope_input_positions: each unit is a picture of its own. Text between units is not counted here, the
        # pruned prompt has it too.
        return grid[0] * max(grid[1], grid[2])


class Qwen3VLTower(Qwen2VLTower):
    """Attention within a frame; a learned embedding of the slot, interpolated to the grid, is added to each patch."""

    def _per_slot(self, height: int, width: int) -> dict[str, torch.Tensor]:
        embeds: torch.Tensor = self._visual.fast_pos_embed_interpolate([[1, height, width]])
        return super()._per_slot(height, width) | {"pos_embeds": self._by_token(embeds)}
