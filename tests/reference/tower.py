# SPDX-License-Identifier: Apache-2.0
"""The independent reference of K/V reuse: Hugging Face's vision towers, dense, in plain loops.

Nothing here comes from `evs_vllm` or `evs_kernels`. Every patch of every unit has a row in every layer. The rows that
reuse does not compute hold NaN, and their keys and values are filled in from the latest unit that computed that place;
so a result that depends on anything but computed rows is NaN, and equals nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from tests.reference import appearance, causal, selection
from tests.reference.hf import Clip, Reference, Settings


@dataclass(frozen=True)
class TowerSettings(Settings):
    """`Settings` with the vision tower's: "full", or "reuse" that computes what differs by `refresh` again."""

    encoder: str = "reuse"
    refresh: float = 25


def reuses(settings: Settings) -> bool:
    """Whether a tower with these settings reuses anything of a clip of which something is dropped."""
    return not settings.off and isinstance(settings, TowerSettings) and settings.encoder == "reuse"


def computed_tokens(looks: np.ndarray, kept: np.ndarray, settings: TowerSettings) -> np.ndarray:
    """Which tokens of a clip a tower that reuses computes.

    Args:
        looks: (T, P, F), the learned descriptors of its tokens (`tests.reference.appearance.learned`).
        kept: Sorted flat indices of the kept tokens.
        settings: The settings.

    Returns:
        (T*P,) bool: the kept tokens, all of unit 0, and those that differ by `refresh` hundredths or more from what was
        computed last at their place; where that is more than half of the other tokens, those that differ most. With
        the causal budget, more than half of those so far.
    """
    units, per_unit, _ = looks.shape
    total = units * per_unit
    kept = np.union1d(np.arange(per_unit), kept)  # of a clip that goes on from others, unit 0 is not kept whole
    wanted = kept
    if settings.refresh:
        level = max(1, math.ceil(Fraction(str(settings.refresh)) * selection.UNIT["learned"]))
        if settings.budget == "causal":
            return causal.refreshed_in_order(looks, set(kept.tolist()), level)
        most = len(kept) + (total - len(kept)) // 2
        wanted = selection.anchored(looks, level, 0, most, frozenset(kept.tolist()))
    return np.isin(np.arange(total), wanted)


@torch.inference_mode()
def encode(
    visual: Any, pixels: torch.Tensor, grid: tuple[int, int, int], computed: np.ndarray
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Runs a Hugging Face vision tower (of Qwen2-VL to Qwen3.5, or GLM) by the rule of K/V reuse.

    Args:
        visual: The tower.
        pixels: (T*P*4, values) normalised patch rows, 4 per token.
        grid: (T, rows, columns) in tokens.
        computed: (N,) bool, which tokens are computed; unit 0 is.

    Returns:
        (N, hidden) embeddings with deepstack's beside them, and the hidden states (N*4, width) before the first and
        after every block. Rows of tokens that are not computed are NaN.
    """
    units, rows, columns = grid
    per_unit = rows * columns * 4
    # Places in the order of the rows: token by token, in each token its 2 x 2 patches.
    patch_row, patch_column, windows = [], [], []
    side = visual.window_size // 28 if hasattr(visual, "fullatt_block_indexes") else None
    for row in range(rows):
        for column in range(columns):
            for i in range(2):
                for j in range(2):
                    patch_row.append(2 * row + i)
                    patch_column.append(2 * column + j)
                    windows.append((row // side, column // side) if side else (0, 0))
    same_window = torch.tensor([[a == b for b in windows] for a in windows])
    anything = torch.ones_like(same_window)
    places = torch.tensor([patch_row, patch_column]).T
    cos, sin = visual.rotary_pos_emb(pixels, places)  # of one unit: phases do not depend on the unit

    alive = torch.from_numpy(np.repeat(computed, 4)).reshape(units, per_unit)
    latest = torch.zeros(units, per_unit, dtype=torch.long)
    for t in range(units):
        for p in range(per_unit):
            latest[t, p] = t if alive[t, p] else latest[t - 1, p]
    assert alive[0].all(), "unit 0 must be whole"

    def poisoned(hidden: torch.Tensor) -> torch.Tensor:
        return torch.where(alive.reshape(-1, 1), hidden, torch.nan)

    hidden = visual.patch_embed(pixels)
    if hasattr(visual, "pos_embed"):
        learned = _interpolated(visual.pos_embed.weight, 2 * rows, 2 * columns)
        hidden = hidden + learned[patch_row, patch_column].repeat(units, 1)
    if hasattr(visual, "embeddings"):  # GLM; its module adds the learned places, here to each unit as to a picture
        shape = torch.tensor([[1, 2 * rows, 2 * columns]])
        hidden = visual.post_conv_layernorm(hidden).split(per_unit)
        hidden = torch.cat([visual.embeddings(unit, [per_unit], shape, *places.T) for unit in hidden])
    hidden = poisoned(hidden)
    states = [hidden]
    place = torch.arange(per_unit)
    for number, block in enumerate(visual.blocks):
        attention = block.attn
        heads = attention.num_heads
        mask = anything if side is None or number in visual.fullatt_block_indexes else same_window
        normed = block.norm1(hidden)
        parts = (
            attention.qkv(normed).chunk(3, dim=-1)
            if hasattr(attention, "qkv")
            else [projection(normed) for projection in (attention.q, attention.k, attention.v)]
        )
        query, key, value = (part.reshape(units, per_unit, heads, -1) for part in parts)
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
        attended = torch.empty_like(query)
        for t in range(units):
            k, v = key[latest[t], place], value[latest[t], place]  # (places, heads, head size)
            scores = torch.einsum("qhd,khd->hqk", query[t], k) * attention.scaling
            weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
            attended[t] = torch.einsum("hqk,khd->qhd", weights, v)
        hidden = hidden + attention.proj(attended.reshape(units * per_unit, -1))
        hidden = poisoned(hidden + block.mlp(block.norm2(hidden)))
        states.append(hidden)
    if hasattr(visual, "downsample"):  # GLM
        merged = visual.post_layernorm(hidden).reshape(units * rows * columns, 2, 2, -1).permute(0, 3, 1, 2)
        return visual.merger(visual.downsample(merged).flatten(1)), states
    out = [visual.merger(hidden)]
    if hasattr(visual, "deepstack_merger_list"):
        after = [states[number + 1] for number in visual.deepstack_visual_indexes]
        out += [merger(x) for merger, x in zip(visual.deepstack_merger_list, after, strict=True)]
    return torch.cat(out, dim=1), states


def _interpolated(grid: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(rows, columns, width): the learned square grid (side**2, width), bilinear, the corners on the corners."""
    side = round(len(grid) ** 0.5)
    grid = grid.reshape(side, side, -1)
    out = torch.empty(rows, columns, grid.shape[-1])
    for row in range(rows):
        for column in range(columns):
            y, x = row * (side - 1) / (rows - 1), column * (side - 1) / (columns - 1)
            top, left = min(int(y), side - 2), min(int(x), side - 2)
            down, right = y - top, x - left
            upper = (1 - right) * grid[top, left] + right * grid[top, left + 1]
            lower = (1 - right) * grid[top + 1, left] + right * grid[top + 1, left + 1]
            out[row, column] = (1 - down) * upper + down * lower
    return out


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


class TowerReference(Reference):
    """`Reference` for clips whose settings are `TowerSettings`; others get the full tower."""

    def computed(self, clip: Clip, grid: tuple[int, int, int], pixels: np.ndarray) -> np.ndarray:
        """(N,) bool, the tokens of a clip that the tower computes."""
        kept = self.choose(clip, grid, pixels)
        if not reuses(clip.settings) or len(kept) == np.prod(grid):
            return np.ones(np.prod(grid), dtype=bool)
        return computed_tokens(appearance.learned(self.pictures(clip, grid)), kept, clip.settings)

    def _see_clip(self, clip: Clip) -> tuple[torch.Tensor, tuple[int, int, int], np.ndarray]:
        vectors, grid, pixels = super()._see_clip(clip)
        computed = self.computed(clip, grid, pixels)
        if not computed.all():
            vectors, _ = encode(self.visual, self._process(clip)["pixel_values_videos"], grid, computed)
        return vectors, grid, pixels
