# SPDX-License-Identifier: Apache-2.0
"""select_hold: the tokens to keep so that dropped ones differ least, in sum, from the last kept one at their place."""

import torch

from .. import _validate
from .._dispatch import implementation
from .._types import Selection


def select_hold(
    descriptors: torch.Tensor,
    budget: int,
    *,
    min_per_unit: int = 0,
    weights: torch.Tensor | None = None,
    backend: str = "auto",
) -> Selection:
    """Chooses what stands best for the clip when the last kept token of a place stands for those dropped after it.

    A token (t, p) that is dropped costs ``weights[t]`` times the L1 distance between its descriptor and that of the
    last kept token of its place; a token that is kept costs a price instead. Unit 0 is kept whole, for nothing. For
    every place dynamic programming finds the kept units of the lowest cost: where something passes by, the most typical
    of its units, and not the first that differs much, as `select_anchored` does. For linear time this is done block
    after block of 32 units, the first of which begins with unit 1; in each, the last kept token of the blocks before
    stands as it is.

    The price is found by bisection of the numbers of prices: 0, 1, 2 ... 127, then 128, 130 ... 254, 256, 260 and so
    on, in steps of a 64th (`_prices.price`), up to the first that is higher than any cost of a block. What a price
    costs is the tokens it keeps, plus what every unit lacks of its minimum of ``min(min_per_unit, P)``. If price 0
    costs no more than the budget it is taken, else the lowest that bisection finds: one that costs more than the budget
    is too low, any other is not. Then every unit's minimum is filled by its tokens of the highest distance from what
    stands for them, and the budget by the highest such distances left in the clip; ties go to the lower flat index. Of
    several ways of the lowest cost a place has the one that keeps its next token latest.

    Args:
        descriptors: (T, P, F) uint8, contiguous, T, P >= 1 and 1 <= F <= 256; any device.
        budget: tokens to keep in total, unit 0 included; >= 0. Less than unit 0 and the minima is as much as they are.
        min_per_unit: tokens to keep in every unit at least; >= 0.
        weights: (T,) int32 from 0 to 4096, contiguous, how much the distances of a unit count; 1 each when None. The
            highest cost of a block, ``255 * F * 32 * max(weights)``, may be 2**29 at most. On the CPU wherever the
            descriptors are, because the host must know the largest.
        backend: one of ``evs_kernels.BACKENDS``. triton never waits for the device.

    Returns:
        Selection: indices int64 (K,) ascending, counts int32 (T,), on the descriptors' device, the same in every
        backend; K is ``min(T * P, max(budget, P + (T - 1) * min(min_per_unit, P)))``.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device or layout, a number out of range, more than 2**30 tokens, or a backend that
            cannot run here.
    """
    _validate.descriptors("descriptors", descriptors)
    units, per_unit, width = descriptors.shape
    budget = _validate.count("budget", budget)
    min_per_unit = min(_validate.count("min_per_unit", min_per_unit), per_unit)
    if weights is not None:
        _validate.hold_weights("weights", weights, units, width)
    return implementation("select_hold", backend, descriptors.device)(descriptors, budget, min_per_unit, weights)
