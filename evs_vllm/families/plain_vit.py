# SPDX-License-Identifier: Apache-2.0
"""K/V reuse in a plain ViT: a class token and the patches of one frame, learned positions, the same layers throughout.

Its forward takes whole frames only, so the stock layers run here one after the other, on one long row of computed
patches, and the attention in them finds the schedule on itself. The class token sees the patches that changed, so it is
computed in every frame of which anything is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.reuse import ClipRows
from evs_vllm.core.schedule import ReuseSchedule, form_on, place, scheduled
from evs_vllm.families.base import ReuseTower


def with_class(token: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(1, 1, width) class token and (1, n, width) positions, of which the first is its own, as (n, width)."""
    return torch.cat([token[0] + positions[0, :1], positions[0, 1:]])


def packed_frames(plan: RetentionPlan) -> int:
    """How many frames hold the blocks of the computed tokens; all frames of the clip if all are computed."""
    return -(-len(plan.computed) // plan.tokens_per_unit)


def packed_blocks(frames: torch.Tensor, plan: RetentionPlan) -> torch.Tensor:
    """The blocks of pixels of the computed tokens, packed into as few frames as hold them.

    Args:
        frames: (T, 3, S, S), any dtype, whose blocks are the tokens of `plan`.
        plan: The clip's plan.

    Returns:
        (`packed_frames`, 3, S, S): the blocks in the order of ``plan.computed``, row by row, then zeros.
    """
    side = plan.grid[1]
    count, channels, size = len(frames), frames.shape[1], frames.shape[-1] // side
    blocks = frames.view(count, channels, side, size, side, size).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    packed = packed_frames(plan)
    out = blocks.new_zeros(packed * plan.tokens_per_unit, channels, size, size)
    out[: len(plan.computed)] = blocks[torch.from_numpy(plan.computed).to(blocks.device)]
    out = out.view(packed, side, side, channels, size, size).permute(0, 3, 1, 4, 2, 5)
    return out.reshape(packed, *frames.shape[1:])


def frame_rows(plan: RetentionPlan, patches: int) -> tuple[ClipRows, np.ndarray]:
    """The rows of a clip: in each frame with computed tokens first the class token, then their patches.

    Args:
        plan: The clip's plan.
        patches: Patches per token.

    Returns:
        The rows, one slot each (0 is the class token's), and (R,) which of them are patches.
    """
    unit, token = np.divmod(plan.computed, plan.tokens_per_unit)
    units, counts = np.unique(unit, return_counts=True)
    unit_of_row = np.concatenate([units, np.repeat(unit, patches)])
    slot_of_row = np.concatenate(
        [np.zeros_like(units), (1 + token[:, None] * patches + np.arange(patches)).reshape(-1)]
    )
    order = np.argsort(unit_of_row, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(1 + counts * patches)])
    whole = np.array([0, 1 + plan.tokens_per_unit * patches])
    return ClipRows(slot_of_row[order], bounds, whole), order >= len(units)


@dataclass(kw_only=True)
class PlainTower(ReuseTower):
    """A plain ViT from the parts of vLLM's module, each named as in most ViT code.

    Attributes:
        pixels: Name of the pixel field, which holds what `packed_blocks` made: one tensor, or one of each clip.
        patch_embed: The convolution that embeds patches, (n, 3, S, S) pixels to (n, width, patches, patches).
        pos_embed: The (1 + patches per frame, width) rows to add: first the class token with its position, then the
            positions of the patches. Called for each batch, when the weights are loaded.
        pre_norm: What comes before the first layer, (rows, width) to the same, each row by itself. Default: nothing.
        layers: The tower's layers, (1, rows, width) to the same.
        attention_of: From a layer to its attention module.
        project: (tokens, r, r, width), the r x r patches of each token, to (tokens, hidden).
    """

    pixels: str
    patch_embed: Any
    pos_embed: Callable[[], torch.Tensor]
    pre_norm: Callable[[torch.Tensor], torch.Tensor] = field(default_factory=torch.nn.Identity)
    layers: Sequence[torch.nn.Module]
    attention_of: Callable[[Any], torch.nn.Module]
    project: Callable[[torch.Tensor], torch.Tensor]

    def attentions(self) -> Iterable[torch.nn.Module]:
        return [self.attention_of(layer) for layer in self.layers]

    def encode(self, batch: Mapping[str, Any], plans: Sequence[RetentionPlan]) -> torch.Tensor:
        frames = batch[self.pixels]
        if isinstance(frames, list) or frames.ndim == 5:  # clip by clip
            frames = torch.cat(list(frames))
        patches = self.patch_embed(frames.to(self.patch_embed.weight.dtype))
        count, width, across, _ = patches.shape
        side = plans[0].grid[1]
        ratio = across // side
        patches = patches.view(count, width, side, ratio, side, ratio).permute(0, 2, 4, 3, 5, 1)
        patches = patches.reshape(count, side * side, ratio**2, width)
        table = self.pos_embed()

        rows, slots, blocks, patch_rows = [], [], [], []
        row, frame = 0, 0
        for plan in plans:
            clip, patch = frame_rows(plan, ratio**2)
            rows.append(clip)
            slots.append(clip.slots)
            # The packed tokens lie one after the other, but the last frame of a clip may not be full.
            blocks.append(frame * side**2 + np.arange(len(plan.computed)))
            patch_rows.append(row + np.flatnonzero(patch))
            row += len(patch)
            frame += packed_frames(plan)
        # A row's slot is its place in a unit, token by token; the table of positions goes row by row of the picture.
        by_token = np.arange(across**2).reshape(side, ratio, side, ratio).transpose(0, 2, 1, 3).reshape(-1)
        position_of_slot = np.concatenate([[0], 1 + by_token])
        schedule = ReuseSchedule(rows, 1)
        positions, tokens, places = place(
            [schedule],
            form_on(table.device, self.has_varlen),
            table.device,
            [position_of_slot[np.concatenate(slots)], np.concatenate(blocks), np.concatenate(patch_rows)],
        )
        hidden = table[positions]
        computed = patches.flatten(0, 1)[tokens].flatten(0, 1)
        hidden[places] = (hidden[places] + computed).to(hidden.dtype)
        out = self._run(self.pre_norm(hidden)[None], schedule)[0]
        return self.project(out[places].view(-1, ratio, ratio, width))

    def _run(self, hidden: torch.Tensor, schedule: ReuseSchedule) -> torch.Tensor:
        with scheduled(self.attentions(), [schedule] * len(self.layers)):
            for layer in self.layers:
                hidden = layer(hidden)
        return hidden
