# SPDX-License-Identifier: Apache-2.0
"""A model folder with Qwen2.5-VL-7B's shapes and no weights, for ``load_format="dummy"``.

Its speeds are the model's, its answers mean nothing. Tokenizer and processor are those of the tiny model, which takes
larger frames here.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from evs_vllm.testing import make_model

TEXT: dict[str, Any] = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 128000, "max_window_layers": 28,
    "layer_types": ["full_attention"] * 28,
}  # fmt: skip
ROPE = {"mrope_section": [16, 24, 24], "rope_theta": 1000000.0}
VISION: dict[str, Any] = {
    "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584,
    "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "tokens_per_second": 2,
}  # fmt: skip
OPTIONAL = {"layer_types", "max_window_layers"}
"""In a config or not, by the version of transformers that writes it."""

MOST_TOKENS = 330
"""Tokens of a frame: 512 x 512 pixels are 18 x 18 of them."""


def write_shapes(folder: Path) -> Path:
    """Writes the model's folder, without weights.

    Raises:
        KeyError: transformers names a size otherwise now.
    """
    made = make_model(folder, "qwen2_5_vl", max_tokens_per_frame=MOST_TOKENS)
    (made / "model.safetensors").unlink()
    file = made / "config.json"
    config = json.loads(file.read_text())
    text, vision = config["text_config"], config["vision_config"]
    for part, sizes in ((text, TEXT), (vision, VISION)):
        if unknown := sizes.keys() - part.keys() - OPTIONAL:
            raise KeyError(f"{sorted(unknown)} are not in the config that transformers wrote: {sorted(part)}")
        part.update((key, size) for key, size in sizes.items() if key in part or key not in OPTIONAL)
    text["rope_parameters"] = {**(text.get("rope_parameters") or {}), **ROPE}
    config.update({key: text[key] for key in ("hidden_size", "vocab_size") if key in config})
    file.write_text(json.dumps(config, indent=1) + "\n")
    return made


def of(model: str | None, tiny: bool) -> tuple[str, str]:
    """(folder or name, load format) of an engine's model: the one that is named, or one that is made here."""
    if model is not None:
        return model, "auto"
    folder = Path(tempfile.mkdtemp(prefix="evs-gpu-")) / "model"
    return (str(make_model(folder, "qwen2_5_vl")), "auto") if tiny else (str(write_shapes(folder)), "dummy")
