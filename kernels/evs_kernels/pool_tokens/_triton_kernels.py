# SPDX-License-Identifier: Apache-2.0
"""Triton pool_tokens: a program owns one row of cells of one token."""

import torch
import triton
import triton.language as tl

from .. import _triton

# Pixels of one frame that a program loads at once, and rows of them at most: more than a cell has would load nothing.
TILE = 1024
ROWS = 8


# Nothing is specialised on: patches are read byte by byte whatever their size, as their rows are 14 to 32 bytes long.
@triton.jit(do_not_specialize=["merge", "channels", "frames", "side", "cells"])
def pool_kernel(tokens_ptr, pooled_ptr, merge, channels, frames, side, cells, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    token, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size = merge * side
    area = side * side
    patch_values = channels * frames * area
    top, bottom = i * size // cells, ((i + 1) * size + cells - 1) // cells
    column = tl.arange(0, WIDTH)
    at_column = column // side * patch_values + column % side
    values = tokens_ptr + token * merge * merge * patch_values
    out = pooled_ptr + (token * cells + i) * cells * channels
    for channel in range(0, channels):
        columns = tl.zeros([WIDTH], tl.int32)
        for frame in range(0, frames):
            for first in range(top, bottom, ROWS):
                row = first + tl.arange(0, ROWS)
                at_row = row // side * merge * patch_values + row % side * side
                mask = (row < bottom)[:, None] & (column < size)[None, :]
                block = tl.load(values + frame * area + at_row[:, None] + at_column[None, :], mask=mask, other=0)
                columns += tl.sum(block.to(tl.int32), axis=0)
        values += frames * area
        for j in range(0, cells):
            left, right = j * size // cells, ((j + 1) * size + cells - 1) // cells
            total = tl.sum(tl.where((column >= left) & (column < right), columns, 0))
            pixels = frames * (bottom - top) * (right - left)
            tl.store(out + j * channels + channel, ((2 * total + pixels) // (2 * pixels)).to(tl.uint8))


def block_of(size: int) -> tuple[int, int, int]:
    """Rows and columns of the block of pixels that a program loads of tokens ``size`` pixels wide, and its warps."""
    width = triton.next_power_of_2(size)
    return min(ROWS, max(1, TILE // width)), width, max(1, width // 128)


def run(tokens: torch.Tensor, merge: int, channels: int, frames: int, side: int, cells: int) -> torch.Tensor:
    """See evs_kernels.pool_tokens."""
    units, per_unit, _ = tokens.shape
    pooled = torch.empty((units, per_unit, cells, cells, channels), dtype=torch.uint8, device=tokens.device)
    rows, width, warps = block_of(merge * side)
    grid = (units * per_unit, cells)
    with _triton.on_device(tokens):
        pool_kernel[grid](tokens, pooled, merge, channels, frames, side, cells, ROWS=rows, WIDTH=width, num_warps=warps)
    return pooled
