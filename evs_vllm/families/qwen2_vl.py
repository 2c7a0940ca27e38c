# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL and Qwen2.5-VL, and what shares their pixel rows.

The processor gives (T*h*w, C*2*14*14) patch rows ordered (t, h/2, w/2, 2, 2): the 4 patches of one merged token are
consecutive rows, each row holds (channel, frame of the unit, row, column). The clip is one run of the same placeholder.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evs_vllm.core.clip import Clip, TokenPixels
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.reuse import ClipRows, clip_rows
from evs_vllm.core.schedule import ReuseSchedule, form_on, place, scheduled
from evs_vllm.families.base import FamilyAdapter, ReuseTower, to_uint8
from evs_vllm.families.rotary import MROPE_CACHE_FACTOR

PIXELS = "pixel_values_videos"
GRID = "video_grid_thw"


class Qwen2VL(FamilyAdapter):
    """Adapter of the Qwen2-VL row order."""

    growing_fields = (PIXELS, GRID, "timestamps")

    @property
    def judges_source(self) -> bool:
        return True

    def clip(self, item: Mapping[str, Any]) -> Clip | None:
        if PIXELS not in item:
            return None
        vision = self.config.vision_config
        merge = vision.spatial_merge_size
        units, height, width = (int(x) for x in item[GRID])
        rows = to_uint8(item[PIXELS], vision.in_channels, self.stats)
        grid = (units, height // merge, width // merge)
        tokens = rows.reshape(units, grid[1] * grid[2], -1)
        patch, channels = vision.patch_size, vision.in_channels
        frames = tokens.shape[-1] // (merge**2 * channels * patch**2)
        return Clip(tokens, grid, TokenPixels(merge, channels, frames, patch))

    def frames(self, item: Mapping[str, Any]) -> np.ndarray:
        vision = self.config.vision_config
        merge, patch, channels = vision.spatial_merge_size, vision.patch_size, vision.in_channels
        units, height, width = (int(x) for x in item[GRID])
        rows = to_uint8(item[PIXELS], channels, self.stats)
        patches = rows.reshape(units, height // merge, width // merge, merge, merge, channels, -1, patch, patch)
        # (unit, frame of the unit, block row, row, pixel row, block column, column, pixel column, channel)
        frames = patches.permute(0, 6, 1, 3, 7, 2, 4, 8, 5)
        return frames.reshape(-1, height * patch, width * patch, channels).cpu().numpy()

    def computed_pixels(self, item: Mapping[str, Any], plan: RetentionPlan) -> dict[str, Any]:
        rows = item[PIXELS]
        tokens = rows.view(plan.num_tokens, -1, rows.shape[-1])
        return {PIXELS: tokens[torch.from_numpy(plan.computed).to(rows.device)].flatten(0, 1)}

    def unit_pixels(self, item: Mapping[str, Any], plan: RetentionPlan) -> Sequence[torch.Tensor]:
        rows = item[PIXELS]
        computed = np.bincount(plan.computed // plan.tokens_per_unit, minlength=plan.num_units)
        return rows.split((computed * (len(rows) // len(plan.computed))).tolist())

    def flat_rows(self, batch: Mapping[str, Any], plans: Sequence[RetentionPlan]) -> dict[str, Sequence[int]]:
        patches = [int(grid.prod()) // plan.num_tokens for grid, plan in zip(batch[GRID], plans, strict=True)]
        return {PIXELS: [len(plan.computed) * per_token for plan, per_token in zip(plans, patches, strict=True)]}

    def reuse_tower(self, model: Any) -> ReuseTower:
        return Qwen2VLTower(model.visual)

    def position_span(self, item: Mapping[str, Any], grid: tuple[int, int, int]) -> int:
        # As get_mrope_input_positions of the models: a slow clip can take more IDs than it has tokens.
        return max(int((grid[0] - 1) * self.ids_per_unit(item)), grid[1] - 1, grid[2] - 1) + 1

    def ids_per_unit(self, item: Mapping[str, Any]) -> float:
        """Position IDs from one temporal unit to the next; time counts in seconds where the config says how many IDs
        one second takes."""
        per_second = getattr(self.config.vision_config, "tokens_per_second", None)
        seconds = item.get("second_per_grid_ts")
        return 1.0 if per_second is None else float(per_second * (1.0 if seconds is None else float(seconds)))

    def max_position(self, max_model_len: int) -> int:
        return MROPE_CACHE_FACTOR * super().max_position(max_model_len)


class Qwen2VLTower(ReuseTower):
    """The towers of Qwen2-VL (attention within a frame) and Qwen2.5-VL (within windows, in some blocks a frame).

    Both run their own ``forward`` on the computed rows: it takes precomputed rotary phases, row orders and sequence
    boundaries (``encoder_metadata``). Boundaries matter to the attention alone, which follows its schedule instead.
    """

    def __init__(self, visual: Any) -> None:
        self._visual = visual
        self._windowed = hasattr(visual, "fullatt_block_indexes")

    def attentions(self) -> Iterable[torch.nn.Module]:
        return [block.attn.attn for block in self._visual.blocks]

    def encode(self, batch: Mapping[str, Any], plans: Sequence[RetentionPlan]) -> torch.Tensor:
        visual = self._visual
        merge = visual.spatial_merge_size
        window = visual.window_size // merge // visual.patch_size if self._windowed else None
        clips: list[ClipRows] = []
        order: list[np.ndarray] = []
        slots: list[np.ndarray] = []
        start = 0
        for plan in plans:
            rows, row_order = clip_rows(plan, window)
            clips.append(rows)
            order.append(row_order + start)
            slots.append(plan.computed[row_order] % plan.tokens_per_unit)
            start += len(row_order)
        index = np.concatenate(order)
        reverse = np.empty_like(index)
        reverse[index] = np.arange(start)
        schedules = [ReuseSchedule([rows.whole_units() for rows in clips], merge**2)]
        if self._windowed:
            schedules.append(ReuseSchedule(clips, merge**2))
        form = form_on(visual.device, self.has_varlen)
        window_index, reverse_indices, *slots_there = place(schedules, form, visual.device, [index, reverse, *slots])
        grids = {(plan.grid[1] * merge, plan.grid[2] * merge) for plan in plans}
        units = {grid: self._per_slot(*grid) for grid in grids}
        per_slot = [
            {name: values[slot] for name, values in units[plan.grid[1] * merge, plan.grid[2] * merge].items()}
            for plan, slot in zip(plans, slots_there)
        ]
        whole, windows = schedules[0], schedules[-1]
        full = visual.fullatt_block_indexes if self._windowed else ()
        patches = start * merge**2
        # As if all rows were one sequence.
        boundaries = torch.arange(0, patches + 1, patches, dtype=torch.int32, device=visual.device)
        metadata = {
            **{name: torch.cat([values[name] for values in per_slot]).flatten(0, 1) for name in per_slot[0]},
            "cu_seqlens": boundaries,
            "cu_window_seqlens": boundaries,
            "window_index": window_index,
            "reverse_indices": reverse_indices,
            "max_seqlen": None,
            "max_seqlen_full": None,
            "max_seqlen_window": None,
        }
        of_layers = [whole if number in full else windows for number in range(len(visual.blocks))]
        with scheduled(self.attentions(), of_layers):
            return self._run(batch[PIXELS], metadata)

    def _run(self, pixels: torch.Tensor, metadata: dict[str, Any]) -> torch.Tensor:
        embeds: torch.Tensor = self._visual(pixels, None, encoder_metadata=metadata)
        return embeds

    def _per_slot(self, height: int, width: int) -> dict[str, torch.Tensor]:
        """What depends on the slot alone, in a unit of height x width patches: each (P, patches per token, size), on
        the tower's device."""
        if self._windowed:
            cos, sin = self._visual.rotary_pos_emb_thw(1, height, width)
        else:
            cos, sin = map(self._by_token, self._visual.rot_pos_emb([[1, height, width]]))
        return {"rotary_pos_emb_cos": cos, "rotary_pos_emb_sin": sin}

    def _by_token(self, values: torch.Tensor) -> torch.Tensor:
        """(patches, size) as (tokens, patches per token, size)."""
        return values.view(-1, self._visual.spatial_merge_size**2, values.shape[-1])
