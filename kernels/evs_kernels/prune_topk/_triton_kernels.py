# SPDX-License-Identifier: Apache-2.0
"""Triton prune_topk: score, add and reserve, select: three launches, none of which the host waits for."""

import torch

from .. import _triton
from .._types import Selection
from ..select_topk._triton_kernels import select_partial
from ..temporal_score._triton_kernels import launch_slices


def run(tokens: torch.Tensor, budget: int, min_per_unit: int) -> Selection:
    """See evs_kernels.prune_topk."""
    with _triton.on_device(tokens):
        return select_partial(launch_slices(tokens), budget, min_per_unit)
