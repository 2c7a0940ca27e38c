# SPDX-License-Identifier: Apache-2.0
"""A tiny InternVL in the format of Hugging Face."""

from pathlib import Path
from typing import Any

from evs_vllm.testing import TinyFamily
from evs_vllm.testing.tokenizer import make_tokenizer
from tests.families.facts import Facts, FamilyCase
from tests.families.whole_frames import CHAT_TEMPLATE, PATCH, SIDE, TEXT_TOKENS, tower, write_native

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TOKENS = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}  # fmt: skip


def vision(s: dict[str, Any]) -> dict[str, Any]:
    return tower(s) | {"attention_bias": True}


def text(s: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": "qwen3", "rope_parameters": {"rope_type": "default"}}  # as 3.5


def make(directory: Path, row: TinyFamily, sizes: dict[str, Any], seed: int) -> Any:
    """Writes the model, and returns it."""
    import transformers as t

    tokenizer = make_tokenizer([*TEXT_TOKENS, *TOKENS.values(), "<|video_pad|>"], CHAT_TEMPLATE, **TOKENS)
    side = sizes["frame_side"] or SIDE
    size, tokens = {"height": side, "width": side}, (side // PATCH // 2) ** 2
    image = t.GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=2, **IMAGENET)
    video = t.InternVLVideoProcessor(size=size, **IMAGENET)
    processor = t.InternVLProcessor(image, tokenizer, video, image_seq_length=tokens, chat_template=CHAT_TEMPLATE)
    processor.save_pretrained(directory)
    extra = {"image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), "image_seq_length": tokens}
    return write_native(directory, row, sizes, seed, tokenizer, extra)


FAMILIES = {
    "internvl": FamilyCase(
        tiny=TinyFamily(
            architecture="InternVLForConditionalGeneration",
            config_class="InternVLConfig",
            processor_class="InternVLProcessor",
            vision=vision,
            text=text,
            make=make,
        ),
        reference="tests.reference.frames:FramesReference",
        facts=Facts(
            frame_size=(112, 112),
            grid=(4, 4),
            whole_frames=True,
            makes_frames=True,
            rotary=frozenset({"RotaryEmbedding"}),
        ),
    ),
}
