# SPDX-License-Identifier: Apache-2.0
"""An inspected clip without vLLM: a drawn video cut into tokens of 28 x 28 pixels by plain NumPy."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Clip, TokenPixels
from evs_vllm.core.focus import unit_weights
from evs_vllm.core.inspection import STAGES, Inspection
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.scorers import Selection, named_selection
from evs_vllm.core.selection import make_plan
from evs_vllm.testing import synthetic_clip

TOKEN = 28


def inspected(units: int = 6, size: tuple[int, int] = (84, 140), seconds: bool = True, **options: Any) -> Inspection:
    """A clip of `units` units of 2 frames, with what `options` (of `EVSConfig`) keep of it."""
    frames = synthetic_clip(2 * units, size, moving=0.2, noise=3)
    rows, columns = size[0] // TOKEN, size[1] // TOKEN
    cut = frames.reshape(units, 2, rows, TOKEN, columns, TOKEN, 3).transpose(0, 2, 4, 6, 1, 3, 5)
    tokens = torch.from_numpy(np.ascontiguousarray(cut.reshape(units, rows * columns, -1)))
    config = EVSConfig(**(options or {"rate": 0.6}))
    clip = Clip(tokens, (units, rows, columns), TokenPixels(1, 3, 2, TOKEN))
    return inspection_of(clip, frames, config, named_selection(config.selection), seconds)


def inspection_of(
    clip: Clip, frames: np.ndarray, config: EVSConfig, selection: Selection, seconds: bool = True
) -> Inspection:
    """What `evs_vllm.engine.inspect` would say of a clip and its frames."""
    weights = unit_weights(clip, config)
    whole = RetentionPlan(clip.grid, np.arange(np.prod(clip.grid)))
    plan = make_plan(clip, config, selection) if config.active else whole
    return Inspection(
        video=Path("drawn & <cut>.mp4"),
        model="tiny",
        architecture="Qwen2_5_VLForConditionalGeneration",
        family="Qwen2.5-VL",
        config=config,
        plan=plan,
        selection=selection,
        evidence=selection.evidence(clip).numpy(),
        unit=selection.unit(clip),
        frames=frames,
        unit_seconds=tuple(0.5 * unit for unit in range(clip.num_units)) if seconds else None,
        prompt_tokens=(plan.num_tokens, plan.num_kept),
        seconds=dict.fromkeys(STAGES, 0.01),
        weights=None if weights is None else weights.tolist(),
    )
