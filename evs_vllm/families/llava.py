# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT-Video and LLaVA-OneVision: the patches of a frame are pooled to half as many along each side."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evs_vllm.core.clip import Clip
from evs_vllm.core.plan import BoolArray, Layout, RetentionPlan
from evs_vllm.families.base import ReuseTower
from evs_vllm.families.frame_blocks import FrameBlocks
from evs_vllm.families.plain_vit import PlainTower, packed_blocks, with_class
from evs_vllm.families.seen import Squares

_LARGEST_BLOCK = 32


class LlavaNextVideo(FrameBlocks):
    """LLaVA-NeXT-Video: pooling makes one token of each s x s patches (s = 2), so a token's patches go together."""

    def block_starts(self) -> tuple[list[int], int]:
        vision, stride = self.config.vision_config, self.config.spatial_pool_stride
        block = vision.patch_size * stride
        return [block * i for i in range(vision.image_size // vision.patch_size // stride)], block

    def computed_pixels(self, item: Mapping[str, Any], plan: RetentionPlan) -> dict[str, Any]:
        return {self.pixels: packed_blocks(item[self.pixels], plan)}

    def why_not_reuse(self) -> str:
        vision = self.config.vision_config
        if vision.model_type != "clip_vision_model" or self.config.vision_feature_select_strategy != "default":
            return "only a CLIP vision tower without its class token is supported."
        if vision.image_size % (vision.patch_size * self.config.spatial_pool_stride):
            return "pooling leaves out the last patches of a frame."
        return ""

    def reuse_tower(self, model: Any) -> ReuseTower | None:
        if self.why_not_reuse():
            return None
        vision, pool = model.vision_tower.vision_model, model.vision_resampler.pool
        embeddings = vision.embeddings

        def project(patches: torch.Tensor) -> torch.Tensor:
            projected: torch.Tensor = model.multi_modal_projector(pool(patches.permute(0, 3, 1, 2)).flatten(1))
            return projected

        return PlainTower(
            pixels=self.pixels,
            patch_embed=embeddings.patch_embedding,
            pos_embed=lambda: with_class(
                embeddings.class_embedding[None, None], embeddings.position_embedding.weight[None]
            ),
            pre_norm=vision.pre_layrnorm,
            layers=vision.encoder.layers,
            attention_of=lambda layer: layer.self_attn.attn,
            project=project,
        )


class LlavaOnevision(FrameBlocks):
    """LLaVA-OneVision: n x n patches are resized to half of that, rounded up, bilinearly; a newline row ends the clip.

    Without antialiasing every token is interpolated from the 2 x 2 patches around its centre, its block here. With odd
    n (the released models: 27 to 14) the patches of the middle row and column belong to two tokens.
    """

    def block_starts(self) -> tuple[list[int], int]:
        vision = self.config.vision_config
        patches = vision.image_size // vision.patch_size
        side = -(-patches // 2)
        first = [int((i + 0.5) * patches / side - 0.5) for i in range(side)]
        return [min(patch, patches - 2) * vision.patch_size for patch in first], 2 * vision.patch_size

    @property
    def squares(self) -> Squares:
        # Tokens share patches; all of them are computed, so any blocks will do.
        size = self.config.vision_config.image_size
        side = max(side for side in range(1, _LARGEST_BLOCK + 1) if size % side == 0)
        return Squares(size // side, side)

    def layout(self, token_ids: Sequence[int], is_embed: BoolArray | None, clip: Clip) -> Layout:
        layout = super().layout(token_ids, is_embed, clip)
        is_visual = layout.is_visual.copy()
        is_visual[-1] = False
        return Layout(layout.token_ids, layout.is_embed, is_visual)
