# SPDX-License-Identifier: Apache-2.0
"""K/V reuse (`evs_vllm.core.reuse`) in the vision towers of transformers' Qwen2-VL and Qwen2.5-VL. No backward pass."""

from typing import Any

import numpy as np
import torch

from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.reuse import clip_rows
from evs_vllm.core.schedule import ReuseSchedule, form_on, place


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
    reverse = np.empty_like(order)
    reverse[order] = np.arange(len(order))
    whole, windows = schedule([rows.whole_units()], merge**2), schedule([rows], merge**2)
    used = [whole, windows] if windowed else [whole]
    taken, at, back = place(used, form_on(device), device, [patches, coordinates, reverse])
    hidden = visual.patch_embed(pixels[taken].to(visual.dtype))
    cos, sin = (x[:, None] for x in visual.rotary_pos_emb(hidden, at))
    for number, block in enumerate(visual.blocks):
        attention = block.attn
        own = whole if not windowed or number in visual.fullatt_block_indexes else windows
        qkv = attention.qkv(block.norm1(hidden)).reshape(len(hidden), 3, attention.num_heads, -1)
        query, key = (rotate(x, cos, sin) for x in (qkv[:, 0], qkv[:, 1]))
        attended = own.attend(query, key, qkv[:, 2], attention.scaling)
        hidden = hidden + attention.proj(attended.reshape(len(hidden), -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    merged: torch.Tensor = visual.merger(hidden)
    return merged[back]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns queries or keys, (..., head size), by their rotary phases, in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos.float() + turned * sin.float()).to(x.dtype)
