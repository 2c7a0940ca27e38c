# SPDX-License-Identifier: Apache-2.0
"""An inspected clip without vLLM: a drawn video cut into tokens of 28 x 28 pixels by plain NumPy."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Clip
from evs_vllm.core.inspection import STAGES, Inspection
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.selection import make_plan
from evs_vllm.testing import synthetic_clip

TOKEN = 28


def inspected(units: int = 6, size: tuple[int, int] = (84, 140), seconds: bool = True, **options: Any) -> Inspection:
    """A clip of `units` units of 2 frames, with what `options` (of `EVSConfig`) keep of it."""
    frames = synthetic_clip(2 * units, size, moving=0.2, noise=3)
    rows, columns = size[0] // TOKEN, size[1] // TOKEN
    cut = frames.reshape(units, 2, rows, TOKEN, columns, TOKEN, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    tokens = torch.from_numpy(np.ascontiguousarray(cut.reshape(units, rows * columns, -1)))
    config, grid = EVSConfig(**(options or {"rate": 0.6})), (units, rows, columns)
    whole = RetentionPlan(grid, np.arange(units * rows * columns))
    change = np.abs(np.diff(tokens.numpy().astype(np.int32), axis=0)).sum(axis=2)
    plan = make_plan(Clip(tokens, grid), config) if config.active else whole
    return Inspection(
        video=Path("drawn & <cut>.mp4"),
        model="tiny",
        architecture="Qwen2_5_VLForConditionalGeneration",
        family="Qwen2.5-VL",
        config=config,
        plan=plan,
        scores=np.concatenate([np.zeros_like(change[:1]), change]),
        values_per_token=tokens.shape[-1],
        frames=frames,
        unit_seconds=tuple(0.5 * unit for unit in range(units)) if seconds else None,
        prompt_tokens=(plan.num_tokens, plan.num_kept),
        seconds=dict.fromkeys(STAGES, 0.01),
    )
