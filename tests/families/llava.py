# SPDX-License-Identifier: Apache-2.0
"""A tiny LLaVA-OneVision and LLaVA-NeXT-Video."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evs_vllm.testing import TinyFamily
from evs_vllm.testing.tokenizer import make_tokenizer
from tests.families.facts import Facts, FamilyCase
from tests.families.whole_frames import CHAT_TEMPLATE, PATCH, TEXT_TOKENS, tower, write_native

ODD_SIDE = 7 * PATCH + 6
"""LLaVA-OneVision: 7 x 7 patches and 6 pixels that no patch covers, 4 x 4 tokens; released, 27 x 27 and 14 x 14."""
CLIP_PATCH, CLIP_SIDE = 8, 64
"""LLaVA-NeXT-Video: vLLM divides by the side over the squared patch size, which must not be 0. Again 4 x 4 tokens."""


def siglip_vision(s: dict[str, Any]) -> dict[str, Any]:
    return tower(s) | {"model_type": "siglip_vision_model", "image_size": ODD_SIDE, "vision_use_head": False}


def clip_vision(s: dict[str, Any]) -> dict[str, Any]:
    own = {"model_type": "clip_vision_model", "image_size": CLIP_SIDE, "patch_size": CLIP_PATCH}
    return tower(s) | own | {"projection_dim": s["vision_hidden"]}


def onevision_text(s: dict[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    return {"model_type": "qwen2", "rope_parameters": rope}


def next_video_text(s: dict[str, Any]) -> dict[str, Any]:
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    return {"model_type": "llama", "rope_parameters": rope}


def tokens_under_onevision(pixel: int) -> Sequence[int]:
    # 7 patches of 14 and 6 pixels: tokens of patches 0-1, 2-3, 3-4 and 5-6
    return [[0], [0], [1], [1, 2], [2], [3], [3], []][pixel // 14]


def make_onevision(directory: Path, row: TinyFamily, sizes: dict[str, Any], seed: int) -> None:
    import transformers as t

    tokenizer, size = _tokenizer(), {"height": ODD_SIDE, "width": ODD_SIDE}
    processor = t.LlavaOnevisionProcessor(
        t.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=_pinpoints(ODD_SIDE)),
        tokenizer,
        t.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=49,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(directory)
    _write(directory, row, sizes, seed, tokenizer, ODD_SIDE)


def make_next_video(directory: Path, row: TinyFamily, sizes: dict[str, Any], seed: int) -> None:
    import transformers as t

    tokenizer = _tokenizer()
    edge, crop = {"shortest_edge": CLIP_SIDE}, {"height": CLIP_SIDE, "width": CLIP_SIDE}
    processor = t.LlavaNextVideoProcessor(
        t.LlavaNextVideoVideoProcessor(size=edge, crop_size=crop),
        t.LlavaNextImageProcessor(size=edge, crop_size=crop, image_grid_pinpoints=_pinpoints(CLIP_SIDE)),
        tokenizer,
        patch_size=CLIP_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(directory)
    _write(directory, row, sizes, seed, tokenizer, CLIP_SIDE)


def _tokenizer() -> Any:
    return make_tokenizer([*TEXT_TOKENS, "<image>", "<video>"], CHAT_TEMPLATE)


def _pinpoints(side: int) -> list[list[int]]:
    return [[side, side], [side, 2 * side], [2 * side, side]]


def _write(directory: Path, row: TinyFamily, sizes: dict[str, Any], seed: int, tokenizer: Any, side: int) -> None:
    from safetensors.torch import load_file, save_file

    image, video = (tokenizer.convert_tokens_to_ids(name) for name in ("<image>", "<video>"))
    extra = {"image_token_index": image, "video_token_index": video, "image_grid_pinpoints": _pinpoints(side)}
    write_native(directory, row, sizes, seed, tokenizer, extra)
    # Newer transformers leave a level out of the names of CLIP and SigLIP weights that checkpoints and vLLM have.
    file = directory / "model.safetensors"
    weights = {name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


FAMILIES = {
    "llava_onevision": FamilyCase(
        tiny=TinyFamily(
            architecture="LlavaOnevisionForConditionalGeneration",
            config_class="LlavaOnevisionConfig",
            processor_class="LlavaOnevisionProcessor",
            vision=siglip_vision,
            text=onevision_text,
            make=make_onevision,
        ),
        reference="tests.reference.frames:FramesReference",
        facts=Facts(
            frame_size=(ODD_SIDE, ODD_SIDE),
            grid=(4, 4),
            tokens_under=tokens_under_onevision,
            whole_frames=True,
            makes_frames=True,
            extra_rows=1,
            rotary=frozenset({"YaRNScalingRotaryEmbedding"}),
        ),
    ),
    "llava_next_video": FamilyCase(
        tiny=TinyFamily(
            architecture="LlavaNextVideoForConditionalGeneration",
            config_class="LlavaNextVideoConfig",
            processor_class="LlavaNextVideoProcessor",
            vision=clip_vision,
            text=next_video_text,
            make=make_next_video,
        ),
        reference="tests.reference.frames:FramesReference",
        facts=Facts(
            frame_size=(CLIP_SIDE, CLIP_SIDE),
            grid=(4, 4),
            whole_frames=True,
            rotary=frozenset({"Llama3RotaryEmbedding"}),
            limits={"video": 1},
        ),
    ),
}
