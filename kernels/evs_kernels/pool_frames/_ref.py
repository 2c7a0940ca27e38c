# SPDX-License-Identifier: Apache-2.0
"""Reference of pool_frames: sums from the edge of the picture to every edge of a cell, and their differences."""

import torch

ONE = 256  # parts of a pixel


def run(frames: torch.Tensor, rows: int, columns: int, unit_frames: int) -> torch.Tensor:
    """See evs_kernels.pool_frames."""
    count = len(frames)
    means = []
    for first in range(0, count, unit_frames):
        seen = [frames[min(frame, count - 1)] for frame in range(first, first + unit_frames)]
        unit = torch.stack(seen).sum(dim=0, dtype=torch.int64)
        sums, tall = _cells(unit, rows)
        sums, wide = _cells(sums.transpose(0, 1), columns)
        weights = unit_frames * tall[:, None, None] * wide[:, None]
        means.append((2 * sums.transpose(0, 1) + weights) // (2 * weights))
    return torch.stack(means).to(torch.uint8)


def _cells(values: torch.Tensor, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values along the first axis summed over cells, each as often as it has 256ths there; and how many a cell has."""
    pixels = len(values)
    edges = torch.arange(cells + 1, device=values.device) * pixels * ONE // cells
    before = torch.cat([torch.zeros_like(values[:1]), values.cumsum(dim=0)])
    whole, parts = edges // ONE, (edges % ONE)[:, None, None]
    # The last edge is that of the picture, where no pixel begins.
    sums = before[whole] * ONE + parts * values[whole.clamp(max=pixels - 1)]
    return sums.diff(dim=0), edges.diff()
