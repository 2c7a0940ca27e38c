# SPDX-License-Identifier: Apache-2.0
"""What a pretrained tower makes of frames, kept on disk: a run goes on where another one ended."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.common.fetch import cache_folder
from bench.common.pretrained_tower import PretrainedTower


class Kept:
    """A folder of float16 arrays, each by what it was made of.

    Args:
        tower: The tower.
        grid: (rows, columns) of tokens in a frame, each of 2 x 2 patches.
        name: Of the folder in the temporary directory.
        version: To be raised when the same weights and input give other features than before.
        folder: Another place for it.
    """

    def __init__(
        self, tower: PretrainedTower, grid: tuple[int, int], name: str, version: int, folder: Path | None = None
    ) -> None:
        self.tower, self.grid = tower, grid
        self.folder = (folder or cache_folder(name)) / f"{version}-{tower.identity}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def kept(self, made_of: bytes, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What is kept of an input, or what `make` returns, kept from now on.

        Returns:
            float16, as it is read again: a result does not depend on what was on the disk.
        """
        path = self.folder / f"{hashlib.sha256(made_of).hexdigest()[:32]}.npy"
        if not path.exists():
            part = path.with_suffix(f".{os.getpid()}")
            with part.open("wb") as file:
                np.save(file, make().half().numpy())
            part.replace(path)
        return torch.from_numpy(np.load(path))
