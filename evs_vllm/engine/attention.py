# SPDX-License-Identifier: Apache-2.0
"""The attention of vLLM's vision towers while they compute some patches of a clip and reuse keys and values for others.

A family's tower hands out schedules (`evs_vllm.core.schedule.scheduled`), and the wrapped attention modules follow
them.
"""

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

from evs_vllm.core.schedule import SCHEDULE, ReuseSchedule, Varlen
from evs_vllm.families.base import ReuseTower

logger = init_logger("vllm.evs_vllm")


def wrap_tower(tower: ReuseTower) -> None:
    """Wraps a tower's attention modules and tells it which form their schedules have. Says so where that is no kernel
    of vLLM's."""
    attentions: list[Any] = list(tower.attentions())
    for attention in attentions:
        wrap_attention(attention)
    tower.has_varlen = all(map(has_varlen, attentions))
    others = {attention.attn_backend.name for attention in attentions if not has_varlen(attention)}
    if others and not current_platform.is_cpu():
        logger.info_once(
            "EVS: attention %s takes one length for queries and keys, so this vision tower encodes pruned clips with "
            "batches of SDPA instead; --evs-encoder full leaves them to it.",
            ", ".join(sorted(others)),
        )


def has_varlen(attention: Any) -> bool:
    """Whether a vision attention module's own kernel takes queries and keys of different lengths.

    vLLM's FlashAttention on NVIDIA GPUs does. Its Triton, FlashInfer and SDPA backends take one length for both, and
    what FlashAttention is on ROCm depends on what is installed.
    """
    return attention.attn_backend.name == "FLASH_ATTN" and attention._fa_version is not None


def wrap_attention(attention: Any) -> None:
    """Lets a vision attention module follow the schedule that is on it, if one is; otherwise it runs as before.

    With a schedule, the sequence boundaries (``cu_seqlens``) that the tower passes are not looked at.
    """
    stock = attention.forward

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any, **named: Any) -> Any:
        schedule: ReuseSchedule | None = getattr(attention, SCHEDULE, None)
        if schedule is None:
            return stock(query, key, value, *others, **named)
        heads = (query.shape[1], attention.num_heads, attention.head_size)
        q, k, v = (x.reshape(heads) for x in (query, key, value))
        if isinstance(schedule.placed, Varlen):
            out = flash_attention(attention, schedule, schedule.placed, q, k, v)
        else:
            out = schedule.attend(q, k, v, attention.scale)
        return out.reshape(query.shape)

    attention.forward = forward


def flash_attention(
    attention: Any,
    schedule: ReuseSchedule,
    form: Varlen,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """vLLM's FlashAttention with different query and key lengths. Written from its signature; not run on a GPU.

    Args:
        attention: The stock vision attention module.
        schedule: The schedule of its layer.
        form: What is placed of it: sequence boundaries and the tokens to gather.
        query, key, value: (rows, heads, head size) on CUDA.

    Returns:
        (rows, heads, head size).
    """
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    out: torch.Tensor = flash_attn_varlen_func(
        query.contiguous(),
        schedule.take(key, form.key_tokens),
        schedule.take(value, form.key_tokens),
        cu_seqlens_q=form.query_starts,
        cu_seqlens_k=form.key_starts,
        max_seqlen_q=form.longest_query,
        max_seqlen_k=form.longest_key,
        softmax_scale=attention.scale,
        causal=False,
        fa_version=attention._fa_version,
    )
    return out
