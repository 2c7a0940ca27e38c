# SPDX-License-Identifier: Apache-2.0
"""The independent reference of descriptors: pictures of frames, and what tokens look like, in plain loops and integers.

Of the package it reads the numbers in `learned.npz`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np

WEIGHTS = Path(__file__).parents[2] / "evs_vllm" / "core" / "learned.npz"
CELLS = 4


def pictures(frames: np.ndarray, unit_frames: int, tops: Sequence[int], lefts: Sequence[int], side: int) -> np.ndarray:
    """Low-resolution pictures of tokens.

    Args:
        frames: (F, height, width, 3) uint8. The last one stands also for those that a whole last unit lacks.
        unit_frames: Frames in a unit.
        tops, lefts: First pixel row of every row of tokens, first pixel column of every column.
        side: Side of a token in pixels.

    Returns:
        (T, rows, columns, 4, 4, 3) int64: the mean of every cell, halves rounded up.
    """
    units = -(-len(frames) // unit_frames)
    out = np.empty((units, len(tops), len(lefts), CELLS, CELLS, 3), dtype=np.int64)
    for t in range(units):
        several = np.stack([frames[min(f, len(frames) - 1)] for f in range(t * unit_frames, (t + 1) * unit_frames)])
        for row, top in enumerate(tops):
            for column, left in enumerate(lefts):
                for i in range(CELLS):
                    for j in range(CELLS):
                        cell = several[
                            :,
                            top + math.floor(i * side / CELLS) : top + math.ceil((i + 1) * side / CELLS),
                            left + math.floor(j * side / CELLS) : left + math.ceil((j + 1) * side / CELLS),
                        ].astype(np.int64)
                        pixels = cell[..., 0].size
                        for colour in range(3):
                            mean = Fraction(int(cell[..., colour].sum()), pixels)
                            out[t, row, column, i, j, colour] = math.floor(mean + Fraction(1, 2))
    return out


def source_pictures(frames: np.ndarray, unit_frames: int, rows: int, columns: int) -> np.ndarray:
    """Low-resolution pictures of the tokens of a grid that is laid over frames of any size.

    A cell's edges are where it begins in the frame, cut off to 256ths of a pixel. A pixel that it covers in part counts
    by the part.

    Args:
        frames: (F, height, width, 3) uint8, before anything was resized.
        unit_frames: Frames in a unit.
        rows, columns: Of the grid.

    Returns:
        As `pictures`.
    """
    down, across = (_shares(size, CELLS * n) for size, n in zip(frames.shape[1:3], (rows, columns), strict=True))
    units = -(-len(frames) // unit_frames)
    out = np.empty((units, CELLS * rows, CELLS * columns, 3), dtype=np.int64)
    for t in range(units):
        several = [frames[min(f, len(frames) - 1)] for f in range(t * unit_frames, (t + 1) * unit_frames)]
        whole = np.sum([frame.astype(np.int64) for frame in several], axis=0)
        for i, (top, heights) in enumerate(down):
            for j, (left, widths) in enumerate(across):
                inside = whole[top : top + len(heights), left : left + len(widths)]
                weights = np.outer(heights, widths)
                area = int(weights.sum()) * unit_frames
                for colour in range(3):
                    mean = Fraction(int((inside[..., colour] * weights).sum()), area)
                    out[t, i, j, colour] = math.floor(mean + Fraction(1, 2))
    return out.reshape(units, rows, CELLS, columns, CELLS, 3).transpose(0, 1, 3, 2, 4, 5)


def _shares(size: int, cells: int) -> list[tuple[int, list[int]]]:
    """For each of `cells` along `size` pixels the first pixel in it, and how many 256ths of each pixel are."""
    edges = [i * size * 256 // cells for i in range(cells + 1)]
    out = []
    for begin, end in zip(edges, edges[1:], strict=False):
        pixels = range(begin // 256, -(-end // 256))
        out.append((pixels[0], [min(end, 256 * p + 256) - max(begin, 256 * p) for p in pixels]))
    return out


def normalised(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every cell less the mean around its token, over the deviation there; that mean; that deviation. In integers.

    The last quotient is fixed-point, 20 bits of a factor that is cut off: that is how it is defined.
    """
    units, rows, columns = cells.shape[:3]
    values = np.empty_like(cells)
    means, deviations = np.empty((2, units, rows, columns, 3), dtype=np.int64)
    for t in range(units):
        for row in range(rows):
            for column in range(columns):
                for colour in range(3):
                    count, total, squares = 0, 0, 0
                    for down in (-1, 0, 1):
                        for right in (-1, 0, 1):
                            weight = (2 - abs(down)) * (2 - abs(right))
                            at = min(max(row + down, 0), rows - 1), min(max(column + right, 0), columns - 1)
                            around = cells[t, at[0], at[1], :, :, colour].flatten().tolist()
                            count += weight * len(around)
                            total += weight * sum(around)
                            squares += weight * sum(value * value for value in around)
                    deviation = math.sqrt(count * squares - total * total) / count
                    factor = math.floor(32 * 2**20 // count / (deviation + 6))
                    means[t, row, column, colour] = math.floor(Fraction(total, count) + Fraction(1, 2))
                    deviations[t, row, column, colour] = round(deviation)
                    for i in range(CELLS):
                        for j in range(CELLS):
                            product = (int(cells[t, row, column, i, j, colour]) * count - total) * factor
                            value = math.floor(Fraction(product, 2**20) + Fraction(1, 2))
                            values[t, row, column, i, j, colour] = min(max(value, -127), 127)
    return values, means, deviations


def contrast(cells: np.ndarray) -> np.ndarray:
    """(T, P, 21) int64: 2 x 2 means of normalised cells, and three times each the mean colour around."""
    values, means, _ = normalised(cells)
    units, rows, columns = cells.shape[:3]
    out = []
    for token in np.ndindex(units, rows, columns):
        mine = []
        for i in (0, 2):
            for j in (0, 2):
                for colour in range(3):
                    four = values[token][i : i + 2, j : j + 2, colour]
                    mine.append(128 + math.floor(Fraction(int(four.sum()), 4) + Fraction(1, 2)))
        for colour in range(3):
            mine += [int(means[token][colour])] * 3
        out.append(mine)
    return np.array(out).reshape(units, rows * columns, -1)


@cache
def layers() -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Weights, biases and shifts of the learned descriptor, as int64."""
    numbers = np.load(WEIGHTS)
    return [
        (numbers[f"weight{i}"].astype(np.int64), numbers[f"bias{i}"].astype(np.int64), int(shift))
        for i, shift in enumerate(numbers["shifts"])
    ]


def network_inputs(cells: np.ndarray) -> np.ndarray:
    """(T * P, 54) int64: normalised cells, mean and deviation around."""
    values, means, deviations = normalised(cells)
    rows = [
        [*values[token].flatten(), *(means[token] - 128), *np.minimum(deviations[token], 127)]
        for token in np.ndindex(*cells.shape[:3])
    ]
    return np.array(rows)


def learned(cells: np.ndarray) -> np.ndarray:
    """(T, P, F) int64: a network in integers."""
    values = network_inputs(cells)
    for number, (weight, bias, shift) in enumerate(layers()):
        sums = values @ weight + bias
        values = np.floor_divide(sums, 2**shift)
        values = np.clip(values + (128 if number == len(layers()) - 1 else 0), 0, 255)
    return values.reshape(cells.shape[0], cells.shape[1] * cells.shape[2], -1)


DESCRIBE = {"contrast": contrast, "learned": learned}


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).sum())
