# SPDX-License-Identifier: Apache-2.0
"""The table of the families that tiny models can be written of: a new family is one more row."""

from evs_vllm.testing import frames, gemma4, glm, internvl_chat, omni, ovis, qwen
from evs_vllm.testing.tiny import TinyFamily

FAMILIES: dict[str, TinyFamily] = {
    "qwen2_5_vl": TinyFamily(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", "Qwen2_5_VLProcessor", qwen.qwen2_5_vision
    ),
    "qwen2_vl": TinyFamily("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", "Qwen2VLProcessor", qwen.qwen2_vision),
    "qwen3_vl": TinyFamily(
        "Qwen3VLForConditionalGeneration", "Qwen3VLConfig", "Qwen3VLProcessor", qwen.qwen3_vl_vision,
        qwen.qwen3_vl_text, patch=16, video=qwen.QWEN3_VIDEO,
    ),
    "qwen3_vl_moe": TinyFamily(
        "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig", "Qwen3VLProcessor", qwen.qwen3_vl_vision,
        qwen.qwen3_vl_moe_text, transposed_experts=True, patch=16, video=qwen.QWEN3_VIDEO,
    ),
    "qwen3_5": TinyFamily(
        "Qwen3_5ForConditionalGeneration", "Qwen3_5Config", "Qwen3VLProcessor", qwen.qwen3_vision, qwen.qwen3_5_text,
        patch=16, video=qwen.QWEN3_VIDEO,
    ),
    "qwen3_5_moe": TinyFamily(
        "Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeConfig", "Qwen3VLProcessor", qwen.qwen3_vision,
        qwen.qwen3_5_moe_text, patch=16, video=qwen.QWEN3_VIDEO,
    ),
    "glm4v": TinyFamily(
        "Glm4vForConditionalGeneration", "Glm4vConfig", "Glm4vProcessor", glm.glm4v_vision, glm.glm4v_text, **glm.GLM4V
    ),
    "glm45v": TinyFamily(
        "Glm4vMoeForConditionalGeneration", "Glm4vMoeConfig", "Glm4vProcessor", glm.glm4v_vision, glm.glm4v_moe_text,
        **glm.GLM4V,
    ),
    "glm46v": TinyFamily(
        "Glm4vMoeForConditionalGeneration", "Glm4vMoeConfig", "Glm46VProcessor", glm.glm4v_vision, glm.glm4v_moe_text,
        **glm.GLM46V,
    ),
    "internvl": TinyFamily(
        "InternVLForConditionalGeneration", "InternVLConfig", "InternVLProcessor", frames.internvl_vision,
        make=frames.make_frames_model,
    ),
    "internvl_chat": TinyFamily(
        "InternVLChatModel", "InternVLConfig", "InternVLProcessor", frames.internvl_vision,
        make=internvl_chat.make_internvl_chat,
    ),
    "llava_onevision": TinyFamily(
        "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionConfig", "LlavaOnevisionProcessor",
        frames.siglip_vision, make=frames.make_frames_model,
    ),
    "llava_next_video": TinyFamily(
        "LlavaNextVideoForConditionalGeneration", "LlavaNextVideoConfig", "LlavaNextVideoProcessor",
        frames.clip_vision, make=frames.make_frames_model,
    ),
    "qwen2_5_omni": TinyFamily(
        "Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniConfig", "Qwen2_5OmniProcessor", omni.qwen2_5_vision,
        make=omni.make_omni_model,
    ),
    "qwen3_omni_moe": TinyFamily(
        "Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeConfig", "Qwen3OmniMoeProcessor", omni.qwen3_vision,
        qwen.qwen3_vl_moe_text, make=omni.make_omni_model,
    ),
    "qwen2_5_omni_model": TinyFamily(  # the name that released checkpoints have
        "Qwen2_5OmniModel", "Qwen2_5OmniConfig", "Qwen2_5OmniProcessor", omni.qwen2_5_vision,
        make=omni.make_omni_model,
    ),
    "gemma4": TinyFamily(
        "Gemma4ForConditionalGeneration", "Gemma4Config", "Gemma4Processor", gemma4.vision, gemma4.text,
        make=gemma4.make_gemma4,
    ),
    "gemma4_unified": TinyFamily(
        "Gemma4UnifiedForConditionalGeneration", "Gemma4UnifiedConfig", "Gemma4UnifiedProcessor",
        gemma4.patch_embedding, gemma4.text, make=gemma4.make_gemma4,
    ),
    "ovis2_5": TinyFamily("Ovis2_5", "", "", ovis.vision, make=ovis.make_ovis),
}  # fmt: skip
