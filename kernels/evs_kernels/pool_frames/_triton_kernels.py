# SPDX-License-Identifier: Apache-2.0
"""Triton pool_frames: a program owns some cells of one row of cells, and reads their pixels one beside another."""

import numpy as np
import torch
import triton
import triton.language as tl

from .. import _triton
from ._edges import edges

CELLS = 32
# Cells this wide in pixels, or wider, are summed in int64: 255 * 256 * 2**15 < 2**31.
WIDE = 2**15


@triton.jit(
    do_not_specialize=["count", "height", "width", "channels", "rows", "columns", "unit_frames", "widest"],
    do_not_specialize_on_alignment=["down_ptr", "across_ptr"],  # where they begin depends on sizes
)
def pool_kernel(
    frames_ptr, pooled_ptr, down_ptr, across_ptr, count, height, width, channels, rows, columns, unit_frames, widest,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    unit, i = (n // rows).to(tl.int64), n % rows
    start, stop = tl.load(down_ptr + i), tl.load(down_ptr + i + 1)
    j = tl.program_id(1).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    left = tl.load(across_ptr + j, mask=j < columns, other=0)
    right = tl.load(across_ptr + j + 1, mask=j < columns, other=1)
    channel = tl.arange(0, CHANNELS)
    there = (j < columns)[:, None] & (channel < channels)[None, :]
    total = tl.zeros([CELLS, CHANNELS], tl.int64)
    for frame in range(0, unit_frames):
        picture = tl.minimum(unit * unit_frames + frame, count - 1) * height
        for y in range(start >> 8, (stop + 255) >> 8):
            y_weight = tl.minimum(stop, (y + 1) * 256) - tl.maximum(start, y * 256)
            line = frames_ptr + (picture + y) * width * channels
            sums = tl.zeros([CELLS, CHANNELS], tl.int64 if WIDE else tl.int32)
            for k in range(0, widest):
                x = (left >> 8) + k
                weight = tl.minimum(right, (x + 1) << 8) - tl.maximum(left, x << 8)
                mask = there & (weight > 0)[:, None]
                value = tl.load(line + (x * channels)[:, None] + channel[None, :], mask=mask, other=0)
                sums += tl.maximum(weight, 0).to(sums.dtype)[:, None] * value.to(sums.dtype)
            total += sums.to(tl.int64) * y_weight
    weight = (unit_frames * (stop - start) * (right - left))[:, None]
    # (2 * total + weight) // (2 * weight), bit by bit: a division of int64 would be a call.
    rest, mean = 2 * total + weight, tl.zeros([CELLS, CHANNELS], tl.int32)
    for bit in tl.static_range(7, -1, -1):
        part = weight << (bit + 1)
        mean += tl.where(rest >= part, 1 << bit, 0)
        rest -= tl.where(rest >= part, part, 0)
    at = (n.to(tl.int64) * columns + j)[:, None] * channels + channel[None, :]
    tl.store(pooled_ptr + at, mean.to(tl.uint8), mask=there)


def run(frames: torch.Tensor, rows: int, columns: int, unit_frames: int) -> torch.Tensor:
    """See evs_kernels.pool_frames."""
    count, height, width, channels = frames.shape
    units = -(-count // unit_frames)
    pooled = torch.empty((units, rows, columns, channels), dtype=torch.uint8, device=frames.device)
    # The most pixels of which a cell has a part: it begins in the last of one's 256 parts.
    widest = (-(-width * 256 // columns) + 254) // 256 + 1
    sides = torch.from_numpy(np.concatenate([edges(height, rows), edges(width, columns)]))
    down, across = _triton.upload(sides, frames.device).split([rows + 1, columns + 1])
    grid = (units * rows, triton.cdiv(columns, CELLS))
    constants = {"CELLS": CELLS, "CHANNELS": triton.next_power_of_2(channels), "WIDE": widest >= WIDE}
    with _triton.on_device(frames):
        pool_kernel[grid](
            frames, pooled, down, across, count, height, width, channels, rows, columns, unit_frames, widest,
            **constants, num_warps=2,
        )  # fmt: skip
    return pooled
