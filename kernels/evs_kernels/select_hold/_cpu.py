# SPDX-License-Identifier: Apache-2.0
"""numba select_hold: distances within blocks are measured once, then every price is a pass over them.

A token of a block of n units has (n - 1) / 2 distances of 2 bytes. They are read once for each price, so they lie in
the order in which they are read, chunk of places after chunk; threads share the chunks.
"""

import numpy as np
import torch

from .._distances import KEPT, distance, walk
from .._numba import njit
from .._parallel import for_ranges
from .._types import Selection, kept_tokens
from ..select_topk._cpu import run as select_topk
from ._prices import UNITS, lowest_that_fits, price, top_number

# Places of a chunk at most, so that their costs at every unit of a block stay in a core's cache.
_CHUNK = 256
# Tokens below which a second thread costs more than it saves, of a pass that measures distances and of one that prices.
_GRAIN_MEASURE = 4096
_GRAIN_PRICE = 32768


@njit()
def _measure(descriptors, lo, hi, pairs):
    """Writes the distances of later units of a block from unit `start`, from the latest start to the earliest.

    Of chunks [lo, hi); pairs is (chunks, blocks, UNITS * (UNITS - 1) / 2, places). Units of a block count from 1.
    """
    places = pairs.shape[3]
    for chunk in range(lo, hi):
        first = chunk * places
        for block in range(pairs.shape[1]):
            before = block * UNITS
            units = min(UNITS, descriptors.shape[0] - 1 - before)
            row = 0
            for start in range(units - 1, 0, -1):
                for t in range(before + start + 1, before + units + 1):
                    line = pairs[chunk, block, row]
                    for p in range(min(places, descriptors.shape[1] - first)):
                        line[p] = distance(descriptors[t, first + p], descriptors[before + start, first + p])
                    row += 1


@njit()
def _offer(end, distances, weight, worth, held, best, following):
    """Adds the distances of one more unit to what is held, and takes `end` as the next kept unit where that is best.

    Of equal ways the latest stays, as ends come in ascending order.
    """
    for p in range(held.shape[0]):
        held[p] += np.int32(distances[p]) * weight
        cost = np.int32(held[p] + worth[p])
        following[p] = end if cost <= best[p] else following[p]
        best[p] = min(cost, best[p])


@njit()
def _solve(pairs, weights, paid, worth, following, held):
    """Dynamic programming over a block of units, whose weights are given, at a price.

    worth: (UNITS + 2, places) int32; row s becomes the lowest cost of unit s and what comes after it, if s is kept.
    following: (UNITS + 2, places) uint8, the next unit that is kept then; the number of units + 1 for none.
    """
    units = weights.shape[0]
    worth[units + 1] = 0
    row = 0
    for start in range(units, 0, -1):
        worth[start] = worth[start + 1]
        following[start] = start + 1
        held[:] = 0
        for end in range(start + 2, units + 2):
            _offer(end, pairs[row], weights[end - 2], worth[end], held, worth[start], following[start])
            row += 1
        worth[start] += paid


@njit()
def _try_price(descriptors, weights, pairs, paid, lo, hi, standing, stands, kept, counts):
    """Adds to `counts` what every unit keeps at a price, of chunks [lo, hi), and marks it in `kept` unless it is empty.

    standing: (chunks, blocks, UNITS, places) uint16, the distances of a block's units from the token that stands for
    the place before the block; stands: (chunks, blocks, places) int32, of which unit that token is. Both are for the
    next price, where that is often the same token.
    """
    places = pairs.shape[3]
    worth = np.empty((UNITS + 2, places), np.int32)
    following = np.empty((UNITS + 2, places), np.uint8)
    held = np.empty(places, np.int32)
    anchors = np.empty(places, np.int32)
    for chunk in range(lo, hi):
        first = chunk * places
        inside = min(places, descriptors.shape[1] - first)
        anchors[:] = 0
        for block in range(pairs.shape[1]):
            before = block * UNITS
            units = min(UNITS, descriptors.shape[0] - 1 - before)
            factors = weights[before + 1 : before + 1 + units]
            _solve(pairs[chunk, block], factors, paid, worth, following, held)
            for p in range(inside):
                if stands[chunk, block, p] != anchors[p]:
                    stands[chunk, block, p] = anchors[p]
                    anchor = descriptors[anchors[p], first + p]
                    for unit in range(units):
                        standing[chunk, block, unit, p] = distance(descriptors[before + 1 + unit, first + p], anchor)
            worth[0], following[0], held[:] = worth[1], 1, 0
            for unit in range(units):
                distances = standing[chunk, block, unit]
                _offer(unit + 2, distances, factors[unit], worth[unit + 2], held, worth[0], following[0])
            for p in range(inside):
                unit = following[0, p]
                while unit <= units:
                    anchors[p] = before + unit
                    counts[before + unit] += 1
                    if len(kept):
                        kept[before + unit, first + p] = True
                    unit = following[unit, p]


def run(descriptors: torch.Tensor, budget: int, min_per_unit: int, weights: torch.Tensor | None) -> Selection:
    """See evs_kernels.select_hold."""
    units, per_unit, width = descriptors.shape
    values = descriptors.numpy()
    factors = np.ones(units, np.int32) if weights is None else weights.numpy()
    places = -(-per_unit // -(-per_unit // _CHUNK))  # of chunks of about equal size
    chunks, blocks, longest = -(-per_unit // places), -(-(units - 1) // UNITS), min(UNITS, units - 1)
    # Zeros where a chunk goes on beyond the last place: what is computed there is not used, but must not wrap around.
    pairs = np.zeros((chunks, blocks, longest * (longest - 1) // 2, places), np.uint16)
    standing = np.zeros((chunks, blocks, longest, places), np.uint16)
    stands = np.full((chunks, blocks, places), -1, np.int32)
    tokens = units * places
    for_ranges(lambda lo, hi: _measure(values, lo, hi, pairs), 0, chunks, grain=-(-_GRAIN_MEASURE // tokens))

    def counts_at(number: int, kept: np.ndarray) -> np.ndarray:
        found = []

        def body(lo: int, hi: int) -> None:
            counts = np.zeros(units, np.int32)
            _try_price(values, factors, pairs, np.int32(price(number)), lo, hi, standing, stands, kept, counts)
            found.append(counts)

        for_ranges(body, 0, chunks, grain=-(-_GRAIN_PRICE // tokens))
        return np.sum(found, axis=0)

    def fits(number: int) -> bool:
        counts = counts_at(number, np.empty((0, per_unit), np.bool_))
        return per_unit + int(counts[1:].clip(min=min_per_unit).sum()) <= bound

    bound = kept_tokens(units, per_unit, budget, min_per_unit)
    number = 0 if fits(0) else lowest_that_fits(fits, top_number(width, int(factors.max())))
    kept = np.zeros((units, per_unit), np.bool_)
    counts_at(number, kept)
    scores = torch.empty((units, per_unit), dtype=torch.int32)
    walk(values, factors, kept, KEPT, np.empty(per_unit, np.int32), scores.numpy())
    return select_topk(scores, bound, min_per_unit)
