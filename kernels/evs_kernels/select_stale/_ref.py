# SPDX-License-Identifier: Apache-2.0
"""Reference of select_stale: unit after unit, level after level."""

import torch

from ._sample import SAMPLE


def run(tokens: torch.Tensor, kept: torch.Tensor, budget: int) -> torch.Tensor:
    """See evs_kernels.select_stale."""
    units, per_unit, _ = tokens.shape
    values = tokens[:, :, ::SAMPLE].int()
    stays = torch.zeros(units * per_unit, dtype=torch.bool, device=tokens.device)
    stays[kept] = True
    stays = stays.view(units, per_unit)

    def stale_at(level: int) -> torch.Tensor:
        stale = torch.zeros_like(stays)
        last = values[0].clone()
        for t in range(1, units):
            stale[t] = ((values[t] - last).abs().sum(dim=1) >= level) & ~stays[t]
            fresh = stale[t] | stays[t]
            last[fresh] = values[t][fresh]
        return stale

    low, high = 0, 255 * values.shape[2] + 1  # too low, or never tried; no distance reaches the other
    while high - low > 1:
        middle = (low + high) // 2
        if int(stale_at(middle).sum()) > budget:
            low = middle
        else:
            high = middle
    return stale_at(high).flatten().nonzero().flatten()
