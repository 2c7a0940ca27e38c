# SPDX-License-Identifier: Apache-2.0
"""numba pool_tokens: rows are added as vectors, then the columns of a cell; split over threads by token."""

import functools
from collections.abc import Callable

import numpy as np
import torch

from .._numba import njit
from .._parallel import for_ranges
from ._spans import spans

# Columns added at a time: sixteen 16-bit sums are a vector of every CPU since 2013, and patches are 14 to 32 wide.
_LANES = 16
# Below this much input a second thread costs more than it saves.
_GRAIN_BYTES = 256 * 1024


@functools.cache
def _pool_inside(frames: int, side: int, cell: int) -> Callable[..., None]:
    """Kernel for cells of `cell` x `cell` pixels that lie inside patches, cell * frames * 255 < 2**16.

    The numbers are compiled in. Only so LLVM writes out the additions in a column of a cell, and then adds vectors of
    columns; with numbers known at run time it goes pixel by pixel, at a tenth of the speed.
    """
    area = side * side
    across = side // cell
    pixels = cell * cell * frames
    width = -(-side // _LANES) * _LANES

    @njit()
    def pool(values, first, last, merge, channels, pooled):
        """Writes tokens [first, last) of flat values; reads up to `width - side` values past the last one's."""
        columns = np.empty(width, np.uint16)
        at = first * merge * merge * channels * frames * area
        for n in range(first, last):
            for patch in range(merge * merge):
                for channel in range(channels):
                    for i in range(across):
                        rows = values[at + i * cell * side :]
                        for c in range(width):
                            total = np.uint16(0)
                            for frame in range(frames):
                                for r in range(cell):
                                    total = np.uint16(total + np.uint16(rows[frame * area + r * side + c]))
                            columns[c] = total
                        for j in range(across):
                            total = 0
                            for c in range(cell):
                                total += columns[j * cell + c]
                            row, column = patch // merge * across + i, patch % merge * across + j
                            pooled[n, row, column, channel] = (2 * total + pixels) // (2 * pixels)
                    at += frames * area

    return pool


@njit()
def _pool_any(values, first, last, merge, channels, frames, side, starts, stops, pooled):
    """Writes tokens [first, last) of flat values, for cells of any size, from starts[i] up to stops[i]."""
    cells, area = starts.shape[0], side * side
    columns = np.empty((cells, channels, merge * side), np.int32)
    at = first * merge * merge * channels * frames * area
    for n in range(first, last):
        columns[:] = 0
        for patch in range(merge * merge):
            top, left = patch // merge * side, patch % merge * side
            for channel in range(channels):
                for _ in range(frames):
                    for i in range(cells):
                        line = columns[i, channel, left : left + side]
                        for r in range(max(starts[i] - top, 0), min(stops[i] - top, side)):
                            row = values[at + r * side : at + (r + 1) * side]
                            for c in range(side):
                                line[c] += row[c]
                    at += area
        for i in range(cells):
            for j in range(cells):
                pixels = frames * (stops[i] - starts[i]) * (stops[j] - starts[j])
                for channel in range(channels):
                    total = 0
                    for c in range(starts[j], stops[j]):
                        total += columns[i, channel, c]
                    pooled[n, i, j, channel] = (2 * total + pixels) // (2 * pixels)


def run(tokens: torch.Tensor, merge: int, channels: int, frames: int, side: int, cells: int) -> torch.Tensor:
    """See evs_kernels.pool_tokens."""
    units, per_unit, depth = tokens.shape
    size, count = merge * side, units * per_unit
    pooled = torch.empty((units, per_unit, cells, cells, channels), dtype=torch.uint8)
    out = pooled.view(count, cells, cells, channels).numpy()
    values = tokens.view(-1).numpy()
    grain = _GRAIN_BYTES // depth
    cell = size // cells
    # A patch narrower than half the lanes would be mostly read in vain, and past the end of the next token.
    if size % cells == 0 and side % cell == 0 and cell * frames * 255 < 2**16 and side >= _LANES // 2:
        pool = _pool_inside(frames, side, cell)
        for_ranges(lambda lo, hi: pool(values, lo, hi, merge, channels, out), 0, count - 1, grain=grain)
        # Lanes past the row's end read on, into the next token. The last token has none: give it some room.
        last = np.zeros(depth + _LANES, np.uint8)
        last[:depth] = values[-depth:]
        pool(last, 0, 1, merge, channels, out[-1:])
    else:
        starts, stops = (np.array(ends) for ends in zip(*spans(size, cells), strict=True))
        args = (merge, channels, frames, side, starts, stops, out)
        for_ranges(lambda lo, hi: _pool_any(values, lo, hi, *args), 0, count, grain=grain)
    return pooled
