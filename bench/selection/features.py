# SPDX-License-Identifier: Apache-2.0
"""What the tower makes of frames, token by token; kept on disk, so that a run goes on where another one ended."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from bench.common.fetch import cache_folder
from bench.common.pretrained_tower import PretrainedTower

VERSION = 1
"""Raise it when the same weights and pixels give other features than before."""


class Features:
    """Features of tokens.

    Args:
        tower: The tower.
        grid: (rows, columns) of tokens in a frame, each of 2 x 2 patches.
        folder: Where they are kept; by default a folder in the temporary directory.
    """

    def __init__(self, tower: PretrainedTower, grid: tuple[int, int], folder: Path | None = None) -> None:
        self.tower, self.grid = tower, grid
        self.folder = (folder or cache_folder("features")) / f"{VERSION}-{tower.identity}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def of(self, frames: np.ndarray) -> torch.Tensor:
        """(T, P, C) fp32: the mean of each token's patches.

        Args:
            frames: (T, H, W, 3) uint8 RGB.
        """
        return torch.stack([self._of_frame(frame) for frame in frames])

    @torch.inference_mode()
    def _of_frame(self, frame: np.ndarray) -> torch.Tensor:
        key = hashlib.sha256(repr(frame.shape).encode() + frame.tobytes()).hexdigest()[:32]
        path = self.folder / f"{key}.npy"
        if path.exists():
            return torch.from_numpy(np.load(path)).float()
        patches = self.tower.run(self.tower.embed(torch.from_numpy(frame)[None]))[0, 1:]
        found = token_means(patches, self.grid).half()
        part = path.with_suffix(f".{os.getpid()}")
        with part.open("wb") as file:
            np.save(file, found.numpy())
        part.replace(path)
        # Rounded as when it is read again: a result does not depend on what was on the disk.
        return found.float()


def token_means(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(4P, C) patches by row and column to (P, C) means of 2 x 2."""
    rows, columns = grid
    return patches.view(rows, 2, columns, 2, -1).mean((1, 3)).flatten(0, 1)
