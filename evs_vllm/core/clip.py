# SPDX-License-Identifier: Apache-2.0
"""A clip as the judge sees it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clip:
    """A clip's pixels, one row per language-model token.

    Attributes:
        tokens: (T, P, D) uint8, contiguous, CPU or CUDA.
        grid: (T, H, W) with H*W == P.
        previous: (P, D) uint8, how each place looked before unit 0, for a clip that goes on from another one. None for
            a clip that stands alone, whose unit 0 is kept whole.
    """

    tokens: torch.Tensor
    grid: tuple[int, int, int]
    previous: torch.Tensor | None = None

    @property
    def num_units(self) -> int:
        return self.grid[0]

    @property
    def tokens_per_unit(self) -> int:
        return self.grid[1] * self.grid[2]
