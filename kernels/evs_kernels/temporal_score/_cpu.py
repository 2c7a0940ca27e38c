# SPDX-License-Identifier: Apache-2.0
"""numba temporal_score: one pass over the clip, split over threads by token."""

import numpy as np
import torch

from .._blocks import for_token_blocks
from .._numba import njit


# The int32 accumulator is what lets LLVM use full-width integer vectors; validation made overflow impossible.
@njit()
def _l1_uint8(now, before, out):
    for row in range(now.shape[0]):
        a, b = now[row], before[row]
        total = np.int32(0)
        for d in range(a.shape[0]):
            total = np.int32(total + abs(np.int32(a[d]) - np.int32(b[d])))
        out[row] = total


# "reassoc" allows vector sums; NaN and infinity keep their meaning.
@njit(fastmath={"reassoc", "contract"})
def _l1_float32(now, before, out):
    for row in range(now.shape[0]):
        a, b = now[row], before[row]
        total = np.float32(0)
        for d in range(a.shape[0]):
            total += abs(a[d] - b[d])
        out[row] = total


def run(tokens: torch.Tensor) -> torch.Tensor:
    """See evs_kernels.temporal_score."""
    units, per_unit, _ = tokens.shape
    exact = tokens.dtype == torch.uint8
    scores = torch.empty((units, per_unit), dtype=torch.int32 if exact else torch.float32)
    flat = scores.view(-1).numpy()
    flat[:per_unit] = 0
    for_token_blocks(tokens, flat, _l1_uint8 if exact else _l1_float32)
    return scores
