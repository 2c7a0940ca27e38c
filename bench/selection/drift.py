# SPDX-License-Identifier: Apache-2.0
"""How far a tower that computes some tokens and reuses keys and values of the others drifts from the full one."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.common.pretrained_tower import PretrainedTower
from bench.selection.clips import as_clip
from evs_vllm.config import EVSConfig
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.selection import make_plan

SKIP = "skip"
"""The name of the row in which tokens that are not kept are absent from the tower."""


@torch.inference_mode()
def drift_of(
    tower: PretrainedTower, frames: np.ndarray, rates: list[float], ways: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row per rate and way to compute less.

    Args:
        tower: The tower.
        frames: (T, H, W, 3) uint8 RGB, one frame a unit.
        rates: Shares of the tokens to drop.
        ways: By name, the options of an `EVSConfig` beside rate and encoder.

    Returns:
        Rows of "rate" and "way"; "computed", the share of tokens that the tower computes; and of the patches of kept
        tokens after unit 0, which is exact: "centred_cosine" to the full tower's, without the clip's mean patch, and
        "centred_cosine_p05", the cosine that 5 % of them do not reach. "with_unit_0" and "with_unit_0_p05" are the
        same with unit 0 among them.
    """
    clip = as_clip(frames)
    embedded = tower.embed(torch.from_numpy(frames))
    # Frame by frame: they do not see each other, and less is in memory.
    full = torch.cat([tower.run(each[None]) for each in embedded])[:, 1:]
    centre = full.mean((0, 1))
    rows = []
    for rate in rates:
        for name, options in {**ways, SKIP: {"encoder_refresh": 0}}.items():
            plan = make_plan(clip, EVSConfig(rate=rate, encoder="reuse", **options))
            computed = np.zeros(plan.num_tokens, dtype=np.bool_)
            computed[plan.computed] = True
            patches = patches_of(torch.from_numpy(computed), plan)
            with_class_token = F.pad(patches, (1, 0), value=True)
            got = tower.run(embedded, with_class_token, "skip" if name == SKIP else "reuse")[:, 1:]
            cosine = F.cosine_similarity(got - centre, full - centre, dim=-1)
            kept = patches_of(torch.from_numpy(plan.mask), plan)
            later, every = cosine[1:][kept[1:]], cosine[kept]
            rows.append({
                "rate": rate, "way": name, "computed": float(computed.mean()),
                "centred_cosine": float(later.mean()), "centred_cosine_p05": float(later.quantile(0.05)),
                "with_unit_0": float(every.mean()), "with_unit_0_p05": float(every.quantile(0.05)),
            })  # fmt: skip
    return rows


def patches_of(tokens: torch.Tensor, plan: RetentionPlan) -> torch.Tensor:
    """(T, 4P) bool over patches by row and column, for (N,) bool over tokens of 2 x 2 of them."""
    return tokens.view(plan.grid).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
