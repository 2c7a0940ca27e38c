# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL and Qwen3.5, dense and of experts: text stands between the units of a clip."""

from dataclasses import replace

from evs_vllm import testing
from tests.families.facts import Engine, Facts, FamilyCase

REFERENCE = "tests.reference.hf:Reference"
FACTS = Facts(
    frame_size=(128, 160),
    grid=(4, 5),
    fewest_frames=2,
    embeds_with={"timestamps": [[0.5, 1.5]]},
)

FAMILIES = {
    "qwen3_vl": FamilyCase(
        tiny=testing.FAMILIES["qwen3_vl"],
        reference=REFERENCE,
        facts=replace(FACTS, engine=Engine.MOST, frames_past_256=80),
    ),
    "qwen3_vl_moe": FamilyCase(tiny=testing.FAMILIES["qwen3_vl_moe"], reference=REFERENCE, facts=FACTS),
    "qwen3_5": FamilyCase(tiny=testing.FAMILIES["qwen3_5"], reference=REFERENCE, facts=FACTS),
    "qwen3_5_moe": FamilyCase(tiny=testing.FAMILIES["qwen3_5_moe"], reference=REFERENCE, facts=FACTS),
}
