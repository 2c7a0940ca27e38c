# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL and Qwen2-VL."""

from evs_vllm import testing
from tests.families.facts import Engine, Facts, FamilyCase

FAMILIES = {
    "qwen2_5_vl": FamilyCase(
        tiny=testing.FAMILIES["qwen2_5_vl"],
        reference="tests.reference.hf:Reference",
        facts=Facts(
            frame_size=(112, 140),
            grid=(4, 5),
            engine=Engine.ALL,
            ids_per_second=4,
            frames_past_256=160,
            embeds_with={"second_per_grid_ts": [1.0]},
        ),
    ),
    "qwen2_vl": FamilyCase(
        tiny=testing.FAMILIES["qwen2_vl"],
        reference="tests.reference.hf:Reference",
        facts=Facts(
            frame_size=(112, 140),
            grid=(4, 5),
            engine=Engine.ALL,
            frames_past_256=560,
            embeds_with={},
        ),
    ),
}
