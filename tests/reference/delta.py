# SPDX-License-Identifier: Apache-2.0
"""Linear attention of Qwen3.5 for vLLM's CPU engine in fp32, in plain loops.

vLLM's own CPU kernel takes bf16 only, whose noise (0.1 and more in a logprob of the tiny models) would hide mistakes.
Positions and pruning do not reach these layers, so the engine runs with this in place of that one kernel; states, their
slots and everything else stay vLLM's.
"""

from __future__ import annotations

from typing import Any

import torch


def use_fp32_delta_rule() -> None:
    """Puts `gated_delta_rule` in place of vLLM's CPU kernel. Before the first engine of the process starts."""
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
    from vllm.utils.torch_utils import LayerNameType

    # vLLM derives the schema of its custom operator from the types.
    gated_delta_rule.__annotations__ = {
        name: {"layer_name": LayerNameType, "return": None}.get(name, torch.Tensor)
        for name in gated_delta_rule.__annotations__
    }
    gdn_attention.cpu_gdn_attention_core = gated_delta_rule


def gated_delta_rule(
    mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, core_attn_out: torch.Tensor, layer_name: Any
) -> None:
    """For each sequence of the step: convolution, then S <- exp(g) S + k (beta (v - S k)), output S q.

    Args:
        mixed_qkv: (rows, channels) projected queries, keys and values of all sequences.
        b, a: (rows, value heads) of the gates.
        core_attn_out: (rows, value heads, value size), written.
        layer_name: Of the layer, which holds the weights and the states.
    """
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
    from vllm.utils.torch_utils import _resolve_layer_name

    context = get_forward_context()
    if context.attn_metadata is None:  # profiling
        return
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    steps = context.attn_metadata[layer.prefix]
    assert steps.spec_sequence_masks is None
    histories, memories = layer.kv_cache[0], layer.kv_cache[1]
    if is_conv_state_dim_first():
        histories = histories.transpose(1, 2)
    slots, heads, value_size, key_size = memories.shape
    memories = memories.view(slots, heads, key_size, value_size)
    filters = layer.conv1d.weight.reshape(mixed_qkv.shape[1], -1).float()  # (channels, width)
    width = filters.shape[1]

    sequences = steps.num_decodes + steps.num_prefills
    bounds = steps.non_spec_query_start_loc.tolist()
    for i in range(sequences):
        rows, slot = slice(bounds[i], bounds[i + 1]), int(steps.non_spec_state_indices_tensor[i])
        if i >= steps.num_decodes and not steps.has_initial_state[i]:
            histories[slot], memories[slot] = 0, 0
        padded = torch.cat([histories[slot].float(), mixed_qkv[rows].float()])
        histories[slot] = padded[-(width - 1) :]
        count = rows.stop - rows.start
        convolved = sum(filters[:, j] * padded[j : j + count] for j in range(width))
        query, key, value = torch.nn.functional.silu(convolved).split(
            [layer.key_dim, layer.key_dim, layer.value_dim], dim=1
        )
        query, key = (_unit(x.reshape(count, -1, key_size)) for x in (query, key))
        each = heads // query.shape[1]
        query, key = (x.repeat_interleave(each, dim=1) for x in (query * key_size**-0.5, key))
        value = value.reshape(count, heads, value_size)
        decay = torch.exp(-layer.A_log.float().exp() * torch.nn.functional.softplus(a[rows].float() + layer.dt_bias))
        strength = b[rows].float().sigmoid()
        memory = memories[slot].float()
        for t in range(count):
            memory = memory * decay[t][:, None, None]
            known = torch.einsum("hkv,hk->hv", memory, key[t])
            change = (value[t] - known) * strength[t][:, None]
            memory = memory + key[t][:, :, None] * change[:, None, :]
            core_attn_out[bounds[i] + t] = torch.einsum("hkv,hk->hv", memory, query[t]).to(core_attn_out.dtype)
        memories[slot] = memory.to(memories.dtype)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
