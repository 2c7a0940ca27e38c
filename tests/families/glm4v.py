# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the GLM-V families: GLM-4.1V, 4.5V and 4.6V."""

from dataclasses import replace
from typing import Any

from evs_vllm.testing import TinyFamily
from evs_vllm.testing.tokenizer import CHAT_TEMPLATE
from tests.families.facts import Facts, FamilyCase

TOKENS = {
    "image_token_id": "<|image|>", "video_token_id": "<|video|>", "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>", "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}  # fmt: skip
TEMPLATE = CHAT_TEMPLATE.replace(
    "<|vision_start|><|image_pad|><|vision_end|>", "<|begin_of_image|><|image|><|end_of_image|>"
).replace("<|vision_start|><|video_pad|><|vision_end|>", "<|begin_of_video|><|video|><|end_of_video|>")


def vision(s: dict[str, Any]) -> dict[str, Any]:
    return {
        "depth": s["vision_layers"], "hidden_size": s["vision_hidden"], "intermediate_size": 2 * s["vision_hidden"],
        "num_heads": s["vision_hidden"] // 32, "out_hidden_size": s["hidden_size"], "image_size": 56,
    }  # fmt: skip


def text(s: dict[str, Any]) -> dict[str, Any]:
    # Half of each head is rotated.
    half = s["hidden_size"] // s["heads"] // 4
    section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    # transformers always has the bias, vLLM reads it from the config, where released checkpoints have it.
    return {"rope_parameters": {"partial_rotary_factor": 0.5, "mrope_section": section}, "attention_bias": True}


def moe_text(s: dict[str, Any]) -> dict[str, Any]:
    # The first layer is dense, one expert is shared. head_dim and use_qk_norm, which vLLM reads, transformers' config
    # class does not have, but the released checkpoints do.
    return text(s) | {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_qk_norm": False,
        "head_dim": s["hidden_size"] // s["heads"],
    }  # fmt: skip


FACTS = Facts(frame_size=(112, 140), grid=(4, 5), limits={"image": 4, "video": 1})

FAMILIES = {
    "glm4v": FamilyCase(
        tiny=TinyFamily(
            architecture="Glm4vForConditionalGeneration",
            config_class="Glm4vConfig",
            processor_class="Glm4vProcessor",
            vision=vision,
            text=text,
            video={"video_processor_type": "Glm4vVideoProcessor"},
            image_processor="Glm4vImageProcessor",
            tokens=TOKENS,
            chat_template=TEMPLATE,
        ),
        reference="tests.reference.hf:Reference",
        facts=FACTS,
    ),
    "glm45v": FamilyCase(
        tiny=TinyFamily(
            architecture="Glm4vMoeForConditionalGeneration",
            config_class="Glm4vMoeConfig",
            processor_class="Glm4vProcessor",
            vision=vision,
            text=moe_text,
            video={"video_processor_type": "Glm4vVideoProcessor"},
            image_processor="Glm4vImageProcessor",
            tokens=TOKENS,
            chat_template=TEMPLATE,
        ),
        reference="tests.reference.hf:Reference",
        facts=FACTS,
    ),
    "glm46v": FamilyCase(
        tiny=TinyFamily(
            architecture="Glm4vMoeForConditionalGeneration",
            config_class="Glm4vMoeConfig",
            processor_class="Glm46VProcessor",
            vision=vision,
            text=moe_text,
            video={"video_processor_type": "Glm46VVideoProcessor"},
            image_processor="Glm46VImageProcessor",
            tokens=TOKENS,
            chat_template=TEMPLATE,
        ),
        reference="tests.reference.hf:Reference",
        facts=replace(FACTS, fewest_frames=2),
    ),
}
