# SPDX-License-Identifier: Apache-2.0
"""numba select_anchored: bisection over walks that only count, one walk that writes, then select_topk.

Single-threaded: a walk reads a few dozen bytes a token, in the order in which they lie.
"""

import numpy as np
import torch

from .._distances import distance, walk
from .._numba import njit
from .._types import Selection
from ..select_topk._cpu import run as select_topk


@njit()
def _cost(descriptors, weights, forced, level, min_per_unit, bound, anchors):
    """What `level` costs, or any number above `bound` if that is more. `anchors` is (P,) scratch."""
    anchors[:] = 0
    cost = descriptors.shape[1]
    for t in range(1, descriptors.shape[0]):
        kept = 0
        for p in range(descriptors.shape[1]):
            far = distance(descriptors[t, p], descriptors[anchors[p], p]) * weights[t]
            if forced[t, p] or far >= level:
                anchors[p] = t
                kept += 1
        cost += max(kept, min_per_unit)
        if cost > bound:  # later units cannot lower it
            break
    return cost


@njit()
def _bisect(descriptors, weights, forced, low, high, min_per_unit, bound, anchors):
    """The lowest level within the bound that bisection finds, where `low` costs more and `high` does not."""
    while high - low > 1:
        middle = (low + high) // 2
        if _cost(descriptors, weights, forced, middle, min_per_unit, bound, anchors) > bound:
            low = middle
        else:
            high = middle
    return high


def run(
    descriptors: torch.Tensor,
    budget: int | None,
    threshold: int | None,
    min_per_unit: int,
    weights: torch.Tensor | None,
    forced: torch.Tensor | None,
) -> Selection:
    """See evs_kernels.select_anchored."""
    units, per_unit, width = descriptors.shape
    stays = np.zeros((units, per_unit), np.bool_) if forced is None else forced.numpy()
    factors = np.ones(units, np.int32) if weights is None else weights.numpy()
    clip = (descriptors.numpy(), factors, stays)
    bound = units * per_unit
    if budget is not None:
        least = per_unit + int(stays[1:].sum(axis=1).clip(min=min_per_unit).sum())
        bound = min(bound, max(budget, least))
    high = 255 * width * int(factors.max()) + 1  # no distance reaches it
    level = 1 if threshold is None else min(threshold, high)
    anchors = np.empty(per_unit, np.int32)
    cost = _cost(*clip, level, min_per_unit, bound, anchors)
    if cost > bound:
        level = _bisect(*clip, level, high, min_per_unit, bound, anchors)
    scores = torch.empty((units, per_unit), dtype=torch.int32)
    walk(*clip, level, anchors, scores.numpy())
    return select_topk(scores, bound if threshold is None else min(cost, bound), min_per_unit)
