# SPDX-License-Identifier: Apache-2.0
"""From a clip and the settings to a `RetentionPlan`."""

from dataclasses import replace
from typing import TYPE_CHECKING

import evs_kernels
from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Clip
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.scorers import Selection, named_selection

if TYPE_CHECKING:
    import torch


def make_plan(clip: Clip, config: EVSConfig, selection: Selection | None = None) -> RetentionPlan:
    """Decides which tokens of a clip stay.

    Args:
        clip: The clip.
        config: Active settings (`EVSConfig.active`).
        selection: How to choose; by default what `config` names.

    Returns:
        The plan, without a layout.
    """
    chosen = named_selection(config.selection) if selection is None else selection
    return plan_keeping(chosen.select(clip, config), clip, config)


def plan_keeping(kept: "torch.Tensor", clip: Clip, config: EVSConfig) -> RetentionPlan:
    """The plan for tokens that were chosen, with what the vision tower computes beside them.

    Args:
        kept: (K,) int64, sorted indices of the tokens that stay; with encoder "reuse" all of unit 0 among them.
        clip, config: As for `make_plan`.

    Returns:
        The plan, without a layout.
    """
    dropped = clip.num_units * clip.tokens_per_unit - len(kept)
    indices = kept.cpu().numpy()
    # A clip that keeps everything has nothing to reuse: it takes the stock path. One that goes on from another has no
    # computed unit 0 to reuse: its tower computes all of it.
    if config.encoder != "reuse" or not dropped or clip.previous is not None:
        return RetentionPlan(clip.grid, indices, config.positions)
    plan = RetentionPlan(clip.grid, indices, config.positions, encoder="reuse")
    budget = dropped // config.encoder_refresh if config.encoder_refresh else 0
    if not budget:
        return plan
    return replace(plan, refreshed=evs_kernels.select_stale(clip.tokens, kept, budget).cpu().numpy())
