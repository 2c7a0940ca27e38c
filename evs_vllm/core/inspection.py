# SPDX-License-Identifier: Apache-2.0
"""What is known of one clip before an engine sees it: frames, evidence, plan, times. Imports neither torch nor vLLM.

`evs_vllm.engine.inspect.inspect_clip` makes it, the command line prints and draws it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evs_vllm.config import EVSConfig
from evs_vllm.core.budget import token_budget

if TYPE_CHECKING:
    import numpy as np

    from evs_vllm.core.plan import RetentionPlan
    from evs_vllm.core.scorers import Selection

STAGES = ("decode", "HF processor", "score", "select", "layout", "pixels")
"""The stages of `Inspection.seconds`, in their order.

To score is to find the evidence: scores or descriptors. Pixels are those of the tokens that the vision tower computes;
the stage takes no time where Hugging Face's processor makes them all.
"""


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
        selection: What chose it, as `config` names it.
        evidence: What it was chosen from (`Selection.evidence`): (T, P) int32 scores or (T, P, F) uint8 descriptors.
        unit: The score or distance that the option ``threshold`` counts as 1 (`Selection.unit`).
        frames: (T * frames per unit, height, width, 3) uint8, as the model sees them.
        unit_seconds: Start of each unit in the video, or None if the loader does not say.
        prompt_tokens: Tokens of the clip's part of the prompt, (before, after).
        seconds: Time of each of `STAGES`.
        weights: How much the changes of each unit count, in sixteenths (`evs_vllm.core.focus`); None is all the same.
    """

    video: Path
    model: str
    architecture: str
    family: str
    config: EVSConfig
    plan: "RetentionPlan"
    selection: "Selection"
    evidence: "np.ndarray"
    unit: float
    frames: "np.ndarray"
    unit_seconds: tuple[float, ...] | None
    prompt_tokens: tuple[int, int]
    seconds: dict[str, float]
    weights: list[int] | None = None

    @property
    def frames_per_unit(self) -> int:
        return len(self.frames) // self.plan.num_units

    @property
    def dropped_share(self) -> float:
        """Fraction of the clip's tokens that is dropped."""
        return 1 - self.plan.num_kept / self.plan.num_tokens

    @property
    def stock_kept(self) -> int | None:
        """Tokens that vLLM's ``--video-pruning-rate`` would keep at the same rate, None where no rate is set."""
        if not self.config.rate:
            return None
        rate = EVSConfig(rate=self.config.rate)
        return token_budget(self.plan.num_units, self.plan.tokens_per_unit, rate, stock_count=True)

    @property
    def is_short(self) -> bool:
        """Whether more is kept because the clip is short than its rate says (see `token_budget`)."""

        def kept(stock_count: bool) -> int:
            return token_budget(self.plan.num_units, self.plan.tokens_per_unit, self.config, stock_count=stock_count)

        return self.config.budget == "clip" and kept(self.selection.stock_count) > kept(True)

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
            "video_pruning_rate_keeps": self.stock_kept,
            "short_clip": self.is_short,
            "dropped_share": self.dropped_share,
            "counts": plan.counts.tolist(),
            "kept": plan.kept.tolist(),
            "unit_seconds": None if self.unit_seconds is None else list(self.unit_seconds),
            "prompt_tokens": {"before": self.prompt_tokens[0], "after": self.prompt_tokens[1]},
            "seconds": self.seconds,
        }
