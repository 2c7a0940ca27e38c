# SPDX-License-Identifier: Apache-2.0
"""What tiny models share whose processor gives whole frames: the text side, and writing them in Hugging Face's format.

The rotary embeddings of these families differ on purpose: default, dynamic, YaRN, Llama 3 scaling, proportional and
LongRoPE are what such models come with.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evs_vllm.testing import TinyFamily
from evs_vllm.testing.weights import empty_model, fill_weights

PATCH = 14
SIDE = 112
"""Pixels along a frame: 8 x 8 patches, 4 x 4 tokens."""

TEXT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<image>\n"
    "{% elif part['type'] in ('video', 'video_url') %}<video>\n"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tower(s: dict[str, Any]) -> dict[str, Any]:
    """A plain ViT, from the common sizes."""
    return {
        "hidden_size": s["vision_hidden"], "num_hidden_layers": s["vision_layers"] + 1, "patch_size": PATCH,
        "num_attention_heads": s["vision_hidden"] // 32, "intermediate_size": 2 * s["vision_hidden"],
        "image_size": s["frame_side"] or SIDE,
    }  # fmt: skip


def text_config(row: TinyFamily, s: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The language model's config. The row's `text` says which model it is, as released, and its rotary embedding."""
    own = row.text(s)
    rope = s.get("rope") or own["rope_parameters"]
    return {
        "model_type": own["model_type"], "vocab_size": len(tokenizer), "hidden_size": s["hidden_size"],
        "head_dim": s["hidden_size"] // s["heads"], "intermediate_size": 2 * s["hidden_size"],
        "num_hidden_layers": s["layers"], "num_attention_heads": s["heads"], "num_key_value_heads": s["kv_heads"],
        "max_position_embeddings": s["max_position_embeddings"],
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": rope | {"rope_theta": s["rope_theta"]}, "tie_word_embeddings": False,
    }  # fmt: skip


def write_native(
    directory: Path, row: TinyFamily, sizes: dict[str, Any], seed: int, tokenizer: Any, extra: Mapping[str, Any]
) -> Any:
    """Writes config and weights in Hugging Face's format; `extra` are arguments of the config. Returns the model."""
    import torch
    import transformers

    config = getattr(transformers, row.config_class)(
        text_config=text_config(row, sizes, tokenizer), vision_config=row.vision(sizes),
        tie_word_embeddings=False, dtype="float32", **extra,
    )  # fmt: skip
    architecture = row.config_class.replace("Config", "ForConditionalGeneration")
    config.architectures = [architecture]
    model = empty_model(getattr(transformers, architecture), config)
    fill_weights(model, tokenizer, seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lambda_" in name:  # layer scales
                weight += 1.0
            elif "position_embedding" in name or name.endswith("cls_token"):
                weight *= 0.5 / float(weight.std())
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, bos_token_id=0, eos_token_id=2, pad_token_id=0
    )
    model.save_pretrained(directory)
    return model
