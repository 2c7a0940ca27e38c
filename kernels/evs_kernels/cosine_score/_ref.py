# SPDX-License-Identifier: Apache-2.0
"""Reference of cosine_score: one unit at a time, float64."""

import torch


def run(features: torch.Tensor) -> torch.Tensor:
    """See evs_kernels.cosine_score."""
    rows = [torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)]
    for before, after in zip(features[:-1].double(), features[1:].double(), strict=True):
        norms = before.norm(dim=-1) * after.norm(dim=-1)
        cosine = (before * after).sum(dim=-1) / norms
        distance = torch.where(norms == 0, 1.0, 1 - cosine.clamp(-1, 1))
        rows.append(torch.where((before == after).all(dim=-1), 0.0, distance))
    return torch.stack(rows).to(torch.float32)
