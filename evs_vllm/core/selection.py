# SPDX-License-Identifier: Apache-2.0
"""From a clip and the settings to a `RetentionPlan`."""

import math
from dataclasses import replace

import numpy as np
import torch

import evs_kernels
from evs_vllm.config import EVSConfig
from evs_vllm.core.causal import refresh
from evs_vllm.core.clip import Clip
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.scorers import LEARNED, Selection, named_selection
from evs_vllm.options import exact

REFRESHED_AT_MOST = 2
"""One in so many of the dropped tokens, at most, is computed all the same."""


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
    plan = plan_keeping(chosen.select(clip, config), clip, config)
    if clip.previous is None:
        return plan
    return replace(plan, unchanged=not chosen.changed(clip, config))


def plan_keeping(kept: torch.Tensor, clip: Clip, config: EVSConfig) -> RetentionPlan:
    """The plan for tokens that were chosen, with what the vision tower computes beside them.

    Args:
        kept: (K,) int64, sorted indices of the tokens that stay; with encoder "reuse" all of unit 0 among them, unless
            the clip goes on from another one: of such a unit 0 the tower computes what is dropped, too.
        clip, config: As for `make_plan`.

    Returns:
        The plan, without a layout.
    """
    dropped = clip.num_units * clip.tokens_per_unit - len(kept)
    indices = kept.cpu().numpy()
    whole = RetentionPlan(clip.grid, indices, config.positions)
    # A clip that keeps everything has nothing to reuse: it takes the stock path.
    if config.encoder != "reuse" or not dropped:
        return whole
    if config.encoder_refresh:
        refreshed = stale(kept, clip, config).cpu().numpy()
    else:
        refreshed = np.flatnonzero(~whole.mask[0].ravel())
    plan = replace(whole, encoder="reuse", refreshed=refreshed)
    # So does one of which everything is computed: a single unit that goes on from others.
    return whole if len(plan.computed) == plan.num_tokens else plan


def stale(kept: torch.Tensor, clip: Clip, config: EVSConfig) -> torch.Tensor:
    """The dropped tokens whose keys and values the vision tower should not take from before.

    Those of unit 0, which only a clip that goes on from another one has: no earlier unit is at hand. Going through the
    others, a dropped token is one of them if its learned descriptor differs by ``encoder_refresh`` hundredths or more
    from that of when its place was last computed, as a kept token or as one of them. So a still scene has none, and a
    cut makes nearly all tokens of its unit that are not kept. After unit 0 they are at most one in `REFRESHED_AT_MOST`
    of the dropped tokens; where that bites, the difference that counts is raised.

    With the causal budget they are at most one in so many of the dropped tokens after unit 0 up to each unit, and of a
    unit those that differ most (`evs_vllm.core.causal.refresh`).

    Args:
        kept: (K,) int64, sorted indices of the tokens that stay.
        clip, config: As for `make_plan`.

    Returns:
        (S,) int64 on the clip's device, sorted.
    """
    tokens = clip.num_units * clip.tokens_per_unit
    forced = torch.zeros(tokens, dtype=torch.bool, device=kept.device)
    forced[kept] = True
    dropped = ~forced
    forced[: clip.tokens_per_unit] = True
    descriptor = LEARNED.descriptor
    level = max(1, math.ceil(exact(config.encoder_refresh) * exact(descriptor.unit)))
    if config.budget == "causal":
        stays = forced.view(clip.num_units, -1).cpu().numpy()
        later = refresh(descriptor.describe(clip).cpu().numpy(), stays, level, REFRESHED_AT_MOST)
        of_first = dropped[: clip.tokens_per_unit].nonzero().flatten()
        return torch.cat([of_first, torch.from_numpy(later).to(kept.device)])
    least = int(forced.sum())
    computed = evs_kernels.select_anchored(
        descriptor.describe(clip),
        least + (tokens - least) // REFRESHED_AT_MOST,
        threshold=level,
        forced=forced.view(clip.num_units, -1),
    ).indices
    refreshed: torch.Tensor = computed[dropped[computed]]
    return refreshed
