# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the Omni families: the thinker alone, with an audio encoder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from evs_vllm.testing import TinyFamily
from evs_vllm.testing.patches import text_config
from evs_vllm.testing.qwen import qwen2_5_vision as qwen2_5_vl_vision
from evs_vllm.testing.qwen import qwen3_vl_moe_text, qwen3_vl_vision
from evs_vllm.testing.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, make_tokenizer
from evs_vllm.testing.weights import empty_model, fill_weights
from tests.families.facts import Engine, Facts, FamilyCase

MEL_BINS = 16
AUDIO_TOKENS = ("<|audio_start|>", "<|audio_end|>", "<|audio_pad|>")
AUDIO = "<|audio_start|><|audio_pad|><|audio_end|>"
# Qwen3-Omni's names, which are those of Qwen2-VL; Qwen2.5-Omni's differ, but models and processors ask the tokenizer.
NAMES = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
}  # fmt: skip


def qwen2_5_vision(s: dict[str, Any]) -> dict[str, Any]:
    return qwen2_5_vl_vision(s) | {"tokens_per_second": 25}


def qwen3_vision(s: dict[str, Any]) -> dict[str, Any]:
    # transformers reads the number of learned places, vLLM the size of the image that they make up.
    return qwen3_vl_vision(s) | {"patch_size": 14, "image_size": 56, "apply_vit_abs_pos_embed": True}


def _audio(row: TinyFamily, s: dict[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {"n_window": 50, "downsample_hidden_size": 8} if "3" in row.architecture else {}
    return {
        "num_mel_bins": MEL_BINS, "encoder_layers": 1, "encoder_attention_heads": 2, "d_model": 64,
        "encoder_ffn_dim": 96, "output_dim": s["hidden_size"], "max_source_positions": 200,
    } | own  # fmt: skip


def make(directory: Path, row: TinyFamily, sizes: dict[str, Any], seed: int) -> None:
    """Writes a model whose checkpoint holds the thinker, under the names that it has beside a talker."""
    import transformers

    special = [*SPECIAL_TOKENS, *AUDIO_TOKENS]
    template = CHAT_TEMPLATE.replace(
        "{% elif 'text' in part %}",
        "{% elif part['type'] in ('audio', 'audio_url') %}" + AUDIO + "{% elif 'text' in part %}",
    )
    tokenizer = make_tokenizer(special, template, **NAMES)
    _write_processor(directory, row, tokenizer, sizes["max_tokens_per_frame"])

    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in special}
    media = {f"{kind}_token_id": ids[f"<|{kind}_pad|>"] for kind in ("image", "video", "audio")}
    thinker: dict[str, Any] = {
        "audio_config": _audio(row, sizes), "vision_config": row.vision(sizes),
        "text_config": text_config(row, sizes, tokenizer), "audio_start_token_id": ids["<|audio_start|>"],
        "audio_end_token_id": ids["<|audio_end|>"], "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"], "tie_word_embeddings": False,
    }  # fmt: skip
    if "3" in row.architecture:
        thinker |= media | {"position_id_per_seconds": 13}
    else:
        thinker |= {name.replace("_id", "_index"): index for name, index in media.items()}
    config = getattr(transformers, row.config_class)(
        thinker_config=thinker, enable_audio_output=False, dtype="float32", tie_word_embeddings=False
    )
    cls = getattr(transformers, row.config_class.replace("Config", "ForConditionalGeneration"))
    model = empty_model(cls, config)
    fill_weights(model.thinker, tokenizer, seed)
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )  # fmt: skip
    model.save_pretrained(directory)
    saved = directory / "config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"architectures": [row.architecture]}, indent=2) + "\n")


def _write_processor(directory: Path, row: TinyFamily, tokenizer: Any, max_tokens_per_frame: int) -> None:
    import transformers

    size = {"shortest_edge": 28 * 28, "longest_edge": max_tokens_per_frame * 28 * 28}
    vision = {
        "size": size, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    processor = getattr(transformers, row.processor_class)(
        transformers.Qwen2VLImageProcessor(**vision),
        transformers.Qwen2VLVideoProcessor(**vision),
        transformers.WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=4, return_attention_mask=True),
        tokenizer,
        tokenizer.chat_template,
    )
    processor.save_pretrained(directory)
    # The processors have a size and a rate of frames of their own for clips. Only tokenizer settings precede them.
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": size, "fps": 2.0}, indent=2) + "\n")


FACTS = Facts(
    frame_size=(112, 140),
    grid=(4, 5),
    raw_pixels=False,
    audio=True,
    fps_argument=True,
)
QWEN2_5 = replace(FACTS, ids_per_second=25, embeds_with={"second_per_grid_ts": [1.0]})

FAMILIES = {
    "qwen2_5_omni": FamilyCase(
        tiny=TinyFamily(
            architecture="Qwen2_5OmniForConditionalGeneration",
            config_class="Qwen2_5OmniConfig",
            processor_class="Qwen2_5OmniProcessor",
            vision=qwen2_5_vision,
            make=make,
        ),
        reference="tests.reference.hf:Reference",
        facts=QWEN2_5,
    ),
    "qwen3_omni_moe": FamilyCase(
        tiny=TinyFamily(
            architecture="Qwen3OmniMoeForConditionalGeneration",
            config_class="Qwen3OmniMoeConfig",
            processor_class="Qwen3OmniMoeProcessor",
            vision=qwen3_vision,
            text=qwen3_vl_moe_text,
            make=make,
        ),
        reference="tests.reference.hf:Reference",
        facts=replace(FACTS, ids_per_second=13),
    ),
    "qwen2_5_omni_model": FamilyCase(  # the name that released checkpoints have
        tiny=TinyFamily(
            architecture="Qwen2_5OmniModel",
            config_class="Qwen2_5OmniConfig",
            processor_class="Qwen2_5OmniProcessor",
            vision=qwen2_5_vision,
            make=make,
        ),
        reference="tests.reference.hf:Reference",
        facts=replace(QWEN2_5, engine=Engine.NONE),
    ),
}
