# SPDX-License-Identifier: Apache-2.0
"""The result type every selecting op returns, and the count rule they share."""

from typing import NamedTuple

import torch


class Selection(NamedTuple):
    """Which tokens of a clip are kept.

    Attributes:
        indices: int64 (K,), strictly ascending flat indices ``t * P + p``.
        counts: int32 (T,), kept tokens per temporal unit; sums to K.
    """

    indices: torch.Tensor
    counts: torch.Tensor


def reserved_tokens(units: int, per_unit: int, min_per_unit: int) -> int:
    """Tokens kept whatever the budget: unit 0 whole, and the minimum of every later unit."""
    return per_unit + (units - 1) * min(min_per_unit, per_unit)


def kept_tokens(units: int, per_unit: int, budget: int, min_per_unit: int) -> int:
    """Exact K of a top-k selection, known before any score is."""
    return min(units * per_unit, max(budget, reserved_tokens(units, per_unit, min_per_unit)))
