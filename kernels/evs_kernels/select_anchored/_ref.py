# SPDX-License-Identifier: Apache-2.0
"""Reference of select_anchored: unit after unit, level after level."""

import torch

from .._types import Selection
from ..select_topk._ref import run as select_topk

KEPT = 2**31 - 1  # above every distance


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
    values = descriptors.int()
    if weights is None:
        weights = torch.ones(units, dtype=torch.int32)

    def walk(level: int) -> torch.Tensor:
        """(T, P) distances from the anchor, KEPT where the token is kept."""
        scores = torch.full((units, per_unit), KEPT, dtype=torch.int32, device=descriptors.device)
        anchors = values[0].clone()
        for t in range(1, units):
            distance = (values[t] - anchors).abs().sum(dim=1) * int(weights[t])
            kept = distance >= level
            if forced is not None:
                kept |= forced[t]
            scores[t, ~kept] = distance[~kept].int()
            anchors[kept] = values[t][kept]
        return scores

    def cost(scores: torch.Tensor) -> int:
        counts = (scores == KEPT).sum(dim=1)
        return int(counts.sum() + (min_per_unit - counts[1:]).clamp(min=0).sum())

    high = 255 * width * int(weights.max()) + 1  # no distance reaches it
    low = 1 if threshold is None else min(threshold, high)
    bound = units * per_unit
    if budget is not None:
        bound = min(bound, max(budget, cost(walk(high))))
    scores = walk(low)
    if cost(scores) > bound:
        while high - low > 1:
            middle = (low + high) // 2
            if cost(walk(middle)) > bound:
                low = middle
            else:
                high = middle
        return select_topk(walk(high), bound, min_per_unit)
    return select_topk(scores, bound if threshold is None else cost(scores), min_per_unit)
