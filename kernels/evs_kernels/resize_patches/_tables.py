# SPDX-License-Identifier: Apache-2.0
"""What the numba kernels of resize_patches look up: weights and places of both passes, in the order they take them."""

import functools
from typing import NamedTuple

import numpy as np

from ._weights import weights_of

QUAD = 4  # neighbouring pixels that the columns' pass makes at once
LANES = 16  # values that a vector reads and writes
LOW_BITS = 11  # of a weight that does not fit int16, in its second part


class Across(NamedTuple):
    """The columns' pass, for every column of tokens and quad of its pixels.

    Attributes:
        first: (columns * pixels,) int64, where in a source row the values of a pixel begin.
        weights: int16, (columns, quads, steps, pairs, 4 pixels, 4 channels, 2) for RGB, else (columns, pixels, taps);
            all of them for each part, the high one first.
        parts: of a weight: 1, or 2 where it does not fit int16 and is ``(high << LOW_BITS) + low``.
        pixels: that a token is wide, filled up to whole quads.
        taps: source pixels of a step.
        steps: of taps, one after another.
        reach: values that are read from the start of a row.
        bits: as in `Weights`.
    """

    first: np.ndarray
    weights: np.ndarray
    parts: int
    pixels: int
    taps: int
    steps: int
    reach: int
    bits: int


class Down(NamedTuple):
    """The rows' pass.

    Attributes:
        tops: (rows of tokens,) int64, the first source row that a row of tokens needs.
        bottoms: (rows of tokens,) int64, one past the last.
        kept: rows that scratch holds: the most that a row of tokens needs.
        slots: (height, taps) int64, the row in scratch of every tap.
        weights: (parts, height, taps) int32, each an int16 by value.
        bits: as in `Weights`.
    """

    tops: np.ndarray
    bottoms: np.ndarray
    kept: int
    slots: np.ndarray
    weights: np.ndarray
    bits: int


def _parts(weights: np.ndarray, arithmetic: str) -> np.ndarray:
    """Weights as int16, (parts, ...)."""
    if arithmetic == "torch":
        return weights[None].astype(np.int16)
    return np.stack([weights >> LOW_BITS, weights & ((1 << LOW_BITS) - 1)]).astype(np.int16)


@functools.lru_cache(maxsize=16)
def across_of(source: int, target: int, size: int, channels: int, arithmetic: str) -> Across:
    weights = weights_of(source, target, arithmetic)
    columns, pixels = target // size, -(-size // QUAD) * QUAD
    split = _parts(weights.weights, arithmetic)
    parts, _, taken = split.shape
    # Five pixels of RGB are all that sixteen bytes hold; by fours where that takes fewer multiplications.
    steps, taps = min((-(-taken // 4) * 2, 4), (-(-taken // 5) * 3, 5)) if channels == 3 else (1, taken)
    steps = -(-taken // taps)
    padded = np.zeros((parts, columns, pixels, steps * taps), np.int16)
    padded[:, :, :size, :taken] = split.reshape(parts, columns, size, taken)
    first = np.zeros((columns, pixels), np.int64)
    first[:, :size] = weights.first.reshape(columns, size) * channels
    first[:, size:] = first[:, size - 1 : size]
    reach = int(first.max()) + channels * (steps - 1) * taps + max(LANES, channels * taps)
    if channels == 3:
        # (part, column, quad, pixel, step, tap) to (part, column, quad, step, pair, pixel, channel, tap of the pair).
        table = padded.reshape(parts, columns, pixels // QUAD, QUAD, steps, taps)
        pairs = np.zeros((*table.shape[:-1], -(-taps // 2) * 2), np.int16)
        pairs[..., :taps] = table
        pairs = pairs.reshape(*pairs.shape[:-1], -1, 2).transpose(0, 1, 2, 4, 5, 3, 6)
        padded = np.repeat(pairs[:, :, :, :, :, :, None], 4, axis=6)
    table = np.append(padded, np.zeros(32, np.int16))
    return Across(first.reshape(-1), table, parts, pixels, taps, steps, reach, weights.bits)


@functools.lru_cache(maxsize=16)
def down_of(source: int, target: int, size: int, per_row: int, arithmetic: str) -> Down:
    weights = weights_of(source, target, arithmetic)
    ends = (weights.first + weights.counts).reshape(-1, size).max(axis=1)
    tops = weights.first.reshape(-1, size).min(axis=1)
    kept = int((ends - tops).max())
    taps = np.arange(weights.weights.shape[1])
    # A tap past the last one has no weight; it reads what is there.
    rows = weights.first[:, None] + np.minimum(taps, weights.counts[:, None] - 1)
    # An int32 is two int16 to the kernel: the weight, and what it multiplies zeros by.
    split = _parts(weights.weights, arithmetic).astype(np.int32)
    return Down(tops, ends, kept, rows % kept * per_row, split, weights.bits)
