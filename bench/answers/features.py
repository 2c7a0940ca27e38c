# SPDX-License-Identifier: Apache-2.0
"""What the pretrained tower makes of scenes: every patch, computed whole, with reuse, or without what was dropped.

Kept on disk, so that a run goes on where another one ended. The tower runs in bfloat16 (with fp32 weights and sums),
as towers of large models do, and a token is its 2 x 2 patches one after the other, as mergers take them.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bench.common.kept import Kept
from bench.common.pretrained_tower import PretrainedTower

VERSION = 1
"""Raise it when the same weights, pixels and computed tokens give other features than before."""


class PatchFeatures(Kept):
    """Features of tokens, patch by patch; the arguments are those of `Kept`."""

    def __init__(self, tower: PretrainedTower, grid: tuple[int, int], folder: Path | None = None) -> None:
        super().__init__(tower, grid, "patch-features", VERSION, folder)

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return 4 * self.tower.width

    def of(self, frames: np.ndarray, computed: torch.Tensor | None = None, mode: str = "full") -> torch.Tensor:
        """(T, P, 4C) fp16.

        Args:
            frames: (T, H, W, 3) uint8 RGB.
            computed: (T, P) bool, the tokens that are computed; None for all.
            mode: "full", "reuse" or "skip", as for `PretrainedTower.run`. Tokens that are not computed are 0.
        """
        made_of = repr((frames.shape, mode)).encode() + frames.tobytes()
        if computed is not None:
            made_of += computed.numpy().tobytes()
        return self.kept(made_of, lambda: self._made(frames, computed, mode))

    @torch.inference_mode()
    def _made(self, frames: np.ndarray, computed: torch.Tensor | None, mode: str) -> torch.Tensor:
        rows, columns = self.grid
        patches = None
        if computed is not None:
            grid = computed.view(len(frames), rows, columns)
            patches = F.pad(grid.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1), (1, 0), value=True)
        embedded = self.tower.embed(torch.from_numpy(frames))
        with torch.autocast("cpu", torch.bfloat16):
            got = self.tower.run(embedded, patches, mode)[:, 1:]
        cut = got.view(len(frames), rows, 2, columns, 2, -1).permute(0, 1, 3, 2, 4, 5)
        return cut.reshape(len(frames), rows * columns, -1)
