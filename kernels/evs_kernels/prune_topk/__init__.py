# SPDX-License-Identifier: Apache-2.0
"""prune_topk: score and select in one call."""

import torch

from .. import _validate
from .._dispatch import implementation
from .._types import Selection


def prune_topk(tokens: torch.Tensor, budget: int, *, min_per_unit: int = 0, backend: str = "auto") -> Selection:
    """``select_topk(temporal_score(tokens), budget, min_per_unit=min_per_unit)``, fused where that pays.

    Args:
        tokens: (T, P, D) uint8, float16, bfloat16 or float32, contiguous, T, P, D >= 1; any device.
        budget: tokens to keep in total; >= 0. See select_topk.
        min_per_unit: tokens to keep in every unit at least; >= 0.
        backend: one of ``evs_kernels.BACKENDS``. triton: at most three launches, every byte of the tokens is read
            once, and nothing waits for the device.

    Returns:
        Selection: indices int64 (K,) ascending, counts int32 (T,); on the tokens' device. For uint8 the same in every
        backend; for floats, scores that differ by rounding only may be ranked differently by two backends, but one
        backend always gives one answer.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: as in temporal_score and select_topk.
    """
    _validate.clip_tokens("tokens", tokens, _validate.TOKEN_DTYPES)
    budget, min_per_unit = _validate.count("budget", budget), _validate.count("min_per_unit", min_per_unit)
    return implementation("prune_topk", backend, tokens.device)(tokens, budget, min_per_unit)
