# SPDX-License-Identifier: Apache-2.0
"""numba cosine_score: dot product and both norms in one pass."""

import math

import numpy as np
import torch

from .._blocks import for_token_blocks
from .._numba import njit


# "reassoc" allows vector sums; NaN and infinity keep their meaning.
@njit(fastmath={"reassoc", "contract"})
def _sums(a, b):
    dot, norm_a, norm_b = np.float32(0), np.float32(0), np.float32(0)
    for d in range(a.shape[0]):
        dot += a[d] * b[d]
        norm_a += a[d] * a[d]
        norm_b += b[d] * b[d]
    return dot, norm_a, norm_b


@njit()
def _cosine_float32(now, before, out):
    for row in range(now.shape[0]):
        dot, norm_a, norm_b = _sums(now[row], before[row])
        if dot == norm_a and dot == norm_b:  # equal vectors; rounding below would leave about 1e-7
            out[row] = np.float32(0)
        elif norm_a == 0 or norm_b == 0:
            out[row] = np.float32(1)
        else:
            cosine = dot / (math.sqrt(norm_a) * math.sqrt(norm_b))
            out[row] = np.float32(1) - min(max(cosine, np.float32(-1)), np.float32(1))


def run(features: torch.Tensor) -> torch.Tensor:
    """See evs_kernels.cosine_score."""
    units, per_unit, _ = features.shape
    scores = torch.empty((units, per_unit), dtype=torch.float32)
    flat = scores.view(-1).numpy()
    flat[:per_unit] = 0
    for_token_blocks(features, flat, _cosine_float32)
    return scores
