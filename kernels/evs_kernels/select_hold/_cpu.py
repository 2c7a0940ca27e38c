# SPDX-License-Identifier: Apache-2.0
"""numba select_hold: what holding costs is summed up once, then every price is a pass over those sums.

Single-threaded. A token of a block of n units has (n - 1) / 2 sums of 4 bytes.
"""

import numpy as np
import torch

from .._numba import njit
from .._types import Selection, kept_tokens
from ..select_anchored._cpu import _distance
from ..select_topk._cpu import run as select_topk
from ._prices import UNITS, lowest_that_fits, price, top_number

_KEPT = np.int32(2**31 - 1)  # above every distance


@njit()
def _sum_up(descriptors, weights, sums):
    """Writes for each block what it costs to hold its unit `start` up to `end` (excluded), 1 <= start < end - 1.

    Units of a block are counted from 1; sums is (blocks, UNITS * (UNITS - 1) / 2, P), by end, then by start.
    """
    for block in range(sums.shape[0]):
        before = block * UNITS
        for end in range(3, min(UNITS, descriptors.shape[0] - 1 - before) + 2):
            row = (end - 3) * (end - 2) // 2 - 1
            t = before + end - 1
            for start in range(1, end - 1):
                for p in range(descriptors.shape[1]):
                    sums[block, row + start, p] = (
                        _distance(descriptors[t, p], descriptors[before + start, p]) * weights[t]
                    )
                if start < end - 2:
                    sums[block, row + start] += sums[block, row - (end - 3) + start]


@njit()
def _solve(sums, units, paid, best, following):
    """Dynamic programming over a block of `units` units at a price.

    best: (UNITS + 2, P) int32; row s, 1 <= s <= units, becomes the lowest cost of what comes after unit s, if s is
    kept. following: (UNITS + 2, P) uint8, the next unit that is kept then, `units` + 1 for none.
    """
    best[units + 1] = 0
    for start in range(units, 0, -1):
        # From the latest to the earliest, and only the cheaper replaces: of equal ways the latest stays.
        for end in range(units + 1, start, -1):
            keeps = paid if end <= units else np.int32(0)
            row = (end - 3) * (end - 2) // 2 - 1 + start
            for p in range(best.shape[1]):
                cost = best[end, p] + keeps + (sums[row, p] if end > start + 1 else np.int32(0))
                if end == units + 1 or cost < best[start, p]:
                    best[start, p] = cost
                    following[start, p] = end


@njit()
def _first_turn(descriptors, weights, before, units, paid, best, anchor, p):
    """The unit of a block in which the token that stands for place p gives way, `units` + 1 for never."""
    cheapest = best[1, p] + paid
    turn, held = 1, np.int32(0)
    for end in range(2, units + 2):
        t = before + end - 1
        held += _distance(descriptors[t, p], descriptors[anchor, p]) * weights[t]
        cost = held + best[end, p] + (paid if end <= units else np.int32(0))
        if cost <= cheapest:
            cheapest, turn = cost, end
    return turn


@njit()
def _walk(descriptors, weights, sums, paid, scratch, counts, scores):
    """Writes how many tokens each unit keeps at a price, and into `scores`, unless it is empty, every token's distance
    from what stands for it, _KEPT where it is kept."""
    best, following, anchors = scratch
    anchors[:] = 0
    counts[:] = 0
    counts[0] = descriptors.shape[1]
    scores[:1] = _KEPT
    for block in range(sums.shape[0]):
        before = block * UNITS
        units = min(UNITS, descriptors.shape[0] - 1 - before)
        _solve(sums[block], units, paid, best, following)
        for p in range(descriptors.shape[1]):
            anchor = anchors[p]
            turn = _first_turn(descriptors, weights, before, units, paid, best, anchor, p)
            for unit in range(1, units + 1):
                t = before + unit
                if unit == turn:
                    counts[t] += 1
                    anchor, turn = t, following[turn, p]
                    if len(scores):
                        scores[t, p] = _KEPT
                elif len(scores):
                    scores[t, p] = _distance(descriptors[t, p], descriptors[anchor, p]) * weights[t]
            anchors[p] = anchor


@njit()
def _cost(counts, min_per_unit):
    cost = np.int64(counts[0])
    for t in range(1, counts.shape[0]):
        cost += max(counts[t], min_per_unit)
    return cost


def run(descriptors: torch.Tensor, budget: int, min_per_unit: int, weights: torch.Tensor | None) -> Selection:
    """See evs_kernels.select_hold."""
    units, per_unit, width = descriptors.shape
    factors = np.ones(units, np.int32) if weights is None else weights.numpy()
    clip = (descriptors.numpy(), factors)
    blocks = -(-(units - 1) // UNITS)
    sums = np.empty((blocks, UNITS * (UNITS - 1) // 2 if units > 2 else 1, per_unit), np.int32)
    _sum_up(*clip, sums)
    rows = (UNITS + 2, per_unit)
    scratch = (np.empty(rows, np.int32), np.empty(rows, np.uint8), np.empty(per_unit, np.int32))
    counts = np.empty(units, np.int32)
    nothing = np.empty((0, per_unit), np.int32)

    def fits(number: int) -> bool:
        _walk(*clip, sums, np.int32(price(number)), scratch, counts, nothing)
        return _cost(counts, min_per_unit) <= bound

    bound = kept_tokens(units, per_unit, budget, min_per_unit)
    number = 0 if fits(0) else lowest_that_fits(fits, top_number(width, int(factors.max())))
    scores = torch.empty((units, per_unit), dtype=torch.int32)
    _walk(*clip, sums, np.int32(price(number)), scratch, counts, scores.numpy())
    return select_topk(scores, bound, min_per_unit)
