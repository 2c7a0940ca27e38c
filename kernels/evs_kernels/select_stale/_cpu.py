# SPDX-License-Identifier: Apache-2.0
"""numba select_stale: places do not depend on each other, so threads share them; the samples are packed once."""

import numpy as np
import torch

from .._numba import njit
from .._parallel import for_ranges
from ._sample import SAMPLE

_GRAIN = 16  # places


@njit()
def _pack(tokens, step, first, stop, packed):
    """packed[p, t, i] = tokens[t, p, i * step] for the places [first, stop)."""
    for t in range(tokens.shape[0]):
        for p in range(first, stop):
            source, target = tokens[t, p], packed[p, t]
            for i in range(target.shape[0]):
                target[i] = source[i * step]


@njit()
def _scan(packed, stays, level, first, stop, stale):
    """Marks what is stale at `level` in the places [first, stop); returns how many that is."""
    found = 0
    for p in range(first, stop):
        last = 0
        for t in range(1, packed.shape[1]):
            stale[t, p] = False
            if stays[t, p]:
                last = t
                continue
            a, b = packed[p, t], packed[p, last]
            total = np.int32(0)
            for i in range(a.shape[0]):
                total = np.int32(total + abs(np.int32(a[i]) - np.int32(b[i])))
            if total >= level:
                stale[t, p] = True
                found += 1
                last = t
    return found


def run(tokens: torch.Tensor, kept: torch.Tensor, budget: int) -> torch.Tensor:
    """See evs_kernels.select_stale."""
    units, per_unit, depth = tokens.shape
    values = -(-depth // SAMPLE)
    clip = tokens.numpy()
    stays = np.zeros((units, per_unit), np.bool_)
    stays.reshape(-1)[kept.numpy()] = True
    stale = np.zeros((units, per_unit), np.bool_)
    packed = np.empty((per_unit, units, values), np.uint8)
    for_ranges(lambda first, stop: _pack(clip, SAMPLE, first, stop, packed), 0, per_unit, grain=_GRAIN)

    def count(level: int) -> int:
        found = []  # append is atomic
        for_ranges(
            lambda first, stop: found.append(_scan(packed, stays, level, first, stop, stale)), 0, per_unit, grain=_GRAIN
        )
        return sum(found)

    low, high, marked = 0, 255 * values + 1, 0
    while high - low > 1:
        marked = (low + high) // 2
        if count(marked) > budget:
            low = marked
        else:
            high = marked
    if marked != high:
        count(high)
    return torch.from_numpy(np.flatnonzero(stale))
