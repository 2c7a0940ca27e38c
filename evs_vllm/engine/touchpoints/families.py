# SPDX-License-Identifier: Apache-2.0
"""What adapters build on: names of a clip's fields, and how each model numbers a clip."""

from evs_vllm.engine.touchpoints.row import MODELS, PUBLIC, Touchpoint

ROWS: tuple[Touchpoint, ...] = (
    Touchpoint(
        what="Qwen2-VL's fields are read",
        where=MODELS + "qwen2_vl:_create_qwen2vl_field_factory",
        source=("pixel_values_videos=", "video_grid_thw="),
        why="Adapters read a clip's pixels and grid under these names, and the model takes them so.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="Qwen2.5-VL's fields are read",
        where=MODELS + "qwen2_5_vl:Qwen2_5_VLMultiModalProcessor",
        source=("second_per_grid_ts=",),
        why="Adapters read a clip's pixels and grid under these names, and the model takes them so.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="InternVL-HF's fields are read",
        where=MODELS + "interns1:InternS1MultiModalProcessor",
        source=("pixel_values_videos=", "video_num_patches="),
        why="Adapters read a clip's pixels and grid under these names, and the model takes them so.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="InternVL's fields are read",
        where=MODELS + "internvl:InternVLMultiModalProcessor",
        source=("pixel_values_flat_video=", "video_num_patches="),
        why="Adapters read a clip's pixels and grid under these names, and the model takes them so.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="LLaVA-NeXT-Video's fields are read",
        where=MODELS + "llava_next_video:LlavaNextVideoMultiModalProcessor",
        source=("pixel_values_videos=",),
        why="Adapters read a clip's pixels and grid under these names, and the model takes them so.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="LLaVA-OneVision's fields are read",
        where=MODELS + "llava_onevision:LlavaOnevisionMultiModalProcessor",
        source=("pixel_values_videos=",),
        why="Adapters read a clip's pixels and grid under these names, and the model takes them so.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="Gemma 4's fields are read",
        where=MODELS + "gemma4_mm:Gemma4MultiModalProcessor",
        source=("pixel_values_videos", "pixel_position_ids_videos", "video_frame_counts"),
        why="Adapters read a clip's pixels and grid under these names, and the model takes them so.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="Ovis2.5's fields are read",
        where=MODELS + "ovis2_5:Ovis2_5MultiModalProcessor",
        source=("video_pixel_values=", "video_grids="),
        why="Adapters read a clip's pixels and grid under these names, and the model takes them so.",
        gone_when=PUBLIC,
    ),
    Touchpoint(
        what="Qwen2-VL's positions are counted (families)",
        where=MODELS + "qwen2_vl:Qwen2VLForConditionalGeneration",
        source=('"tokens_per_second", 1.0', '"second_per_grid_ts"'),
        why="`position_span` counts as this model numbers a clip.",
        gone_when="vLLM says how many position IDs an item takes up.",
    ),
    Touchpoint(
        what="Qwen2.5-VL's positions are counted (families)",
        where=MODELS + "qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
        source=('"tokens_per_second", 1.0', '"second_per_grid_ts"'),
        why="`position_span` counts as this model numbers a clip.",
        gone_when="vLLM says how many position IDs an item takes up.",
    ),
    Touchpoint(
        what="Qwen3-VL's positions are counted (families)",
        where=MODELS + "qwen3_vl:Qwen3VLForConditionalGeneration._iter_mm_grid_hw",
        source=("for _ in range(t)", "vision_start_token_id"),
        why="`position_span` counts as this model numbers a clip.",
        gone_when="vLLM says how many position IDs an item takes up.",
    ),
    Touchpoint(
        what="Qwen2.5-Omni's positions are counted (families)",
        where=MODELS + "qwen2_5_omni_thinker:Qwen2_5OmniThinkerForConditionalGeneration",
        source=('"tokens_per_second", 25', '"second_per_grid_ts"'),
        why="`position_span` counts as this model numbers a clip.",
        gone_when="vLLM says how many position IDs an item takes up.",
    ),
    Touchpoint(
        what="Qwen3-Omni's positions are counted (families)",
        where=MODELS + "qwen3_omni_moe_thinker:Qwen3OmniMoeThinkerForConditionalGeneration",
        source=("position_id_per_seconds", "second_per_grid"),
        why="`position_span` counts as this model numbers a clip.",
        gone_when="vLLM says how many position IDs an item takes up.",
    ),
)
