# SPDX-License-Identifier: Apache-2.0
"""Reference of prune_topk: the two references in a row."""

import torch

from .. import _validate
from .._types import Selection
from ..select_topk._ref import run as select_topk
from ..temporal_score._ref import run as temporal_score


def run(tokens: torch.Tensor, budget: int, min_per_unit: int) -> Selection:
    """See evs_kernels.prune_topk."""
    scores = temporal_score(tokens)
    _validate.clip_scores(scores)  # NaN tokens end here
    return select_topk(scores, budget, min_per_unit)
