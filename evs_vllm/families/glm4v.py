# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V, 4.5V and 4.6V: one vision tower; the latter two have a mixture of experts.

Pixel rows are Qwen2-VL's. In the prompt every unit stands between text, as in Qwen3-VL, with the same positions:
``<begin_of_image>placeholders<end_of_image>t``; the placeholders are those of images. GLM-4.6V writes "t seconds".
"""

from typing import Any

import torch

from evs_vllm.families.base import ReuseTower
from evs_vllm.families.qwen2_vl import Qwen2VLTower
from evs_vllm.families.qwen3_vl import Qwen3VL


class GLM4V(Qwen3VL):
    """Adapter of the GLM-V prompts."""

    def reuse_tower(self, model: Any) -> ReuseTower:
        return GLM4VTower(model.visual)


class GLM4VTower(Qwen2VLTower):
    """Attention within a frame; a learned embedding of the slot; a convolution over the patches of one token."""

    def _per_slot(self, height: int, width: int) -> dict[str, torch.Tensor]:
        grid = [[1, height, width]]
        cos, sin, _ = self._visual.rot_pos_emb(grid)
        values = {
            "rotary_pos_emb_cos": cos,
            "rotary_pos_emb_sin": sin,
            "pos_embeds": self._visual.pos_embeds_interpolate(grid),
        }
        return {name: self._by_token(rows) for name, rows in values.items()}
