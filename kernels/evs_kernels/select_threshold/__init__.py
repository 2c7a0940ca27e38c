# SPDX-License-Identifier: Apache-2.0
"""select_threshold: the tokens that changed enough, so that the count follows the content."""

import math

import torch

from .. import _validate
from .._dispatch import implementation
from .._types import Selection


def select_threshold(
    scores: torch.Tensor,
    threshold: float,
    *,
    min_per_unit: int = 0,
    max_tokens: int | None = None,
    backend: str = "auto",
) -> Selection:
    """Keeps unit 0, and every token whose score is at least ``threshold``.

    In every later unit the ``min_per_unit`` highest scores (at most P) are kept whatever they are. When that makes
    more than ``max_tokens``, the result is ``select_topk(scores, max_tokens, min_per_unit=min_per_unit)``: unit 0 and
    the reserved tokens stay, even above the cap. Every tie goes to the lower flat index.

    Args:
        scores: (T, P) int32 or float32, contiguous, T, P >= 1; any device. NaN as in select_topk.
        threshold: a number, infinities allowed. int32 scores are compared with it exactly (2.5 keeps 3 and more);
            for float32 scores it is rounded to the nearest float32 first.
        min_per_unit: tokens to keep in every unit at least; >= 0.
        max_tokens: largest total, or None for no cap; >= 0.
        backend: one of ``evs_kernels.BACKENDS``. triton waits for the device once, to learn the count.

    Returns:
        Selection: indices int64 (K,) ascending, counts int32 (T,); on the scores' device.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: as in select_topk, or a NaN threshold.
    """
    _validate.clip_scores(scores)
    min_per_unit = _validate.count("min_per_unit", min_per_unit)
    if max_tokens is not None:
        max_tokens = _validate.count("max_tokens", max_tokens)
    if not isinstance(threshold, int | float):
        raise TypeError(f"threshold: got {threshold!r}; allowed: int or float. Convert it with float().")
    if math.isnan(threshold):
        raise ValueError("threshold: got NaN; allowed: a number or an infinity. Use inf to keep only the minimum.")
    run = implementation("select_threshold", backend, scores.device)
    return run(scores, threshold, min_per_unit, max_tokens)
