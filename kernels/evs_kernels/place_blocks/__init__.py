# SPDX-License-Identifier: Apache-2.0
"""place_blocks: whole pictures of a tower's own numbers, from square blocks of bytes."""

import torch

from .. import _validate
from .._dispatch import implementation


def place_blocks(
    blocks: torch.Tensor,
    levels: torch.Tensor,
    rows: int,
    columns: int,
    *,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Lays blocks beside each other, row after row and picture after picture, and replaces every byte by its level.

    Rescaling and normalising pixels is a table: what becomes of a byte depends on the byte and its channel alone. So
    the result is, bit for bit, what whatever arithmetic made the table would have given.

    Args:
        blocks: (K, C * S * S) uint8, contiguous, K >= 1; the values of a block are (channel, row, column), as
            `resize_patches` gives them for ``merge=1, side=S, unit_frames=1``.
        levels: (C, 256), contiguous, uint8, fp16, bf16 or fp32, on the same device: what a byte of a channel becomes.
        rows: blocks in a picture one above another; >= 1.
        columns: blocks in a picture beside each other; >= 1.
        out: where to write the result, of its shape, dtype and device, contiguous; None for new memory.
        backend: one of ``evs_kernels.BACKENDS``.

    Returns:
        (ceil(K / (rows * columns)), C, rows * S, columns * S) of the dtype of ``levels``. Blocks that the last picture
        lacks are 0.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong rank or shape, not contiguous, blocks that are not square, a number out of range, or a backend
            that cannot run here.
    """
    _validate.tensor("blocks", blocks, "KD", (torch.uint8,))
    _validate.tensor("levels", levels, "CV", _validate.TOKEN_DTYPES)
    _validate.levels(levels, blocks)
    rows, columns = _validate.count("rows", rows, smallest=1), _validate.count("columns", columns, smallest=1)
    channels = len(levels)
    side = _validate.square("blocks", blocks.shape[1], channels)
    shape = (-(-len(blocks) // (rows * columns)), channels, rows * side, columns * side)
    if out is not None:
        _validate.result("out", out, shape, levels)
    return implementation("place_blocks", backend, blocks.device)(blocks, levels, rows, columns, side, shape, out)
