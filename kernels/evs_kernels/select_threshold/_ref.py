# SPDX-License-Identifier: Apache-2.0
"""Reference of select_threshold: compare, and sort only when the cap bites."""

import torch

from .._types import Selection
from ..select_topk._ref import reserve, to_selection
from ..select_topk._ref import run as select_topk


def run(scores: torch.Tensor, threshold: float, min_per_unit: int, max_tokens: int | None) -> Selection:
    """See evs_kernels.select_threshold."""
    if scores.is_floating_point():
        passing = scores >= torch.tensor(threshold, dtype=torch.float32, device=scores.device)
    else:
        # Python compares an int with a float exactly; a tensor would round one of them.
        passes = [value >= threshold for value in scores.flatten().tolist()]
        passing = torch.tensor(passes, device=scores.device).view(scores.shape)
    kept = reserve(scores, min_per_unit) | passing
    if max_tokens is not None and int(kept.sum()) > max_tokens:
        return select_topk(scores, max_tokens, min_per_unit)
    return to_selection(kept)
