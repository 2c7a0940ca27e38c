# SPDX-License-Identifier: Apache-2.0
"""K/V reuse (`evs_vllm.core.reuse`) in the vision towers of transformers' Qwen2-VL and Qwen2.5-VL. No backward pass."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.reuse import ReuseSchedule, clip_rows


@torch.no_grad()
def encode(
    visual: Any, pixels: torch.Tensor, plan: RetentionPlan, schedule: type[ReuseSchedule] = ReuseSchedule
) -> torch.Tensor:
    """Runs the tower on the computed tokens of one clip.

    Args:
        visual: ``model.model.visual``.
        pixels: (N * patches per token, values), all patches of the clip, normalised.
        plan: The clip's plan, with encoder "reuse".
        schedule: Which patches attend to which. Subclasses are for comparisons.

    Returns:
        (C, hidden), one row for each of ``plan.computed``.
    """
    merge = visual.spatial_merge_size
    windowed = hasattr(visual, "fullatt_block_indexes")
    rows, order = clip_rows(plan, visual.window_size // merge // visual.patch_size if windowed else None)
    tokens = plan.computed[order]
    patches = (tokens[:, None] * merge**2 + np.arange(merge**2)).reshape(-1)
    row, column = np.divmod(tokens % plan.tokens_per_unit, plan.grid[2])
    i, j = np.divmod(np.arange(merge**2), merge)
    coordinates = np.stack([row[:, None] * merge + i, column[:, None] * merge + j], axis=-1).reshape(-1, 2)

    device = pixels.device
    hidden = visual.patch_embed(pixels[torch.from_numpy(patches).to(device)].to(visual.dtype))
    cos, sin = (x[:, None] for x in visual.rotary_pos_emb(hidden, torch.from_numpy(coordinates).to(device)))
    whole = schedule([replace(rows, windows=rows.windows[[0, -1]])], merge**2)
    windows = schedule([rows], merge**2)
    for number, block in enumerate(visual.blocks):
        attention = block.attn
        own = whole if not windowed or number in visual.fullatt_block_indexes else windows
        qkv = attention.qkv(block.norm1(hidden)).reshape(len(hidden), 3, attention.num_heads, -1)
        query, key = (rotate(x, cos, sin) for x in (qkv[:, 0], qkv[:, 1]))
        attended = own.attend(query, key, qkv[:, 2], attention.scaling)
        hidden = hidden + attention.proj(attended.reshape(len(hidden), -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    merged = visual.merger(hidden)
    out = torch.empty_like(merged)
    out[torch.from_numpy(order).to(device)] = merged
    return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns queries or keys, (..., head size), by their rotary phases, in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos.float() + turned * sin.float()).to(x.dtype)
