# SPDX-License-Identifier: Apache-2.0
"""Plan -> embeddings: which clips the vision encoder takes together, and the rows that stay afterwards."""

from collections.abc import Iterator, Sequence

import torch

from evs_vllm.core.plan import RetentionPlan
from evs_vllm.errors import PlanError


def encoder_batches(plans: Sequence[RetentionPlan], max_tokens: int) -> Iterator[tuple[int, int]]:
    """Cuts a batch of clips so that the encoder's peak memory stays what it was profiled for.

    The scheduler admits clips by the tokens they keep, while the encoder computes all of them; without this, a batch
    could be 1/(1-rate) times larger than any batch seen while profiling.

    Args:
        plans: The clips in order.
        max_tokens: Unpruned tokens that one encoder call may take; a larger single clip goes alone.

    Yields:
        (start, stop) of consecutive, non-empty slices that cover `plans`, each of one encoder mode.
    """
    start, tokens = 0, 0
    for i, plan in enumerate(plans):
        if i > start and (tokens + plan.num_tokens > max_tokens or plan.encoder != plans[start].encoder):
            yield start, i
            start, tokens = i, 0
        tokens += plan.num_tokens
    if plans:
        yield start, len(plans)


def keep_rows(embeds: torch.Tensor, plan: RetentionPlan) -> torch.Tensor:
    """The embedding rows of a clip that stay.

    Args:
        embeds: The encoder's output for the clip, any dtype and device: (R, hidden), or with encoder "reuse" one row
            for each of ``plan.computed``.
        plan: The clip's plan with its layout.

    Returns:
        (K', hidden), rows in their order.

    Raises:
        PlanError: The encoder gave another number of rows than the prompt was laid out for.
    """
    if plan.encoder == "reuse":
        expected, index = len(plan.computed), plan.kept_in_computed
    else:
        expected, index = len(plan.layout.is_visual) if plan.layout is not None else 0, plan.embed_index
    if embeds.ndim != 2 or embeds.shape[0] != expected:
        raise PlanError(f"The encoder returned {tuple(embeds.shape)} for a clip laid out for {expected} rows.")
    if len(index) == expected:
        return embeds
    # Not a kernel of ours: the worker would compile it in the first request, which vLLM's JIT monitor may not forgive.
    return embeds.index_select(0, torch.from_numpy(index).to(embeds.device))
