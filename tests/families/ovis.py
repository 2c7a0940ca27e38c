# SPDX-License-Identifier: Apache-2.0
"""A tiny Ovis2.5. transformers has no such model; vLLM brings its processor, not its config."""

import json
from pathlib import Path
from typing import Any

from evs_vllm.testing import TinyFamily
from evs_vllm.testing.tokenizer import make_tokenizer
from evs_vllm.testing.weights import empty_model, fill_weights
from tests.families.facts import Facts, FamilyCase
from tests.families.whole_frames import CHAT_TEMPLATE, TEXT_TOKENS, text_config

PATCH, STRIDE = 56, 2
"""A token is 112 x 112 pixels, because the processor enlarges frames to at least 448 x 448: 4 x 4 tokens."""
SIDE = 448
VISUAL_WORDS = 64
LANGUAGE = "language"
"""Folder inside with the language model in the format of transformers, for the reference."""

TOKENS = ("<image>", "<video>", "<|image_pad|>", "<ovis_visual_atom>")
INDICATORS = {
    "<ovis_image_start>": 151672, "<ovis_image_end>": 151673, "<ovis_video_start>": 151674, "<ovis_video_end>": 151675,
}  # fmt: skip
"""vLLM has their ids in its code. They stand in no prompt, so the vocabulary need not reach so far."""

CONFIG = """from transformers import AutoConfig, PretrainedConfig


class Ovis2_5_Config(PretrainedConfig):
    model_type = "ovis2_5"

    def __init__(self, llm_config=None, vit_config=None, **kwargs):
        super().__init__(**kwargs)
        llm_config = dict(llm_config or {})
        self.llm_config = AutoConfig.for_model(llm_config.pop("model_type", "qwen3"), **llm_config)
        self.vit_config = PretrainedConfig(**(vit_config or {}))
        self.vit_config.model_type = "siglip2_navit"
"""


def vision(s: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": s["vision_hidden"], "num_hidden_layers": s["vision_layers"], "patch_size": PATCH,
        "num_attention_heads": s["vision_hidden"] // 32, "intermediate_size": 2 * s["vision_hidden"],
        "image_size": 4 * PATCH, "num_patches": -1, "num_channels": 3, "hidden_stride": STRIDE,
        "window_size": 2 * PATCH,
        "fullatt_block_indexes": None, "temporal_patch_size": 1, "preserve_original_pe": True, "use_rope": True,
        "hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.0, "layer_norm_eps": 1e-6,
    }  # fmt: skip


def text(s: dict[str, Any]) -> dict[str, Any]:
    rope = {
        "rope_type": "longrope", "factor": 2048.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 16, "long_factor": [1 + place / 4 for place in range(16)],
        "short_mscale": 1.1, "long_mscale": 1.1, "attention_factor": 1.1,
    }  # fmt: skip
    return {"model_type": "qwen3", "rope_parameters": rope}


def make(directory: Path, row: TinyFamily, sizes: dict[str, Any], seed: int) -> None:
    """Writes the model."""
    import transformers as t
    from safetensors.torch import save_file

    tokenizer = make_tokenizer([*TEXT_TOKENS, *TOKENS], CHAT_TEMPLATE)
    config = t.Qwen3Config(**text_config(row, sizes, tokenizer), dtype="float32")
    config.architectures = ["Qwen3ForCausalLM"]
    model = empty_model(t.Qwen3ForCausalLM, config)
    fill_weights(model, tokenizer, seed)
    model.save_pretrained(directory / LANGUAGE)

    _with_indicators(tokenizer).save_pretrained(directory)
    size = {"height": SIDE, "width": SIDE}
    t.SiglipImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3, size=size).save_pretrained(directory)
    (directory / "configuration_ovis2_5.py").write_text(CONFIG)
    whole = {
        "architectures": [row.architecture], "model_type": "ovis2_5", "dtype": "float32",
        "auto_map": {"AutoConfig": "configuration_ovis2_5.Ovis2_5_Config"}, "hidden_size": sizes["hidden_size"],
        "visual_vocab_size": VISUAL_WORDS, "vit_config": row.vision(sizes), "llm_config": config.to_dict(),
        "tie_word_embeddings": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(whole, indent=2) + "\n")
    generation = {"do_sample": False, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights = {f"llm.{name}": weight.contiguous() for name, weight in model.state_dict().items()}
    weights |= _tower_weights(row.vision(sizes), sizes["hidden_size"], seed)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _with_indicators(tokenizer: Any) -> Any:
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] |= INDICATORS
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer


def _tower_weights(v: dict[str, Any], hidden: int, seed: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    out: dict[str, Any] = {}

    def matrix(name: str, rows: int, *columns: int, gain: float = 1.0, bias: bool = True) -> None:
        noise = torch.randn(rows, *columns, generator=generator)
        out[f"{name}.weight"] = noise * gain / (noise[0].numel() ** 0.5)
        if bias:
            out[f"{name}.bias"] = 0.2 * torch.randn(rows, generator=generator)

    def norm(name: str, size: int, gain: float = 1.0) -> None:
        out[f"{name}.weight"] = gain * (1 + 0.2 * torch.randn(size, generator=generator))
        out[f"{name}.bias"] = 0.2 * torch.randn(size, generator=generator)

    tower, width, inner = "visual_tokenizer.vit.vision_model", v["hidden_size"], v["intermediate_size"]
    matrix(f"{tower}.embeddings.patch_embedding", width, 3, PATCH, PATCH)
    places = (v["image_size"] // PATCH) ** 2
    out[f"{tower}.embeddings.position_embedding.weight"] = 0.5 * torch.randn(places, width, generator=generator)
    for layer in range(v["num_hidden_layers"]):
        here = f"{tower}.encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            matrix(f"{here}.self_attn.{part}", width, width, gain=1.6 if part in ("q_proj", "k_proj") else 1.0)
        matrix(f"{here}.mlp.fc1", inner, width)
        matrix(f"{here}.mlp.fc2", width, inner)
        norm(f"{here}.layer_norm1", width)
        norm(f"{here}.layer_norm2", width)
    norm(f"{tower}.post_layernorm", width)
    words = v["hidden_size"] * STRIDE**2
    matrix("visual_tokenizer.head.0", VISUAL_WORDS - len(INDICATORS), words, bias=False)
    norm("visual_tokenizer.head.1", VISUAL_WORDS - len(INDICATORS), gain=3.0)  # peaked: a few words for each token
    out["vte.weight"] = torch.randn(VISUAL_WORDS, hidden, generator=generator)
    return out


FAMILIES = {
    "ovis2_5": FamilyCase(
        tiny=TinyFamily(
            architecture="Ovis2_5",
            config_class="",  # transformers has neither
            processor_class="",
            vision=vision,
            text=text,
            make=make,
        ),
        reference="tests.reference.ovis:OvisReference",
        facts=Facts(
            frame_size=(SIDE, SIDE),
            grid=(4, 4),
            whole_frames=True,
            makes_frames=True,
            extra_rows=2,
            rotary=frozenset({"Phi3LongRoPEScaledRotaryEmbedding"}),
            limits={"image": 4, "video": 1},
            remote_code=True,
        ),
    ),
}
