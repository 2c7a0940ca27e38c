# SPDX-License-Identifier: Apache-2.0
"""Triton place_blocks: a program owns some values of a picture, and looks for each where it comes from."""

import torch
import triton
import triton.language as tl

from .. import _triton

BLOCK = 1024  # values that a program writes


@triton.jit(do_not_specialize=["count", "channels", "rows", "columns", "side", "values"])
def place_kernel(
    blocks_ptr, levels_ptr, pictures_ptr, count, channels, rows, columns, side, values, BLOCK: tl.constexpr
):  # fmt: skip
    picture = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < values
    width = columns * side
    x, y, channel = at % width, at // width % (rows * side), at // (width * rows * side)
    n = picture * rows * columns + y // side * columns + x // side
    known = there & (n < count)
    source = n * channels * side * side + (channel * side + y % side) * side + x % side
    value = tl.load(blocks_ptr + source, mask=known, other=0)
    level = tl.load(levels_ptr + channel * 256 + value.to(tl.int32), mask=known, other=0)
    tl.store(pictures_ptr + picture * values + at, level, mask=there)


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
    if out is None:
        out = torch.empty(shape, dtype=levels.dtype, device=blocks.device)
    values = shape[1] * shape[2] * shape[3]
    with _triton.on_device(blocks):
        place_kernel[shape[0], triton.cdiv(values, BLOCK)](
            blocks, levels, out, len(blocks), shape[1], rows, columns, side, values, BLOCK=BLOCK, num_warps=4
        )
    return out
