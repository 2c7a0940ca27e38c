# SPDX-License-Identifier: Apache-2.0
"""Reference of pool_frames: every pixel's share of every cell, row of cells after row of cells."""

import torch

ONE = 256  # parts of a pixel


def shares(pixels: int, cells: int) -> torch.Tensor:
    """(cells, pixels) int64: how many 256ths of a pixel lie in a cell, along one side."""
    edges = [i * pixels * ONE // cells for i in range(cells + 1)]
    table = torch.zeros((cells, pixels), dtype=torch.int64)
    for i, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        for pixel in range(start // ONE, -(-stop // ONE)):
            table[i, pixel] = min(stop, (pixel + 1) * ONE) - max(start, pixel * ONE)
    return table


def run(frames: torch.Tensor, rows: int, columns: int, unit_frames: int) -> torch.Tensor:
    """See evs_kernels.pool_frames."""
    count, height, width, channels = frames.shape
    units = -(-count // unit_frames)
    down, across = shares(height, rows).to(frames.device), shares(width, columns).to(frames.device)
    pooled = torch.empty((units, rows, columns, channels), dtype=torch.uint8, device=frames.device)
    for t in range(units):
        seen = [frames[min(f, count - 1)] for f in range(t * unit_frames, (t + 1) * unit_frames)]
        unit = torch.stack(seen).to(torch.int64).sum(dim=0)
        for i in range(rows):
            line = (unit * down[i, :, None, None]).sum(dim=0)
            for j in range(columns):
                total = (line * across[j, :, None]).sum(dim=0)
                weight = unit_frames * down[i].sum() * across[j].sum()
                pooled[t, i, j] = ((2 * total + weight) // (2 * weight)).to(torch.uint8)
    return pooled
