# SPDX-License-Identifier: Apache-2.0
"""Families whose processor gives whole frames: InternVL, LLaVA-OneVision, LLaVA-NeXT-Video.

The processor gives (F, 3, S, S) normalised frames; one frame is one unit. The tower cuts it into n x n patches, and
pixel shuffle or pooling makes m x m tokens of those. So each token comes from a square block of pixels, and a family
says where along one side the blocks begin.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evs_vllm.adapters.base import Clip, FamilyAdapter, PixelStats, to_uint8
from evs_vllm.plan import BoolArray, Layout, RetentionPlan


class FrameBlocks(FamilyAdapter):
    """What these families have in common. `pixels` is the name of the pixel field."""

    pixels = "pixel_values_videos"

    @abstractmethod
    def block_starts(self, hf_config: Any) -> tuple[list[int], int]:
        """Along one side of a frame, the first pixel of each token's block, and the side of a block in pixels."""

    def clip(self, item: Mapping[str, Any], hf_config: Any, stats: PixelStats) -> Clip | None:
        if self.pixels not in item:
            return None
        frames = self._uint8_frames(item, hf_config, stats)
        starts, block = self.block_starts(hf_config)
        side = len(starts)
        index = torch.tensor(starts, device=frames.device)[:, None] + torch.arange(block, device=frames.device)
        blocks = frames[:, :, index][..., index]  # (frame, channel, row, pixel row, column, pixel column)
        tokens = blocks.permute(0, 2, 4, 1, 3, 5).reshape(len(frames), side * side, -1)
        return Clip(tokens, (len(frames), side, side))

    def frames(self, item: Mapping[str, Any], hf_config: Any, stats: PixelStats) -> np.ndarray:
        return self._uint8_frames(item, hf_config, stats).permute(0, 2, 3, 1).cpu().numpy()

    def select_clips(
        self, batch: Mapping[str, Any], plans: Sequence[RetentionPlan], start: int, stop: int
    ) -> dict[str, Any]:
        return {key: value[start:stop] for key, value in batch.items()}

    def _uint8_frames(self, item: Mapping[str, Any], hf_config: Any, stats: PixelStats) -> torch.Tensor:
        frames = item[self.pixels]
        return to_uint8(frames.flatten(1), frames.shape[1], stats).view(frames.shape)


class InternVLNative(FrameBlocks):
    """InternVL in Hugging Face's own format: pixel shuffle makes one token of each r x r patches (r = 2)."""

    def block_starts(self, hf_config: Any) -> tuple[list[int], int]:
        vision = hf_config.vision_config
        patch, size = (x if isinstance(x, int) else x[0] for x in (vision.patch_size, vision.image_size))
        block = round(patch / hf_config.downsample_ratio)
        return list(range(0, size, block)), block

    def select_clips(
        self, batch: Mapping[str, Any], plans: Sequence[RetentionPlan], start: int, stop: int
    ) -> dict[str, Any]:
        ends = np.cumsum([0, *(plan.num_units for plan in plans)])
        own = {
            self.pixels: batch[self.pixels][ends[start] : ends[stop]],
            "video_num_patches": batch["video_num_patches"][start:stop],
        }
        return {**batch, **own}


class InternVLChat(InternVLNative):
    """InternVL in its own format."""

    pixels = "pixel_values_flat_video"

    def pixel_stats(self, hf_processor: Any) -> PixelStats:
        # Constants in the checkpoints' code and in vLLM's processor for them.
        return PixelStats((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def _uint8_frames(self, item: Mapping[str, Any], hf_config: Any, stats: PixelStats) -> torch.Tensor:
        frames = super()._uint8_frames(item, hf_config, stats)
        # The first version of pixel shuffle leaves its rows and columns swapped: as if the picture were.
        return frames.transpose(-1, -2) if hf_config.ps_version == "v1" else frames


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
