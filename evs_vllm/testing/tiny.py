# SPDX-License-Identifier: Apache-2.0
"""What is said about a family, so that a tiny model of it can be written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evs_vllm.testing.tokenizer import CHAT_TEMPLATE

QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TinyFamily:
    """One model family of which `write_model` can write tiny models."""

    architecture: str
    """The class name in transformers and in `config.json`."""
    config_class: str
    processor_class: str
    vision: Callable[[dict[str, Any]], dict[str, Any]]
    """From the common sizes to the keyword arguments of the family's vision config."""
    text: Callable[[dict[str, Any]], dict[str, Any]] = lambda sizes: {}
    """Likewise for the language model, beyond what all families have."""
    transposed_experts: bool = False
    """Whether released checkpoints hold expert weights (expert, in, out), other than transformers in memory."""
    video: Mapping[str, Any] = field(default_factory=lambda: {"video_processor_type": "Qwen2VLVideoProcessor"})
    """Settings of the video processor that differ from Qwen2-VL's."""
    image_processor: str = "Qwen2VLImageProcessor"
    patch: int = 14
    """Side of a vision patch in pixels; a token is 2 x 2 of them."""
    tokens: Mapping[str, str] = field(default_factory=lambda: QWEN_TOKENS)
    """Names in the config of the tokens around and for media."""
    chat_template: str = CHAT_TEMPLATE
    make: Callable[[Path, "TinyFamily", dict[str, Any], int], Any] | None = None
    """Writes the folder, given (directory, this row, sizes, seed), where the family is not built like Qwen2-VL."""


SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "vision_hidden": 64,
    "vision_layers": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "max_tokens_per_frame": 24,
    "frame_side": None,  # of families with square frames: pixels along a side other than their own
    "rope": None,  # of families with whole frames: rope_parameters other than their own
}
