# SPDX-License-Identifier: Apache-2.0
"""pool_tokens: a low-resolution picture of every token."""

import torch

from .. import _validate
from .._dispatch import implementation


def pool_tokens(
    tokens: torch.Tensor,
    merge: int,
    channels: int,
    frames: int,
    side: int,
    cells: int = 4,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Averages the pixels of every token over a grid of cells.

    A token is a square of ``S = merge * side`` pixels, made of merge x merge patches. Its D values are laid out as
    (patch row, patch column, channel, frame, pixel row, pixel column), as the processors of the Qwen-VL models do. Cell
    (i, j) is the mean over all frames, the pixel rows from ``floor(i * S / cells)`` up to and without
    ``ceil((i + 1) * S / cells)``, and the columns likewise by j. Where ``cells`` does not divide S, neighbouring cells
    share a row, as in adaptive average pooling. Means are exact and rounded half up.

    Args:
        tokens: (T, P, D) uint8, contiguous, T, P >= 1, ``D = merge**2 * channels * frames * side**2`` <= 2**22; any
            device.
        merge: patches along the side of a token; >= 1.
        channels: colours of a pixel; >= 1.
        frames: frames in a temporal unit; >= 1.
        side: pixels along the side of a patch; >= 1.
        cells: cells along the side of a token; from 1 to S.
        backend: one of ``evs_kernels.BACKENDS``. cpu compiles anew for every (frames, side, S / cells) of which the
            last divides the side of a patch, and then reads pixels at about the speed of memory; other shapes take
            many times as long.

    Returns:
        (T, P, cells, cells, channels) uint8 on the same device, the same in every backend.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong rank, empty, not contiguous, a D that the numbers do not give or above 2**22, a number out of
            range, more than 2**30 tokens, or a backend that cannot run here.
    """
    merge, channels = _validate.count("merge", merge, smallest=1), _validate.count("channels", channels, smallest=1)
    frames, side = _validate.count("frames", frames, smallest=1), _validate.count("side", side, smallest=1)
    cells = _validate.count("cells", cells, smallest=1)
    if cells > merge * side:
        raise ValueError(
            f"cells: got {cells}; allowed: 1 to {merge * side}, the pixels along the side of a token. Pass fewer."
        )
    _validate.pixels("tokens", tokens, merge, channels, frames, side)
    return implementation("pool_tokens", backend, tokens.device)(tokens, merge, channels, frames, side, cells)
