# SPDX-License-Identifier: Apache-2.0
"""Triton resize_patches: the columns of some tokens' source rows into scratch, then their rows into patches."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import _triton
from ._weights import weights_of

ROWS = 16  # source rows of a program
BLOCK = 1024  # values that a program writes
SCRATCH_BYTES = 32 * 2**20  # of as many tokens at once


# Sizes decide on which bytes small tables begin: kernels for each of them would be compiled in the midst of requests.
@triton.jit(
    do_not_specialize=[
        "count", "height", "width", "channels", "unit_frames", "down", "across", "size", "room", "taps", "bits"
    ],
    do_not_specialize_on_alignment=["tokens_ptr", "first_ptr", "weights_ptr", "tops_ptr", "bottoms_ptr"],
)  # fmt: skip
def across_kernel(
    frames_ptr, scratch_ptr, tokens_ptr, first_ptr, weights_ptr, tops_ptr, bottoms_ptr,
    count, height, width, channels, unit_frames, down, across, size, room, taps, bits,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Scratch is (tokens, frames, room, channels, size): a token's columns of every source row it needs."""
    n = tl.program_id(0)
    token = tl.load(tokens_ptr + n // unit_frames)
    place = token % (down * across)
    row, column = place // across, place % across
    frame = tl.minimum(token // (down * across) * unit_frames + n % unit_frames, count - 1)
    slot = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    y = tl.load(tops_ptr + row) + slot
    x = tl.arange(0, WIDTH)
    there = (y < tl.load(bottoms_ptr + row))[:, None] & (x < size)[None, :]
    first = tl.load(first_ptr + column * size + x, mask=x < size, other=0)
    source = frames_ptr + (frame * height + y)[:, None] * width * channels
    out = scratch_ptr + (n.to(tl.int64) * room + slot)[:, None] * channels * size + x[None, :]
    for channel in range(0, channels):
        sums = tl.zeros([ROWS, WIDTH], tl.int32) + (1 << bits >> 1)
        for k in range(0, taps):
            weight = tl.load(weights_ptr + (column * size + x) * taps + k, mask=x < size, other=0)
            # A weight past a place's last one is 0; what it would be multiplied by may not exist.
            mask = there & (first + k < width)[None, :]
            value = tl.load(source + ((first + k) * channels + channel)[None, :], mask=mask, other=0)
            sums += weight[None, :] * value.to(tl.int32)
        held = tl.minimum(tl.maximum(sums >> bits, 0), 255)
        tl.store(out + channel * size, held.to(tl.uint8), mask=there)


@triton.jit(
    do_not_specialize=["depth", "channels", "unit_frames", "down", "across", "merge", "side", "room", "taps", "bits"],
    do_not_specialize_on_alignment=["tokens_ptr", "first_ptr", "weights_ptr", "tops_ptr"],
)  # fmt: skip
def down_kernel(
    scratch_ptr, rows_ptr, tokens_ptr, first_ptr, weights_ptr, tops_ptr,
    depth, channels, unit_frames, down, across, merge, side, room, taps, bits, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    row = (tl.load(tokens_ptr + n) % (down * across) // across).to(tl.int32)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < depth
    x, r = at % side, at // side % side
    rest = at // (side * side)
    frame, channel, patch = rest % unit_frames, rest // unit_frames % channels, rest // (unit_frames * channels)
    y = (row * merge + patch // merge) * side + r
    y = tl.where(there, y, 0)
    slot = tl.load(first_ptr + y) - tl.load(tops_ptr + row)
    size = merge * side
    line = (n.to(tl.int64) * unit_frames + frame) * room
    sums = tl.zeros([BLOCK], tl.int32) + (1 << bits >> 1)
    for k in range(0, taps):
        weight = tl.load(weights_ptr + y * taps + k)
        mask = there & (weight != 0)
        value = tl.load(
            scratch_ptr + ((line + slot + k) * channels + channel) * size + patch % merge * side + x,
            mask=mask, other=0,
        )  # fmt: skip
        sums += weight * value.to(tl.int32)
    held = tl.minimum(tl.maximum(sums >> bits, 0), 255)
    tl.store(rows_ptr + n.to(tl.int64) * depth + at, held.to(tl.uint8), mask=there)


class _Tables(NamedTuple):
    """What the kernels look up along one side, end to end in one int32 tensor.

    Attributes:
        values: `Weights.first` and `Weights.weights`; for every row (column) of tokens the first value its places see,
            and one past the last.
        sizes: how long each of the four is.
        taps: weights of a place.
        room: the most values that a row of tokens sees.
        bits: as in `Weights`.
    """

    values: torch.Tensor
    sizes: tuple[int, ...]
    taps: int
    room: int
    bits: int

    def to(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The four on a device, without waiting for it. They are not kept there: another stream might read them
        before they have come."""
        return _triton.upload(self.values, device).split(self.sizes)


@functools.lru_cache(maxsize=32)
def _tables(source: int, target: int, size: int, arithmetic: str) -> _Tables:
    table = weights_of(source, target, arithmetic)
    tops = table.first.reshape(-1, size).min(axis=1)
    bottoms = (table.first + table.counts).reshape(-1, size).max(axis=1)
    parts = [torch.from_numpy(part.astype("int32")).flatten() for part in (table.first, table.weights, tops, bottoms)]
    sizes = tuple(map(len, parts))
    return _Tables(torch.cat(parts), sizes, table.weights.shape[1], int((bottoms - tops).max()), table.bits)


def run(
    frames: torch.Tensor,
    height: int,
    width: int,
    tokens: torch.Tensor,
    merge: int,
    side: int,
    unit_frames: int,
    arithmetic: str,
) -> torch.Tensor:
    """See evs_kernels.resize_patches."""
    (count, high, wide, channels), device, size = frames.shape, frames.device, merge * side
    depth = merge**2 * channels * unit_frames * side**2
    rows = torch.empty((len(tokens), depth), dtype=torch.uint8, device=device)
    if not len(tokens):
        return rows
    down, across = height // size, width // size
    x, y = _tables(wide, width, size, arithmetic), _tables(high, height, size, arithmetic)
    x_first, x_weights, _, _ = x.to(device)
    y_first, y_weights, tops, bottoms = y.to(device)
    of_one = unit_frames * y.room * channels * size
    some = min(len(tokens), max(1, SCRATCH_BYTES // of_one))
    scratch = torch.empty(some * of_one, dtype=torch.uint8, device=device)
    indices = _triton.upload(tokens, device)
    constants = {"ROWS": ROWS, "WIDTH": triton.next_power_of_2(size)}
    with _triton.on_device(frames):
        for first in range(0, len(tokens), some):
            chosen = indices[first : first + some]
            across_kernel[len(chosen) * unit_frames, triton.cdiv(y.room, ROWS)](
                frames, scratch, chosen, x_first, x_weights, tops, bottoms, count, high, wide, channels,
                unit_frames, down, across, size, y.room, x.taps, x.bits, **constants, num_warps=4,
            )  # fmt: skip
            down_kernel[len(chosen), triton.cdiv(depth, BLOCK)](
                scratch, rows[first:], chosen, y_first, y_weights, tops, depth, channels,
                unit_frames, down, across, merge, side, y.room, y.taps, y.bits, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return rows
