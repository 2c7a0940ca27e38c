# SPDX-License-Identifier: Apache-2.0
"""Reference of temporal_score: one unit at a time, wide types."""

import torch


def run(tokens: torch.Tensor) -> torch.Tensor:
    """See evs_kernels.temporal_score."""
    exact = tokens.dtype == torch.uint8
    wide = torch.int64 if exact else torch.float64
    rows = [torch.zeros(tokens.shape[1], dtype=wide, device=tokens.device)]
    for before, after in zip(tokens[:-1], tokens[1:], strict=True):
        rows.append((after.to(wide) - before.to(wide)).abs().sum(dim=-1))
    return torch.stack(rows).to(torch.int32 if exact else torch.float32)
