# SPDX-License-Identifier: Apache-2.0
"""How a plan travels: as one field among the multimodal fields of its clip."""

from collections.abc import Mapping
from typing import Any

from evs_vllm.core.plan import RetentionPlan

MODALITY = "video"

PLAN_FIELD = "evs_plan"
"""Name of the plan among a clip's multimodal fields."""


def plan_of(item: Mapping[str, Any] | None) -> RetentionPlan | None:
    """The plan among a clip's fields, if it has one."""
    elem = (item or {}).get(PLAN_FIELD)
    return None if elem is None else RetentionPlan.from_array(elem.data.numpy())
