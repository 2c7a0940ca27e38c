# SPDX-License-Identifier: Apache-2.0
"""InternVL, in Hugging Face's format and in its own: pixel shuffle makes one token of each 2 x 2 patches of a frame."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from evs_vllm.core.plan import RetentionPlan
from evs_vllm.families.base import PixelStats, ReuseTower
from evs_vllm.families.frame_blocks import FrameBlocks
from evs_vllm.families.plain_vit import PlainTower, packed_blocks, packed_frames, with_class
from evs_vllm.families.seen import Squares


class InternVLNative(FrameBlocks):
    """InternVL in Hugging Face's own format: pixel shuffle makes one token of each r x r patches (r = 2)."""

    @property
    def judges_source(self) -> bool:
        return True

    @property
    def squares(self) -> Squares:
        starts, block = self.block_starts()
        return Squares(len(starts), block)

    def block_starts(self) -> tuple[list[int], int]:
        vision = self.config.vision_config
        patch, size = (x if isinstance(x, int) else x[0] for x in (vision.patch_size, vision.image_size))
        block = round(patch / self.config.downsample_ratio)
        return list(range(0, size, block)), block

    def flat_rows(self, batch: Mapping[str, Any], plans: Sequence[RetentionPlan]) -> dict[str, Sequence[int]]:
        return {self.pixels: [packed_frames(plan) for plan in plans]}

    def select_clips(
        self, batch: Mapping[str, Any], plans: Sequence[RetentionPlan], start: int, stop: int
    ) -> dict[str, Any]:
        # What else there is belongs to no clip.
        own = {name: batch[name] for name in (self.pixels, "video_num_patches")}
        return {**batch, **super().select_clips(own, plans, start, stop)}

    def computed_pixels(self, item: Mapping[str, Any], plan: RetentionPlan) -> dict[str, Any]:
        return {self.pixels: packed_blocks(item[self.pixels], plan)}

    def why_not_reuse(self) -> str:
        if not getattr(self.config.vision_config, "use_absolute_position_embeddings", True):
            return "the vision tower has no learned positions."
        return ""

    def reuse_tower(self, model: Any) -> ReuseTower:
        vision, shuffle = model.vision_tower, partial(model.pixel_shuffle, scale_factor=model.downsample_ratio)
        return PlainTower(
            pixels=self.pixels,
            patch_embed=vision.embeddings.patch_embeddings.projection,
            pos_embed=lambda: with_class(vision.embeddings.cls_token, vision.embeddings.position_embeddings),
            layers=vision.encoder.layer,
            attention_of=lambda layer: layer.attention.attn,
            project=lambda patches: model.multi_modal_projector(shuffle(vision.layernorm(patches)).flatten(1)),
        )


class InternVLChat(InternVLNative):
    """InternVL in its own format."""

    pixels = "pixel_values_flat_video"

    @property
    def judges_source(self) -> bool:
        return not self._swaps

    @property
    def _swaps(self) -> bool:
        """Whether the tokens of a frame lie as if the picture's rows and columns were swapped."""
        return bool(self.config.ps_version == "v1")

    def pixel_stats(self, processor: Any) -> PixelStats:
        # Constants in the checkpoints' code and in vLLM's processor for them.
        return PixelStats((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def _uint8_frames(self, item: Mapping[str, Any]) -> torch.Tensor:
        frames = super()._uint8_frames(item)
        # The first version of pixel shuffle leaves its rows and columns swapped: as if the picture were.
        return frames.transpose(-1, -2) if self._swaps else frames

    def why_not_reuse(self) -> str:
        if self._swaps:
            return "the first version of pixel shuffle swaps rows and columns."
        return super().why_not_reuse()

    def reuse_tower(self, model: Any) -> ReuseTower:
        vision, shuffle = model.vision_model, partial(model.pixel_shuffle, scale_factor=model.downsample_ratio)
        return PlainTower(
            pixels=self.pixels,
            patch_embed=vision.embeddings.patch_embedding,
            pos_embed=lambda: with_class(vision.embeddings.class_embedding, vision.embeddings.position_embedding),
            layers=vision.encoder.layers,
            attention_of=lambda layer: layer.attn.attn,
            project=lambda patches: model.mlp1(shuffle(patches).flatten(1)),
        )
