# SPDX-License-Identifier: Apache-2.0
"""What EVS keeps on a transformers model's instance between calls."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch

from evs_vllm.config import EVSConfig
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.scorers import Selection
from evs_vllm.errors import UnsupportedError
from evs_vllm.families.base import FamilyAdapter
from evs_vllm.hf.prompt import Batch

STATE = "_evs"
"""Name of the attribute."""

Encode: TypeAlias = Callable[[Any, torch.Tensor, RetentionPlan], torch.Tensor]


@dataclass
class State:
    """What EVS keeps on a model's instance.

    Attributes:
        config: The settings of the model.
        adapter: The family's adapter, bound to the model.
        selection: What chooses the tokens in place of the selection that the settings name, or None.
        encode: Runs the tower on the computed tokens of a clip (`evs_vllm.hf.tower.encode`).
        served_positions: Whether prompts from which nothing is dropped get the position IDs of vLLM, too.
        video_processor: What was told to hand on what clips are judged by, or None.
        plans: Those of the last call with clips.
        batch: How that call shortened its batch.
    """

    config: EVSConfig
    adapter: FamilyAdapter
    selection: Selection | None
    encode: Encode
    served_positions: bool
    video_processor: Any = None
    plans: list[RetentionPlan] = field(default_factory=list)
    batch: Batch | None = None

    def forget(self) -> None:
        """Of a call with clips of which nothing was asked, nothing is to be told."""
        self.plans, self.batch = [], None


def state_of(model: Any) -> State:
    """What `evs_vllm.hf.enable` left on the model.

    Raises:
        UnsupportedError: It was not called.
    """
    state: State | None = getattr(base_of(model), STATE, None)
    if state is None:
        raise UnsupportedError("EVS is not enabled on this model; call enable() first.")
    return state


def base_of(model: Any) -> Any:
    """The transformers model within a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def resolved(config: EVSConfig) -> EVSConfig:
    """The encoder is "full" unless asked for: "reuse" has no backward pass."""
    return replace(config, encoder="full") if config.encoder == "auto" else config
