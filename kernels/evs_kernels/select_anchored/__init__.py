# SPDX-License-Identifier: Apache-2.0
"""select_anchored: the tokens to keep so that no dropped one is far from the last kept one at its place."""

import torch

from .. import _validate
from .._dispatch import implementation
from .._types import Selection


def select_anchored(
    descriptors: torch.Tensor,
    budget: int | None = None,
    *,
    threshold: int | None = None,
    min_per_unit: int = 0,
    weights: torch.Tensor | None = None,
    forced: torch.Tensor | None = None,
    backend: str = "auto",
) -> Selection:
    """Keeps the tokens that differ from the last kept token of their place, and fills up a budget.

    The distance of token (t, p) is ``weights[t]`` times the L1 distance between its descriptor and that of (s, p), its
    anchor, where s < t is the latest unit in which p was kept. Unit 0 is kept whole. At a level L, go through the units
    in order: a token is kept if it is forced or its distance is at least L. What that costs is the tokens kept, plus
    what every unit lacks of its minimum of ``min(min_per_unit, P)`` tokens. The bound is ``min(T*P, max(budget,
    cost(infinity)))``: forced tokens and minima are kept whatever the budget, and without a budget there is no bound.

    - With a budget alone the level is 1. If that costs more than the bound, the level is found by bisection of
      [1, top + 1], where ``top = 255 * F * max(weights)``: a level that costs more than the bound is too low, any other
      is not. The lowest level so found is taken. (A higher level may cost more, so the bisection is the definition.)
    - With a threshold that is the level. With a budget too, a threshold that costs more than the bound is raised by
      bisection of [threshold, top + 1], so that nothing dropped is as far as ``threshold`` from its anchor unless the
      bound bites. (What fills up minimum or bound is no anchor: it is chosen after the walk.)

    Then every unit's minimum is filled by its tokens of the highest distance, and unless the threshold stands as it was
    given, the bound is filled by the highest distances left in the clip. Every tie goes to the lower flat index.

    Args:
        descriptors: (T, P, F) uint8, contiguous, T, P >= 1 and 1 <= F <= 256; any device.
        budget: tokens to keep in total, unit 0 and forced ones included, or with a threshold the most to keep; >= 0.
        threshold: the distance from which a token is kept, in steps of a descriptor value times the weight; >= 1.
        min_per_unit: tokens to keep in every unit at least; >= 0.
        weights: (T,) int32 from 0 to 4096, contiguous, how much the distances of a unit count; 1 each when None. On
            the CPU wherever the descriptors are, because the host must know the largest.
        forced: (T, P) bool, contiguous, tokens that are kept and become anchors whatever their distance; on the
            descriptors' device. Unit 0 is forced whole whatever it says.
        backend: one of ``evs_kernels.BACKENDS``. triton waits for the device once, to learn the count, when a threshold
            or forced tokens are given, else never.

    Returns:
        Selection: indices int64 (K,) ascending, counts int32 (T,); on the descriptors' device, the same in every
        backend. With a budget alone K is exactly the bound.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device or layout, a number out of range, more than 2**30 tokens, neither budget nor
            threshold, or a backend that cannot run here.
    """
    _validate.descriptors("descriptors", descriptors)
    units, per_unit, _ = descriptors.shape
    if budget is None and threshold is None:
        raise ValueError("budget: got None without a threshold; allowed: at least one of them. Pass either.")
    if budget is not None:
        budget = _validate.count("budget", budget)
    if threshold is not None:
        threshold = _validate.count("threshold", threshold, smallest=1)
    min_per_unit = min(_validate.count("min_per_unit", min_per_unit), per_unit)
    if weights is not None:
        _validate.unit_weights("weights", weights, units)
    if forced is not None:
        _validate.token_mask("forced", forced, "descriptors", descriptors)
    run = implementation("select_anchored", backend, descriptors.device)
    return run(descriptors, budget, threshold, min_per_unit, weights, forced)
