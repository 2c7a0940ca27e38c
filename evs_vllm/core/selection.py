# SPDX-License-Identifier: Apache-2.0
"""Budget and selection: from a clip's tokens and the settings to a `RetentionPlan`.

Source: arXiv 2510.14624 (unit 0 whole, the highest scores over the whole clip); the count rule equals that of vLLM's
``--video-pruning-rate``, with the rate read as an exact decimal.
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import evs_kernels
from evs_vllm.config import EVSConfig, exact
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.scorers import pixel_change

if TYPE_CHECKING:
    import torch


def token_floor(num_units: int, tokens_per_unit: int, min_tokens_per_unit: int) -> int:
    """Tokens that always stay: unit 0 whole and the minimum of every other unit."""
    return tokens_per_unit + (num_units - 1) * min(min_tokens_per_unit, tokens_per_unit)


def token_budget(num_units: int, tokens_per_unit: int, config: EVSConfig) -> int:
    """The number of tokens that `config` keeps of a clip when it sets a rate, or at most keeps when it does not.

    Args:
        num_units: T >= 1.
        tokens_per_unit: P >= 1.
        config: The settings.

    Returns:
        ``max(floor, min(floor(N * (1 - rate)), max_tokens))`` with N = T*P and the floor of `token_floor`.
    """
    total = num_units * tokens_per_unit
    budget = math.floor(total * (1 - exact(config.rate or 0)))
    if config.max_tokens is not None:
        budget = min(budget, config.max_tokens)
    return max(budget, token_floor(num_units, tokens_per_unit, config.min_tokens_per_unit))


def make_plan(tokens: "torch.Tensor", grid: tuple[int, int, int], config: EVSConfig) -> RetentionPlan:
    """Decides which tokens of a clip stay.

    Args:
        tokens: (T, P, D) uint8 pixels, one row per token, CPU or CUDA, contiguous.
        grid: (T, H, W) with H*W == P.
        config: Active settings (`EVSConfig.active`).

    Returns:
        The plan, without a layout.
    """
    units, per_unit, values = tokens.shape
    budget = token_budget(units, per_unit, config)
    if config.threshold:
        # Mean change per value >= threshold, in integers: score >= threshold * D.
        selection = evs_kernels.select_threshold(
            pixel_change(tokens),
            math.ceil(exact(config.threshold) * values),
            min_per_unit=config.min_tokens_per_unit,
            max_tokens=config.max_tokens,
        )
    else:
        selection = evs_kernels.prune_topk(tokens, budget, min_per_unit=config.min_tokens_per_unit)
    return plan_keeping(selection.indices, tokens, grid, config)


def plan_keeping(
    kept: "torch.Tensor", tokens: "torch.Tensor", grid: tuple[int, int, int], config: EVSConfig
) -> RetentionPlan:
    """The plan for tokens that were chosen, with what the vision tower computes beside them.

    Args:
        kept: (K,) int64, sorted indices of the tokens that stay; with encoder "reuse" all of unit 0 among them.
        tokens, grid, config: As for `make_plan`.

    Returns:
        The plan, without a layout.
    """
    dropped = tokens.shape[0] * tokens.shape[1] - len(kept)
    indices = kept.cpu().numpy()
    if config.encoder != "reuse" or not dropped:
        # A clip that keeps everything has nothing to reuse: it takes the stock path.
        return RetentionPlan(grid, indices, config.positions)
    plan = RetentionPlan(grid, indices, config.positions, encoder="reuse")
    budget = dropped // config.encoder_refresh if config.encoder_refresh else 0
    if not budget:
        return plan
    return replace(plan, refreshed=evs_kernels.select_stale(tokens, kept, budget).cpu().numpy())
