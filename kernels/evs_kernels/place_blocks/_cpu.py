# SPDX-License-Identifier: Apache-2.0
"""numba place_blocks: a look-up for each byte, row of a block by row of a block; split over threads by picture."""

import numpy as np
import torch

from .._memory import empty
from .._numba import njit
from .._parallel import for_ranges

# Below this much output a second thread costs more than it saves.
_GRAIN_BYTES = 256 * 1024


@njit()
def _place(blocks, levels, begin, end, rows, columns, side, pictures):
    """Writes pictures [begin, end); blocks and pictures are flat, levels (C, 256) integers as wide as a level."""
    channels, per_picture = levels.shape[0], rows * columns
    depth, width = channels * side * side, columns * side
    count = blocks.shape[0] // depth
    for n in range(begin * per_picture, end * per_picture):
        picture, row, column = n // per_picture, n % per_picture // columns, n % columns
        for channel in range(channels):
            to = ((picture * channels + channel) * rows + row) * side * width + column * side
            at = n * depth + channel * side * side
            level = levels[channel]
            for _ in range(side):
                here = pictures[to : to + side]
                if n < count:
                    values = blocks[at : at + side]
                    for x in range(side):
                        here[x] = level[values[x]]
                else:
                    here[:] = 0
                at += side
                to += width


def run(
    blocks: torch.Tensor,
    levels: torch.Tensor,
    rows: int,
    columns: int,
    side: int,
    shape: tuple[int, ...],
    out: torch.Tensor | None,
) -> torch.Tensor:
    """See evs_kernels.place_blocks."""
    size = levels.element_size()
    if out is None:
        out = empty((*shape[:-1], shape[-1] * size)).view(levels.dtype)
    # What bits mean is no matter here: integers of the same width have them, which numpy knows where it has no bf16.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]
    values, table, flat = blocks.view(-1).numpy(), levels.view(bits).numpy(), out.view(bits).view(-1).numpy()
    for_ranges(
        lambda lo, hi: _place(values, table, lo, hi, rows, columns, side, flat),
        0,
        shape[0],
        grain=max(1, _GRAIN_BYTES // (size * int(np.prod(shape[1:])))),
    )
    return out
