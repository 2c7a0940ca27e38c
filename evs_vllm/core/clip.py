# SPDX-License-Identifier: Apache-2.0
"""A clip as the judge sees it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clip:
    """A clip's pixels, one row per language-model token.

    Attributes:
        tokens: (T, P, D) uint8, contiguous.
        grid: (T, H, W) with H*W == P.
    """

    tokens: torch.Tensor
    grid: tuple[int, int, int]
