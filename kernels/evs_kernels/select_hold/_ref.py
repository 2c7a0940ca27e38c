# SPDX-License-Identifier: Apache-2.0
"""Reference of select_hold: place after place, all ways to hold in plain integers."""

import torch

from .._types import Selection, kept_tokens
from ..select_topk._ref import run as select_topk
from ._prices import UNITS, lowest_that_fits, price, top_number

KEPT = 2**31 - 1  # above every distance


def run(descriptors: torch.Tensor, budget: int, min_per_unit: int, weights: torch.Tensor | None) -> Selection:
    """See evs_kernels.select_hold."""
    units, per_unit, width = descriptors.shape
    factors = [1] * units if weights is None else weights.tolist()
    values = descriptors.int().cpu()
    # pairs[s, t, p]: what token (t, p) costs if (s, p) stands for it.
    pairs = torch.stack([(values - values[s]).abs().sum(dim=2) for s in range(units)])
    pairs = pairs * torch.tensor(factors)[None, :, None]

    def scores_at(number: int) -> torch.Tensor:
        scores = torch.empty((units, per_unit), dtype=torch.int32)
        for p in range(per_unit):
            distances = pairs[:, :, p].tolist()
            kept = _places_kept(distances, price(number))
            anchor = 0
            for t in range(units):
                anchor = t if t in kept else anchor
                scores[t, p] = KEPT if t in kept else distances[anchor][t]
        return scores

    def cost(scores: torch.Tensor) -> int:
        counts = (scores == KEPT).sum(dim=1)
        return int(counts.sum() + (min_per_unit - counts[1:]).clamp(min=0).sum())

    def fits(number: int) -> bool:
        return cost(scores_at(number)) <= bound

    bound = kept_tokens(units, per_unit, budget, min_per_unit)
    number = 0 if fits(0) else lowest_that_fits(fits, top_number(width, max(factors)))
    scores = scores_at(number)
    return select_topk(scores.to(descriptors.device), bound, min_per_unit)


def _places_kept(distances: list[list[int]], paid: int) -> set[int]:
    """The units that one place keeps at a price."""
    units, kept, anchor = len(distances), {0}, 0
    for first in range(1, units, UNITS):
        end = min(first + UNITS, units)
        best, following = {end: 0}, {}
        for start in [*range(end - 1, first - 1, -1), anchor]:
            held, ways = 0, []
            for t in range(max(start + 1, first), end + 1):
                ways.append((held + best[t] + (paid if t < end else 0), -t))
                held += distances[start][t] if t < end else 0
            best[start], latest = min(ways)
            following[start] = -latest
        while (anchor_next := following[anchor]) < end:
            anchor = anchor_next
            kept.add(anchor)
    return kept
