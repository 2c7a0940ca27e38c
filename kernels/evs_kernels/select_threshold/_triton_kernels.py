# SPDX-License-Identifier: Apache-2.0
"""Triton select_threshold: select_topk's compaction with the key given instead of searched."""

import torch

from .. import _triton
from .._types import Selection
from ..select_topk._triton_kernels import launch_select, launch_units
from ..select_topk._triton_kernels import run as select_topk
from ._key import threshold_bits


def run(scores: torch.Tensor, threshold: float, min_per_unit: int, max_tokens: int | None) -> Selection:
    """See evs_kernels.select_threshold."""
    bits = threshold_bits(threshold, scores.is_floating_point())
    if bits is None:
        return select_topk(scores, 0, min_per_unit)
    with _triton.on_device(scores):
        _, reserved = launch_units(scores[None], min_per_unit)
        room = scores.numel()
        indices, counts = launch_select(scores, reserved, room, need=room, last_bits=bits)
    kept = int(counts.sum())  # the one wait: only the scores know the count
    if max_tokens is not None and kept > max_tokens:
        return select_topk(scores, max_tokens, min_per_unit)
    return Selection(indices[:kept].clone(), counts)
