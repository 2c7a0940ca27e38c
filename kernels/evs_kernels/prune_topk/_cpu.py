# SPDX-License-Identifier: Apache-2.0
"""numba prune_topk: the score streams the clip once; selection works on T*P scores, so there is nothing to fuse."""

import torch

from .. import _validate
from .._types import Selection
from ..select_topk._cpu import run as select_topk
from ..temporal_score._cpu import run as temporal_score


def run(tokens: torch.Tensor, budget: int, min_per_unit: int) -> Selection:
    """See evs_kernels.prune_topk."""
    scores = temporal_score(tokens)
    _validate.clip_scores(scores)  # NaN tokens end here
    return select_topk(scores, budget, min_per_unit)
