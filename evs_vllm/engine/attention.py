# SPDX-License-Identifier: Apache-2.0
"""The attention of vLLM's vision towers while they compute some patches of a clip and reuse keys and values for others.

A family's tower hands out schedules (`evs_vllm.core.reuse.scheduled`), and the wrapped attention modules follow them.
"""

from typing import Any

import torch

from evs_vllm.core.reuse import SCHEDULE, ReuseSchedule, Varlen


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
        if query.is_cuda and getattr(attention, "is_flash_attn_backend", False):
            out = flash_attention(attention, schedule.varlen(query.device), q, k, v)
        else:
            out = schedule.attend(q, k, v, attention.scale)
        return out.reshape(query.shape)

    attention.forward = forward


def flash_attention(
    attention: Any, varlen: Varlen, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """vLLM's FlashAttention with different query and key lengths. Written from its signature; not run on a GPU.

    Args:
        attention: The stock vision attention module.
        varlen: Sequence boundaries and the rows to gather.
        query, key, value: (rows, heads, head size) on CUDA.

    Returns:
        (rows, heads, head size).
    """
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    version = {} if attention._fa_version is None else {"fa_version": attention._fa_version}
    out: torch.Tensor = flash_attn_varlen_func(
        query.contiguous(),
        key[varlen.key_rows],
        value[varlen.key_rows],
        cu_seqlens_q=varlen.query_starts,
        cu_seqlens_k=varlen.key_starts,
        max_seqlen_q=varlen.longest_query,
        max_seqlen_k=varlen.longest_key,
        softmax_scale=attention.scale,
        causal=False,
        **version,
    )
    return out
