# SPDX-License-Identifier: Apache-2.0
"""What families have in common whose processor gives whole frames, such as InternVL and LLaVA.

The processor gives (F, 3, S, S) normalised frames; one frame is one unit. The tower cuts it into n x n patches, and
pixel shuffle or pooling makes m x m tokens of those. So each token comes from a square block of pixels, and a family
says where along one side the blocks begin.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evs_vllm.core.clip import Clip, TokenPixels
from evs_vllm.families.base import FamilyAdapter, to_uint8


class FrameBlocks(FamilyAdapter):
    """What these families have in common."""

    @abstractmethod
    def block_starts(self) -> tuple[list[int], int]:
        """Along one side of a frame, the first pixel of each token's block, and the side of a block in pixels."""

    def clip(self, item: Mapping[str, Any]) -> Clip | None:
        if self.pixels not in item:
            return None
        frames = self._uint8_frames(item)
        starts, block = self.block_starts()
        side = len(starts)
        index = torch.tensor(starts, device=frames.device)[:, None] + torch.arange(block, device=frames.device)
        blocks = frames[:, :, index][..., index]  # (frame, channel, row, pixel row, column, pixel column)
        tokens = blocks.permute(0, 2, 4, 1, 3, 5).reshape(len(frames), side * side, -1)
        return Clip(tokens, (len(frames), side, side), TokenPixels(1, frames.shape[1], 1, block))

    def frames(self, item: Mapping[str, Any]) -> np.ndarray:
        return self._uint8_frames(item).permute(0, 2, 3, 1).cpu().numpy()

    def _uint8_frames(self, item: Mapping[str, Any]) -> torch.Tensor:
        frames = item[self.pixels]
        return to_uint8(frames.flatten(1), frames.shape[1], self.stats).view(frames.shape)
