# SPDX-License-Identifier: Apache-2.0
"""How a plan travels: as one field among the multimodal fields of its clip."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.multimodal.inputs import PlaceholderRange

from evs_vllm.core.plan import RetentionPlan

MODALITY = "video"

PLAN_FIELD = "evs_plan"
"""Name of the plan among a clip's multimodal fields."""


def plan_of(item: Mapping[str, Any] | None) -> RetentionPlan | None:
    """The plan among a clip's fields, if it has one."""
    elem = (item or {}).get(PLAN_FIELD)
    return None if elem is None else RetentionPlan.from_array(elem.data.numpy())


@dataclass(frozen=True)
class PrunedRange(PlaceholderRange):
    """Where a pruned clip stands in a prompt.

    The fields of a clip that the engine core has cached stay there, and its plan with them. This number is what a
    process that has no plans needs to know. It does not travel: to the engine core the range is one of vLLM's.

    Attributes:
        extra_positions: `RetentionPlan.extra_positions` of the clip.
    """

    extra_positions: int = 0
