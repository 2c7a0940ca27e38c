# SPDX-License-Identifier: Apache-2.0
"""What is known of one clip before an engine sees it: frames, scores, plan, times. Imports neither torch nor vLLM.

`evs_vllm.engine.inspect.inspect_clip` makes it, the command line prints and draws it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evs_vllm.config import EVSConfig

if TYPE_CHECKING:
    import numpy as np

    from evs_vllm.core.plan import RetentionPlan

STAGES = ("decode", "HF processor", "score", "select", "layout")
"""The stages of `Inspection.seconds`, in their order."""


@dataclass(frozen=True)
class Inspection:
    """One clip, processed as the server would.

    Attributes:
        video: The file.
        model: The model folder or name.
        architecture: Its architecture.
        family: Name of its row in `evs_vllm.families.FAMILIES`.
        config: The settings.
        plan: What stays.
        scores: (T, P) int32 pixel change of each token since the unit before; unit 0 scores 0.
        values_per_token: Pixel values behind one token; score / values is the mean change, 0..255.
        frames: (T * frames per unit, height, width, 3) uint8, as the model sees them.
        unit_seconds: Start of each unit in the video, or None if the loader does not say.
        prompt_tokens: Tokens of the clip's part of the prompt, (before, after).
        seconds: Time of each of `STAGES`.
    """

    video: Path
    model: str
    architecture: str
    family: str
    config: EVSConfig
    plan: "RetentionPlan"
    scores: "np.ndarray"
    values_per_token: int
    frames: "np.ndarray"
    unit_seconds: tuple[float, ...] | None
    prompt_tokens: tuple[int, int]
    seconds: dict[str, float]

    @property
    def frames_per_unit(self) -> int:
        return len(self.frames) // self.plan.num_units

    @property
    def dropped_share(self) -> float:
        """Fraction of the clip's tokens that is dropped."""
        return 1 - self.plan.num_kept / self.plan.num_tokens

    def to_mapping(self) -> dict[str, Any]:
        """Everything but the pixels, ready for JSON."""
        plan, (count, height, width, _) = self.plan, self.frames.shape
        return {
            "video": str(self.video),
            "model": self.model,
            "architecture": self.architecture,
            "family": self.family,
            "config": self.config.to_mapping(),
            "frames": {"count": count, "height": height, "width": width, "per_unit": self.frames_per_unit},
            "grid": list(plan.grid),
            "tokens": plan.num_tokens,
            "tokens_kept": plan.num_kept,
            "dropped_share": self.dropped_share,
            "counts": plan.counts.tolist(),
            "kept": plan.kept.tolist(),
            "unit_seconds": None if self.unit_seconds is None else list(self.unit_seconds),
            "prompt_tokens": {"before": self.prompt_tokens[0], "after": self.prompt_tokens[1]},
            "seconds": self.seconds,
        }
