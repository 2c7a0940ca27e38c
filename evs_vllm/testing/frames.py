# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the families whose processor gives whole frames.

Their rotary embeddings differ on purpose: default, dynamic, YaRN and Llama 3 scaling are what such models come with.
"""

from pathlib import Path
from typing import Any

from evs_vllm.testing.tiny import TinyFamily
from evs_vllm.testing.tokenizer import make_tokenizer
from evs_vllm.testing.weights import empty_model, fill_weights

PATCH = 14
SIDE = 112
"""Pixels along a frame: 8 x 8 patches, 4 x 4 tokens."""
ODD_SIDE = 7 * PATCH + 6
"""LLaVA-OneVision: 7 x 7 patches and 6 pixels that no patch covers, 4 x 4 tokens; released, 27 x 27 and 14 x 14."""

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TEXT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
INTERNVL_TOKENS = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<image>\n"
    "{% elif part['type'] in ('video', 'video_url') %}<video>\n"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

INTERNVL = "InternVLForConditionalGeneration"
ROPE: dict[str, dict[str, Any]] = {
    INTERNVL: {"rope_type": "default"},
    "InternVLChatModel": {"rope_type": "dynamic", "factor": 2.0},
    "LlavaOnevisionForConditionalGeneration": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192,
    },
    "LlavaNextVideoForConditionalGeneration": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "Ovis2_5": {
        "rope_type": "longrope", "factor": 2048.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 16, "long_factor": [1 + place / 4 for place in range(16)],
        "short_mscale": 1.1, "long_mscale": 1.1, "attention_factor": 1.1,
    },
}  # fmt: skip


CLIP_PATCH, CLIP_SIDE = 8, 64
"""LLaVA-NeXT-Video: vLLM divides by the side over the squared patch size, which must not be 0. Again 4 x 4 tokens."""


def _tower(s: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": s["vision_hidden"], "num_hidden_layers": s["vision_layers"] + 1, "patch_size": PATCH,
        "num_attention_heads": s["vision_hidden"] // 32, "intermediate_size": 2 * s["vision_hidden"],
        "image_size": SIDE,
    }  # fmt: skip


def internvl_vision(s: dict[str, Any]) -> dict[str, Any]:
    return _tower(s) | {"attention_bias": True}


def siglip_vision(s: dict[str, Any]) -> dict[str, Any]:
    return _tower(s) | {"model_type": "siglip_vision_model", "image_size": ODD_SIDE, "vision_use_head": False}


def clip_vision(s: dict[str, Any]) -> dict[str, Any]:
    own = {"model_type": "clip_vision_model", "image_size": CLIP_SIDE, "patch_size": CLIP_PATCH}
    return _tower(s) | own | {"projection_dim": s["vision_hidden"]}


def text_config(architecture: str, s: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The language model's config: Qwen3 for InternVL (as 3.5), Qwen2 and Llama for the others, as released."""
    kinds = {INTERNVL: "qwen3", "LlavaNextVideoForConditionalGeneration": "llama", "Ovis2_5": "qwen3"}
    rope = s.get("rope") or ROPE[architecture]
    return {
        "model_type": kinds.get(architecture, "qwen2"), "vocab_size": len(tokenizer), "hidden_size": s["hidden_size"],
        "head_dim": s["hidden_size"] // s["heads"], "intermediate_size": 2 * s["hidden_size"],
        "num_hidden_layers": s["layers"], "num_attention_heads": s["heads"], "num_key_value_heads": s["kv_heads"],
        "max_position_embeddings": s["max_position_embeddings"],
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": rope | {"rope_theta": s["rope_theta"]}, "tie_word_embeddings": False,
    }  # fmt: skip


def make_frames_model(directory: Path, row: TinyFamily, sizes: dict[str, Any], seed: int) -> None:
    """Writes a model in Hugging Face's format."""
    write_native(directory, row.processor_class.removesuffix("Processor").lower(), row, sizes, seed)


def write_native(directory: Path, kind: str, row: TinyFamily, sizes: dict[str, Any], seed: int) -> Any:
    """Writes a model in Hugging Face's format; `kind` is the name of its processor. Returns it."""
    import torch
    import transformers

    named = INTERNVL_TOKENS if kind == "internvl" else {}
    others = [*named.values(), "<|video_pad|>"] if named else ["<image>", "<video>"]
    tokenizer = make_tokenizer([*TEXT_TOKENS, *others], CHAT_TEMPLATE, **named)
    _processor(kind, tokenizer).save_pretrained(directory)
    image, video = (
        tokenizer.convert_tokens_to_ids(name) for name in ("<IMG_CONTEXT>" if named else "<image>", "<video>")
    )
    extra: dict[str, Any] = (
        {"image_token_id": image} if named else {"image_token_index": image, "video_token_index": video}
    )
    if kind == "internvl":
        extra["image_seq_length"] = 16
    elif kind == "llavaonevision":
        extra["image_grid_pinpoints"] = _pinpoints(ODD_SIDE)
    else:
        extra["image_grid_pinpoints"] = _pinpoints(CLIP_SIDE)
    config = getattr(transformers, row.config_class)(
        text_config=text_config(row.architecture, sizes, tokenizer), vision_config=row.vision(sizes),
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
    if kind != "internvl":
        _name_as_released(directory / "model.safetensors")
    return model


def _name_as_released(file: Path) -> None:
    """Newer transformers leave a level out of the names of CLIP and SigLIP weights that checkpoints and vLLM have."""
    from safetensors.torch import load_file, save_file

    weights = {name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def _pinpoints(side: int) -> list[list[int]]:
    return [[side, side], [side, 2 * side], [2 * side, side]]


def _processor(kind: str, tokenizer: Any) -> Any:
    import transformers as t

    if kind == "internvl":
        size = {"height": SIDE, "width": SIDE}
        image: Any = t.GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=2, **IMAGENET)
        video: Any = t.InternVLVideoProcessor(size=size, **IMAGENET)
        return t.InternVLProcessor(image, tokenizer, video, image_seq_length=16, chat_template=CHAT_TEMPLATE)
    if kind == "llavaonevision":
        size = {"height": ODD_SIDE, "width": ODD_SIDE}
        image = t.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=_pinpoints(ODD_SIDE))
        video = t.LlavaOnevisionVideoProcessor(size=size)
        return t.LlavaOnevisionProcessor(
            image, tokenizer, video, num_image_tokens=49, vision_feature_select_strategy="full",
            chat_template=CHAT_TEMPLATE,
        )  # fmt: skip
    edge, crop = {"shortest_edge": CLIP_SIDE}, {"height": CLIP_SIDE, "width": CLIP_SIDE}
    image = t.LlavaNextImageProcessor(size=edge, crop_size=crop, image_grid_pinpoints=_pinpoints(CLIP_SIDE))
    video = t.LlavaNextVideoVideoProcessor(size=edge, crop_size=crop)
    return t.LlavaNextVideoProcessor(
        video, image, tokenizer, patch_size=CLIP_PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
