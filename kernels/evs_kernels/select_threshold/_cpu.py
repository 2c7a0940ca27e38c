# SPDX-License-Identifier: Apache-2.0
"""numba select_threshold: one comparison per token on top of select_topk's pieces."""

import numpy as np
import torch

from .._numba import njit
from .._types import Selection
from ..select_topk._cpu import keys_of, reserve, to_keys, to_selection
from ..select_topk._cpu import run as select_topk
from ._key import threshold_bits


@njit()
def _take_from(keys, taken, key):
    """Takes every entry of at least ``key``; returns how many are taken now."""
    kept = 0
    for i in range(keys.shape[0]):
        if keys[i] >= key:
            taken[i] = True
        if taken[i]:
            kept += 1
    return kept


def run(scores: torch.Tensor, threshold: float, min_per_unit: int, max_tokens: int | None) -> Selection:
    """See evs_kernels.select_threshold."""
    bits = threshold_bits(threshold, scores.is_floating_point())
    if bits is None:
        return select_topk(scores, 0, min_per_unit)
    key = np.empty(1, np.uint32)
    to_keys(np.array([bits], np.int32), scores.is_floating_point(), key)
    keys = keys_of(scores)
    taken = np.empty(keys.shape, np.bool_)
    reserve(keys, min_per_unit, taken)
    kept = _take_from(keys.reshape(-1), taken.reshape(-1), key[0])
    if max_tokens is not None and kept > max_tokens:
        return select_topk(scores, max_tokens, min_per_unit)
    return to_selection(taken, kept)
