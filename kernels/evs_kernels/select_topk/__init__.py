# SPDX-License-Identifier: Apache-2.0
"""select_topk: the tokens to keep, for a fixed budget."""

import torch

from .. import _validate
from .._dispatch import implementation
from .._types import Selection


def select_topk(scores: torch.Tensor, budget: int, *, min_per_unit: int = 0, backend: str = "auto") -> Selection:
    """Keeps the highest scores of a clip within a token budget.

    Unit 0 is kept whole. In every later unit the ``min_per_unit`` highest scores (at most P) are reserved. What is
    left of the budget goes to the highest remaining scores of the whole clip. Every tie goes to the lower flat index.
    The result has exactly ``K = min(T*P, max(budget, P + (T-1) * min(min_per_unit, P)))`` tokens.

    Args:
        scores: (T, P) int32 or float32, contiguous, T, P >= 1; any device. Any sign, infinities allowed; -0.0 ties
            with 0.0. NaN is refused on the CPU. On a GPU it is not looked for (that would wait for the device): there
            a NaN ranks above every number or below, by its sign bit, and the result is still K valid indices.
        budget: tokens to keep in total, unit 0 and the reserved ones included; >= 0.
        min_per_unit: tokens to keep in every unit at least; >= 0.
        backend: one of ``evs_kernels.BACKENDS``. triton does not wait for the device: K is known beforehand.

    Returns:
        Selection: indices int64 (K,) ascending, counts int32 (T,); on the scores' device.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong rank, empty, not contiguous, NaN (CPU), a negative number, more than 2**30 tokens, or a
            backend that cannot run here.
    """
    _validate.clip_scores(scores)
    budget, min_per_unit = _validate.count("budget", budget), _validate.count("min_per_unit", min_per_unit)
    return implementation("select_topk", backend, scores.device)(scores, budget, min_per_unit)
