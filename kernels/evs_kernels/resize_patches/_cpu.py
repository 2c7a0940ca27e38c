# SPDX-License-Identifier: Apache-2.0
"""numba resize_patches: of every token the columns first, into planes, then the rows, straight into patches.

What the columns' pass gives of the frames of a unit lies in scratch, for every column of tokens the last source rows
that a row of tokens needs; tokens below go on where those above ended. Split over threads by token.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

from .. import _vectors as v
from .._numba import njit
from .._parallel import for_ranges
from ._weights import Weights, weights_of

_LANES = 16
_QUAD = 4  # neighbouring pixels that the columns' pass makes at once
# Below this much output a second thread costs more than it saves.
_GRAIN_BYTES = 256 * 1024


class _Across(NamedTuple):
    """The columns' pass, for every column of tokens and quad of its pixels.

    Attributes:
        first: (columns * pixels,) int64, where in a source row the values of a pixel begin.
        weights: int16, (columns, quads, steps, pairs, 4 pixels, 4 channels, 2) for RGB, else (columns, pixels, taps).
        pixels: that a token is wide, filled up to whole quads.
        taps: source pixels of a step.
        steps: of taps, one after another.
        reach: values that are read from the start of a row.
        bits: as in `Weights`.
    """

    first: np.ndarray
    weights: np.ndarray
    pixels: int
    taps: int
    steps: int
    reach: int
    bits: int


class _Down(NamedTuple):
    """The rows' pass.

    Attributes:
        tops: (rows of tokens,) int64, the first source row that a row of tokens needs.
        bottoms: (rows of tokens,) int64, one past the last.
        kept: rows that scratch holds: the most that a row of tokens needs.
        slots: (height, taps) int64, the row in scratch of every tap.
        weights: (height, taps) int32.
        bits: as in `Weights`.
    """

    tops: np.ndarray
    bottoms: np.ndarray
    kept: int
    slots: np.ndarray
    weights: np.ndarray
    bits: int


@njit()
def _across_rgb(values, at, first, weights, column, pixels, taps, steps, bits, planes, to):
    """One row of one column of tokens, (3, pixels) values from planes[to]."""
    half, pairs = 1 << bits >> 1, (taps + 1) // 2
    w = column * pixels // 4 * steps * pairs * 32
    for x in range(column * pixels, (column + 1) * pixels, 4):
        a, b, c, d = at + first[x], at + first[x + 1], at + first[x + 2], at + first[x + 3]
        sums = v.splat(half)
        for _ in range(steps):
            read = v.groups(values, a, b, c, d)
            sums = v.dot(sums, v.rgb_pairs_0(read), v.load_pairs(weights, w))
            sums = v.dot(sums, v.rgb_pairs_2(read), v.load_pairs(weights, w + 32))
            w += 64
            if pairs == 3:
                sums = v.dot(sums, v.rgb_pairs_4(read), v.load_pairs(weights, w))
                w += 32
            a, b, c, d = a + 3 * taps, b + 3 * taps, c + 3 * taps, d + 3 * taps
        v.store_planes(planes, to, pixels, v.to_bytes(sums, bits))
        to += 4


@njit()
def _across_any(values, at, first, weights, column, pixels, taps, channels, bits, planes, to):
    """As `_across_rgb` for any number of channels, value by value."""
    half = 1 << bits >> 1
    for x in range(column * pixels, (column + 1) * pixels):
        for channel in range(channels):
            total = half
            for k in range(taps):
                total += np.int64(weights[x * taps + k]) * values[at + first[x] + k * channels + channel]
            planes[to + channel * pixels] = min(max(total >> bits, 0), 255)
        to += 1


@njit()
def _down(planes, at, patch_frames, frame_stride, merge, side, channels, pixels, slots, weights, row, bits, out, to):
    """Writes a token, and up to 15 values past its end."""
    half, taps = 1 << bits >> 1, slots.shape[1]
    flat_slots, flat_weights = slots.reshape(-1), weights.reshape(-1)
    for patch in range(merge * merge):
        left, top = patch % merge * side, row + patch // merge * side
        for channel in range(channels):
            for frame in range(patch_frames):
                start = at + frame * frame_stride + channel * pixels + left
                for y in range(top, top + side):
                    for x in range(0, side, 16):
                        sums = v.splat(half)
                        for k in range(y * taps, (y + 1) * taps):
                            read = v.load_singles(planes, start + x + flat_slots[k])
                            sums = v.dot(sums, read, v.splat_pair(flat_weights, k))
                        # What is too much is written over by the next row.
                        v.store(out, to + x, v.to_bytes(sums, bits))
                    to += side


@njit()
def _resize(
    values, shape, tokens, merge, side, unit_frames,
    first, across_weights, pixels, taps, steps, reach, across_bits,
    tops, bottoms, kept, slots, down_weights, down_bits, out,
):  # fmt: skip
    """Writes the rows of tokens, and up to 15 values past the last one's end."""
    count, height, width, channels = shape
    rows, columns = tops.shape[0], first.shape[0] // pixels
    per_row = channels * pixels
    block = kept * per_row
    planes = np.empty(unit_frames * columns * block + 32, np.uint8)
    line, now = width * channels, -1
    edge = np.zeros(line + reach, np.uint8)
    done = np.zeros((unit_frames, columns), np.int64)
    depth = merge * merge * channels * unit_frames * side * side
    for n in range(tokens.shape[0]):
        unit, place = tokens[n] // (rows * columns), tokens[n] % (rows * columns)
        row, column = place // columns, place % columns
        if unit != now:
            now = unit
            done[:] = 0
        for frame in range(unit_frames):
            picture = min(unit * unit_frames + frame, count - 1) * height
            to_block = (frame * columns + column) * block
            for y in range(max(done[frame, column], tops[row]), bottoms[row]):
                at, to = (picture + y) * line, to_block + y % kept * per_row
                source = values
                if at + reach > values.shape[0]:  # a vector would read on past the last frame
                    edge[:line] = values[at : at + line]
                    source, at = edge, 0
                if channels == 3:
                    _across_rgb(
                        source, at, first, across_weights, column, pixels, taps, steps, across_bits, planes, to
                    )
                else:
                    _across_any(
                        source, at, first, across_weights, column, pixels, taps, channels, across_bits, planes, to
                    )
            done[frame, column] = bottoms[row]
        _down(
            planes, column * block, unit_frames, columns * block, merge, side, channels, pixels, slots, down_weights,
            row * merge * side, down_bits, out, n * depth,
        )  # fmt: skip


@functools.lru_cache(maxsize=16)
def _across_of(source: int, target: int, size: int, channels: int) -> _Across:
    weights, columns, pixels = weights_of(source, target), target // size, -(-size // _QUAD) * _QUAD
    taken = weights.weights.shape[1]
    # Five pixels of RGB are all that sixteen bytes hold; by fours where that takes fewer multiplications.
    steps, taps = min((-(-taken // 4) * 2, 4), (-(-taken // 5) * 3, 5)) if channels == 3 else (1, taken)
    steps = -(-taken // taps)
    padded = np.zeros((columns, pixels, steps * taps), np.int16)
    padded[:, :size, :taken] = weights.weights.reshape(columns, size, taken)
    first = np.zeros((columns, pixels), np.int64)
    first[:, :size] = weights.first.reshape(columns, size) * channels
    first[:, size:] = first[:, size - 1 : size]
    reach = int(first.max()) + channels * (steps - 1) * taps + max(_LANES, channels * taps)
    if channels == 3:
        # (column, quad, pixel, step, tap) to (column, quad, step, pair, pixel, channel, tap of the pair).
        table = padded.reshape(columns, pixels // _QUAD, _QUAD, steps, taps)
        pairs = np.zeros((columns, pixels // _QUAD, _QUAD, steps, -(-taps // 2) * 2), np.int16)
        pairs[..., :taps] = table
        pairs = pairs.reshape(*pairs.shape[:-1], -1, 2).transpose(0, 1, 3, 4, 2, 5)
        padded = np.repeat(pairs[:, :, :, :, :, None], 4, axis=5)
    return _Across(
        first.reshape(-1), np.ascontiguousarray(padded).reshape(-1), pixels, taps, steps, reach, weights.bits
    )


@functools.lru_cache(maxsize=16)
def _down_of(source: int, target: int, size: int, per_row: int) -> _Down:
    weights = weights_of(source, target)
    ends = (weights.first + weights.counts).reshape(-1, size).max(axis=1)
    tops = weights.first.reshape(-1, size).min(axis=1)
    kept = int((ends - tops).max())
    taps = np.arange(weights.weights.shape[1])
    # A tap past the last one has no weight; it reads what is there.
    rows = weights.first[:, None] + np.minimum(taps, weights.counts[:, None] - 1)
    # An int32 is two int16 to the kernel: the weight, and what it multiplies zeros by.
    return _Down(tops, ends, kept, rows % kept * per_row, weights.weights.astype(np.int32), weights.bits)


def run(
    frames: torch.Tensor, height: int, width: int, tokens: torch.Tensor, merge: int, side: int, unit_frames: int
) -> torch.Tensor:
    """See evs_kernels.resize_patches."""
    channels, size = frames.shape[3], merge * side
    depth = merge**2 * channels * unit_frames * side**2
    rows = torch.empty((len(tokens), depth), dtype=torch.uint8)
    if not len(tokens):
        return rows
    across = _across_of(frames.shape[2], width, size, channels)
    down = _down_of(frames.shape[1], height, size, channels * across.pixels)
    values, shape, indices, out = frames.view(-1).numpy(), tuple(frames.shape), tokens.numpy(), rows.view(-1).numpy()
    settings = (merge, side, unit_frames, *across, *down)

    def body(lo: int, hi: int) -> None:
        # Vectors write past the end of a token: the last ones of a range go where there is room.
        middle = max(lo, hi - -(-_LANES // depth))
        if middle > lo:
            _resize(values, shape, indices[lo:middle], *settings, out[lo * depth :])
        last = np.empty((hi - middle) * depth + _LANES, np.uint8)
        _resize(values, shape, indices[middle:hi], *settings, last)
        out[middle * depth : hi * depth] = last[: (hi - middle) * depth]

    for_ranges(body, 0, len(tokens), grain=_GRAIN_BYTES // depth)
    return rows
