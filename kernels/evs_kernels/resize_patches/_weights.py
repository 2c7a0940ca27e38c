# SPDX-License-Identifier: Apache-2.0
"""The weights by which torch and Pillow resize uint8 along one side, in their integers (bicubic, antialias)."""

import functools
from typing import NamedTuple

import numpy as np

# a of the cubic kernel, as in Pillow.
_A = -0.5
_MOST_BITS = 22

ARITHMETICS = ("torch", "pillow")
"""Whose integers: torch's weights fit 16 bits, Pillow's are 2**22 parts of 1."""


class Weights(NamedTuple):
    """Along one side, the value at place i is ``sum(values[first[i] + k] * weights[i, k] for k) >> bits``, half of
    ``1 << bits`` added before and held to 0 ... 255 after. Sums are below 2**31.

    Attributes:
        first: (N,) int64; where the values of a place begin.
        counts: (N,) int64, how many there are; >= 1.
        weights: (N, largest count) int32, 0 past the count; those of torch would fit int16.
        bits: by how many bits a weight of 1 is shifted.
    """

    first: np.ndarray
    counts: np.ndarray
    weights: np.ndarray
    bits: int


@functools.lru_cache(maxsize=64)
def weights_of(source: int, target: int, arithmetic: str = "torch") -> Weights:
    """The weights from ``source`` to ``target`` values, without zeros at either end of a place's. Of as many values
    as there are, the weight of each itself."""
    first, real = real_weights(source, target)
    bits = _MOST_BITS if arithmetic == "pillow" else 0
    while bits < _MOST_BITS and int(0.5 + real.max() * 2 ** (bits + 1)) < 2**15:
        bits += 1
    scaled = real * 2**bits
    whole = np.where(scaled < 0, scaled - 0.5, scaled + 0.5).astype(np.int32)
    start = np.argmax(whole != 0, axis=1)
    counts = whole.shape[1] - np.argmax(whole[:, ::-1] != 0, axis=1) - start
    taken = np.arange(counts.max())
    inside = taken < counts[:, None]
    whole = np.where(inside, np.take_along_axis(whole, np.where(inside, start[:, None] + taken, 0), axis=1), 0)
    for array in (first := first + start, counts, whole := whole.astype(np.int32)):
        array.flags.writeable = False  # the cache hands out the same ones to all
    return Weights(first, counts, whole, bits)


def real_weights(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the values of every place begin, (N,) int64, and their weights as torch and Pillow have them in float64."""
    scale = source / target
    support = 2.0 * max(scale, 1.0)
    inverse = 1.0 / scale if scale >= 1.0 else 1.0
    most = 2 * int(np.ceil(support)) + 1
    centre = scale * (np.arange(target) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    counts = np.minimum((centre + support + 0.5).astype(np.int64), source) - first
    counts = np.clip(counts, 0, most)
    real = np.zeros((target, int(counts.max())))
    totals = np.zeros(target)
    for k in range(real.shape[1]):
        real[:, k] = np.where(k < counts, _cubic((k + first - centre + 0.5) * inverse), 0.0)
        totals += real[:, k]  # in this order, as both add: the last bit of a float64 can turn a rounding
    return first, real / totals[:, None]


def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
