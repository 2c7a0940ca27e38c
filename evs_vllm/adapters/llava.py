# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT-Video and LLaVA-OneVision: the patches of a frame are pooled to half as many along each side."""

from collections.abc import Sequence
from typing import Any

from evs_vllm.adapters.base import Clip
from evs_vllm.adapters.frame_blocks import FrameBlocks
from evs_vllm.plan import BoolArray, Layout


class LlavaNextVideo(FrameBlocks):
    """LLaVA-NeXT-Video: pooling makes one token of each s x s patches (s = 2)."""

    def block_starts(self, hf_config: Any) -> tuple[list[int], int]:
        vision, stride = hf_config.vision_config, hf_config.spatial_pool_stride
        block = vision.patch_size * stride
        return [block * i for i in range(vision.image_size // vision.patch_size // stride)], block


class LlavaOnevision(FrameBlocks):
    """LLaVA-OneVision: n x n patches are resized to half of that, rounded up, bilinearly; a newline row ends the clip.

    Without antialiasing every token is interpolated from the 2 x 2 patches around its centre, its block here. With odd
    n (the released models: 27 to 14) the patches of the middle row and column belong to two tokens.
    """

    def block_starts(self, hf_config: Any) -> tuple[list[int], int]:
        vision = hf_config.vision_config
        patches = vision.image_size // vision.patch_size
        side = -(-patches // 2)
        first = [int((i + 0.5) * patches / side - 0.5) for i in range(side)]
        return [min(patch, patches - 2) * vision.patch_size for patch in first], 2 * vision.patch_size

    def layout(self, token_ids: Sequence[int], is_embed: BoolArray | None, clip: Clip) -> Layout:
        layout = super().layout(token_ids, is_embed, clip)
        is_visual = layout.is_visual.copy()
        is_visual[-1] = False
        return Layout(layout.token_ids, layout.is_embed, is_visual)
