# SPDX-License-Identifier: Apache-2.0
"""Reference of select_topk: stable sorts."""

import torch

from .._types import Selection


def reserve(scores: torch.Tensor, min_per_unit: int) -> torch.Tensor:
    """Boolean (T, P): unit 0, and the min_per_unit highest scores of every other unit."""
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    kept[0] = True
    for unit in range(1, scores.shape[0]):
        order = torch.argsort(scores[unit], descending=True, stable=True)
        kept[unit, order[:min_per_unit]] = True
    return kept


def to_selection(kept: torch.Tensor) -> Selection:
    """Selection of a boolean (T, P) mask."""
    return Selection(kept.flatten().nonzero().squeeze(1), kept.sum(dim=1).to(torch.int32))


def run(scores: torch.Tensor, budget: int, min_per_unit: int) -> Selection:
    """See evs_kernels.select_topk."""
    kept = reserve(scores, min_per_unit)
    order = torch.argsort(scores.flatten(), descending=True, stable=True)
    rest = order[~kept.flatten()[order]]
    kept.view(-1)[rest[: max(0, budget - int(kept.sum()))]] = True
    return to_selection(kept)
