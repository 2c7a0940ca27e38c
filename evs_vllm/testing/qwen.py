# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the Qwen-VL families: their configs from the common sizes (`SIZES`), and the table of their rows."""

from typing import Any

from evs_vllm.testing.tiny import TinyFamily


def qwen2_vision(s: dict[str, Any]) -> dict[str, Any]:
    return {
        "depth": s["vision_layers"], "embed_dim": s["vision_hidden"], "hidden_size": s["hidden_size"], "mlp_ratio": 2,
        "num_heads": s["vision_hidden"] // 32,
    }  # fmt: skip


def qwen2_5_vision(s: dict[str, Any]) -> dict[str, Any]:
    # 56 pixels = windows of 2 x 2 tokens; the last layer attends over the whole frame, like the released models.
    return {
        "depth": s["vision_layers"], "hidden_size": s["vision_hidden"], "intermediate_size": 2 * s["vision_hidden"],
        "num_heads": s["vision_hidden"] // 32, "out_hidden_size": s["hidden_size"], "window_size": 56,
        "fullatt_block_indexes": [s["vision_layers"] - 1], "tokens_per_second": 4,
    }  # fmt: skip


def qwen3_vision(s: dict[str, Any]) -> dict[str, Any]:
    # The learned place grid is 4 x 4, so that most places lie between its nodes.
    return {
        "depth": s["vision_layers"], "hidden_size": s["vision_hidden"], "intermediate_size": 2 * s["vision_hidden"],
        "num_heads": s["vision_hidden"] // 32, "out_hidden_size": s["hidden_size"], "patch_size": 16,
        "num_position_embeddings": 16,
    }  # fmt: skip


def qwen3_vl_vision(s: dict[str, Any]) -> dict[str, Any]:
    # Deepstack: the output of the first two tower blocks is added after the first two layers of the language model.
    return qwen3_vision(s) | {"deepstack_visual_indexes": [0, 1]}


def qwen3_vl_text(s: dict[str, Any], rotated: float = 1.0) -> dict[str, Any]:
    # Interleaved M-RoPE: thirds, what is left over goes to t. `rotated` is the share of a head that is rotated at all.
    half = int(s["hidden_size"] // s["heads"] * rotated) // 2
    rope = {
        "mrope_interleaved": True, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
        "partial_rotary_factor": rotated,
    }  # fmt: skip
    return {"head_dim": s["hidden_size"] // s["heads"], "rope_parameters": rope}


def moe(s: dict[str, Any]) -> dict[str, Any]:
    # Released checkpoints say norm_topk_prob; vLLM reads it, transformers always normalises.
    return {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True,
    }  # fmt: skip


def qwen3_vl_moe_text(s: dict[str, Any]) -> dict[str, Any]:
    return qwen3_vl_text(s) | moe(s)


def qwen3_5_text(s: dict[str, Any]) -> dict[str, Any]:
    # Two layers of linear attention before each of full attention; the released models have three. Their states are
    # small (the released models: 128 x 128 per head), because vLLM makes its cache blocks as large as a state.
    kinds = ["full_attention" if layer % 3 == 2 else "linear_attention" for layer in range(s["layers"])]
    return qwen3_vl_text(s, rotated=0.5) | {
        "layer_types": kinds, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    }  # fmt: skip


def qwen3_5_moe_text(s: dict[str, Any]) -> dict[str, Any]:
    return qwen3_5_text(s) | moe(s) | {"shared_expert_intermediate_size": s["hidden_size"]}


# Its pixel limits count all frames of a clip; the cap per frame is the one of Qwen2-VL's processor.
QWEN3_VIDEO = {"video_processor_type": "Qwen3VLVideoProcessor", "cap_pixels_per_frame": True,
                "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}  # fmt: skip

FAMILIES: dict[str, TinyFamily] = {
    "qwen2_5_vl": TinyFamily(
        architecture="Qwen2_5_VLForConditionalGeneration",
        config_class="Qwen2_5_VLConfig",
        processor_class="Qwen2_5_VLProcessor",
        vision=qwen2_5_vision,
    ),
    "qwen2_vl": TinyFamily(
        architecture="Qwen2VLForConditionalGeneration",
        config_class="Qwen2VLConfig",
        processor_class="Qwen2VLProcessor",
        vision=qwen2_vision,
    ),
    "qwen3_vl": TinyFamily(
        architecture="Qwen3VLForConditionalGeneration",
        config_class="Qwen3VLConfig",
        processor_class="Qwen3VLProcessor",
        vision=qwen3_vl_vision,
        text=qwen3_vl_text,
        patch=16,
        video=QWEN3_VIDEO,
    ),
    "qwen3_vl_moe": TinyFamily(
        architecture="Qwen3VLMoeForConditionalGeneration",
        config_class="Qwen3VLMoeConfig",
        processor_class="Qwen3VLProcessor",
        vision=qwen3_vl_vision,
        text=qwen3_vl_moe_text,
        transposed_experts=True,
        patch=16,
        video=QWEN3_VIDEO,
    ),
    "qwen3_5": TinyFamily(
        architecture="Qwen3_5ForConditionalGeneration",
        config_class="Qwen3_5Config",
        processor_class="Qwen3VLProcessor",
        vision=qwen3_vision,
        text=qwen3_5_text,
        patch=16,
        video=QWEN3_VIDEO,
    ),
    "qwen3_5_moe": TinyFamily(
        architecture="Qwen3_5MoeForConditionalGeneration",
        config_class="Qwen3_5MoeConfig",
        processor_class="Qwen3VLProcessor",
        vision=qwen3_vision,
        text=qwen3_5_moe_text,
        patch=16,
        video=QWEN3_VIDEO,
    ),
}
"""Those that the demo, the training and the benches use. Families beyond Qwen-VL are rows in tests/families."""
