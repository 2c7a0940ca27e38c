# SPDX-License-Identifier: Apache-2.0
"""What tiny models of families with patch rows (Qwen, GLM) share: the language model's config, and the processor."""

import json
from pathlib import Path
from typing import Any

from evs_vllm.testing.tiny import TinyFamily


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


def write_processor(directory: Path, row: TinyFamily, tokenizer: Any, max_tokens_per_frame: int) -> None:
    """Writes the files of the processor and of its tokenizer."""
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
