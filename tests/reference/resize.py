# SPDX-License-Identifier: Apache-2.0
"""Bicubic resizing of uint8 with antialiasing by torch and by Pillow, spelled out in fractions and integers; for small
pictures.

Weights are what the cubic kernel of a = -1/2 gives, stretched where the picture shrinks, divided by their sum. They are
rounded to integers: torch's of as many bits as leave the largest below 2**15, Pillow's of 22 bits. Every value is a sum
of products, rounded half up and held to a byte: columns first, then rows.
"""

from fractions import Fraction
from math import floor

import numpy as np


def cubic(x: Fraction) -> Fraction:
    """The kernel, at a distance."""
    x, a = abs(x), Fraction(-1, 2)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return Fraction(0)


PILLOW_BITS = 22


def weights(source: int, target: int, bits: int | None = None) -> tuple[list[dict[int, int]], int]:
    """Of every place the integer weight of each value it sees, by where that is; and by how many bits 1 is shifted:
    torch's choice, if not said."""
    scale = Fraction(source, target)
    stretch, exact = max(scale, Fraction(1)), []
    for i in range(target):
        centre = scale * (i + Fraction(1, 2))
        near = range(max(0, floor(centre - 2 * stretch)), min(source, floor(centre + 2 * stretch) + 1))
        values = {j: cubic((j + Fraction(1, 2) - centre) / stretch) for j in near}
        total = sum(values.values())
        exact.append({j: value / total for j, value in values.items() if value})
    largest = max(max(values.values()) for values in exact)
    if bits is None:
        bits = max(n for n in range(23) if n == 0 or floor(largest * 2**n + Fraction(1, 2)) < 2**15)
    return [{j: _rounded(value * 2**bits) for j, value in values.items()} for values in exact], bits


def _rounded(value: Fraction) -> int:
    """To the nearest integer, halves away from 0."""
    size = floor(abs(value) + Fraction(1, 2))
    return size if value >= 0 else -size


def along(values: list[int], target: int, bits: int | None = None) -> list[int]:
    """One row or column resized."""
    if len(values) == target:
        return values
    table, bits = weights(len(values), target, bits)
    sums = [sum(weight * values[j] for j, weight in places.items()) for places in table]
    return [min(max((total + 2**bits // 2) >> bits, 0), 255) for total in sums]


def resize(picture: np.ndarray, height: int, width: int, bits: int | None = None) -> np.ndarray:
    """A (H, W, C) uint8 picture resized to (height, width, C), as torch does or with weights of so many bits."""
    channels = []
    for plane in np.moveaxis(picture, 2, 0).tolist():
        wide = [along(row, width, bits) for row in plane]
        columns = [along(list(column), height, bits) for column in zip(*wide, strict=True)]
        channels.append(list(zip(*columns, strict=True)))
    return np.moveaxis(np.array(channels, np.uint8), 0, 2)


def token_rows(
    frames: np.ndarray,
    height: int,
    width: int,
    tokens: list[int],
    merge: int,
    side: int,
    unit_frames: int,
    bits: int | None = None,
) -> list[list[int]]:
    """The values of some tokens, one by one in their order."""
    down, across, rows = height // (merge * side), width // (merge * side), []
    pictures = [resize(frame, height, width, bits) for frame in frames]
    for token in tokens:
        unit, row, column = token // (down * across), token // across % down, token % across
        values = []
        for patch_row in range(merge):
            for patch_column in range(merge):
                for channel in range(frames.shape[3]):
                    for frame in range(unit * unit_frames, (unit + 1) * unit_frames):
                        picture = pictures[min(frame, len(pictures) - 1)]
                        for y in range(side):
                            for x in range(side):
                                top, left = (row * merge + patch_row) * side, (column * merge + patch_column) * side
                                values.append(int(picture[top + y, left + x, channel]))
        rows.append(values)
    return rows
