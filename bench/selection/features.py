# SPDX-License-Identifier: Apache-2.0
"""What the tower makes of frames, token by token; kept on disk, so that a run goes on where another one ended."""

from pathlib import Path

import numpy as np
import torch

from bench.common.kept import Kept
from bench.common.pretrained_tower import PretrainedTower

VERSION = 1
"""Raise it when the same weights and pixels give other features than before."""


class Features(Kept):
    """Features of tokens; the arguments are those of `Kept`."""

    def __init__(self, tower: PretrainedTower, grid: tuple[int, int], folder: Path | None = None) -> None:
        super().__init__(tower, grid, "features", VERSION, folder)

    def of(self, frames: np.ndarray) -> torch.Tensor:
        """(T, P, C) fp32: the mean of each token's patches.

        Args:
            frames: (T, H, W, 3) uint8 RGB.
        """
        return torch.stack([self._of_frame(frame) for frame in frames])

    def _of_frame(self, frame: np.ndarray) -> torch.Tensor:
        return self.kept(repr(frame.shape).encode() + frame.tobytes(), lambda: self._made(frame)).float()

    @torch.inference_mode()
    def _made(self, frame: np.ndarray) -> torch.Tensor:
        patches = self.tower.run(self.tower.embed(torch.from_numpy(frame)[None]))[0, 1:]
        return token_means(patches, self.grid)


def token_means(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(4P, C) patches by row and column to (P, C) means of 2 x 2."""
    rows, columns = grid
    return patches.view(rows, 2, columns, 2, -1).mean((1, 3)).flatten(0, 1)
