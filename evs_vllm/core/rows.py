# SPDX-License-Identifier: Apache-2.0
"""Plan -> embeddings: which clips the vision encoder takes together, and the rows that stay afterwards."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from evs_vllm.core.plan import IntArray, RetentionPlan
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


def upload(arrays: Sequence[IntArray], device: torch.device) -> list[torch.Tensor]:
    """Index arrays on a device, by one copy that the host does not wait for.

    Args:
        arrays: Of any shapes, values below 2**31.
        device: Where to.

    Returns:
        int32 tensors of the same shapes.
    """
    bounds = np.cumsum([0, *(array.size for array in arrays)])
    # Only from pinned memory does a copy to CUDA run by itself; torch keeps it until the copy has.
    packed = torch.empty(int(bounds[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
    into = packed.numpy()
    for array, start, stop in zip(arrays, bounds, bounds[1:]):
        into[start:stop] = array.reshape(-1)
    there = packed.to(device, non_blocking=True)
    return [there[start:stop].view(array.shape) for array, start, stop in zip(arrays, bounds, bounds[1:])]


def keep_rows(embeds: Sequence[torch.Tensor], plans: Sequence[RetentionPlan]) -> list[torch.Tensor]:
    """The embedding rows of clips that stay.

    Args:
        embeds: The encoder's output for each clip, any dtype, on one device: (R, hidden), or with encoder "reuse" one
            row for each of ``plan.computed``.
        plans: The clips' plans with their layouts.

    Returns:
        (K', hidden) for each clip, rows in their order.

    Raises:
        PlanError: The encoder gave another number of rows than the prompt was laid out for.
    """
    indices: list[IntArray] = []
    for rows, plan in zip(embeds, plans, strict=True):
        if plan.encoder == "reuse":
            expected, index = len(plan.computed), plan.kept_in_computed
        else:
            expected, index = len(plan.layout.is_visual) if plan.layout is not None else 0, plan.embed_index
        if rows.ndim != 2 or rows.shape[0] != expected:
            raise PlanError(f"The encoder returned {tuple(rows.shape)} for a clip laid out for {expected} rows.")
        indices.append(index)
    if not embeds:
        return []
    # Not a kernel of ours: the worker would compile it in the first request, which vLLM's JIT monitor may not forgive.
    return [
        rows if len(index) == len(rows) else rows.index_select(0, there)
        for rows, index, there in zip(embeds, indices, upload(indices, embeds[0].device))
    ]
