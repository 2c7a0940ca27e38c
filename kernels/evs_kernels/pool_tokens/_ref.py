# SPDX-License-Identifier: Apache-2.0
"""Reference of pool_tokens: put the picture together, then cell after cell."""

import torch

from ._spans import spans


def run(tokens: torch.Tensor, merge: int, channels: int, frames: int, side: int, cells: int) -> torch.Tensor:
    """See evs_kernels.pool_tokens."""
    units, per_unit, _ = tokens.shape
    size = merge * side
    patches = tokens.view(units, per_unit, merge, merge, channels, frames, side, side)
    pictures = patches.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(units, per_unit, frames, size, size, channels)
    pooled = torch.empty((units, per_unit, cells, cells, channels), dtype=torch.uint8, device=tokens.device)
    for i, (top, bottom) in enumerate(spans(size, cells)):
        for j, (left, right) in enumerate(spans(size, cells)):
            total = pictures[:, :, :, top:bottom, left:right].sum(dim=(2, 3, 4), dtype=torch.int64)
            pixels = frames * (bottom - top) * (right - left)
            pooled[:, :, i, j] = ((2 * total + pixels) // (2 * pixels)).to(torch.uint8)
    return pooled
