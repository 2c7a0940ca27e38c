# SPDX-License-Identifier: Apache-2.0
"""A tiny InternVL in its own format, which vLLM reads and transformers does not."""

import json
from pathlib import Path
from typing import Any

from evs_vllm.testing import TinyFamily
from evs_vllm.testing.tokenizer import make_tokenizer
from tests.families import internvl
from tests.families.facts import Facts, FamilyCase
from tests.families.whole_frames import CHAT_TEMPLATE, PATCH, SIDE, TEXT_TOKENS

NATIVE = "native"
"""Folder inside an InternVL chat model with the same weights in Hugging Face's format, for the reference."""

CHAT_CONFIG = """from transformers import AutoConfig, PretrainedConfig


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        super().__init__(**kwargs)
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        llm_config = dict(llm_config or {})
        self.llm_config = AutoConfig.for_model(llm_config.pop("model_type", "qwen2"), **llm_config)
"""


def text(s: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": "qwen2", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}


def make(directory: Path, row: TinyFamily, sizes: dict[str, Any], seed: int) -> None:
    """Writes a model in InternVL's own format, and the same one in Hugging Face's into the folder `NATIVE` in it."""
    from safetensors.torch import save_file

    model = internvl.make(directory / NATIVE, row, sizes, seed)
    _chat_tokenizer().save_pretrained(directory)
    vision, language = model.config.vision_config, model.config.text_config.to_dict()
    side = sizes["frame_side"] or SIDE
    (directory / "configuration_internvl_chat.py").write_text(CHAT_CONFIG)
    config = {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "dtype": "float32",
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": side, "max_dynamic_patch": 2,
        "min_dynamic_patch": 1, "ps_version": "v2", "select_layer": -1, "use_thumbnail": True,
        "tie_word_embeddings": False, "llm_config": language | {"architectures": ["Qwen2ForCausalLM"]},
        "vision_config": {
            "model_type": "intern_vit_6b", "hidden_size": vision.hidden_size, "image_size": side, "patch_size": PATCH,
            "num_hidden_layers": vision.num_hidden_layers, "num_attention_heads": vision.num_attention_heads,
            "intermediate_size": vision.intermediate_size, "hidden_act": "gelu", "norm_type": "layer_norm",
            "layer_norm_eps": vision.layer_norm_eps, "qkv_bias": True, "qk_normalization": False,
            "initializer_factor": 1.0,
        },
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"do_sample": False, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_file(_chat_weights(model.state_dict()), directory / "model.safetensors", metadata={"format": "pt"})


def _chat_tokenizer() -> Any:
    # The ids are those of the native tokenizer; "<video>" and "<image>" are plain text to this format.
    tokens = [*TEXT_TOKENS, "<img>", "</img>", "<IMG_CONTEXT>", "<unused>", "<|video_pad|>"]
    return make_tokenizer(tokens, CHAT_TEMPLATE)


CHAT_NAMES = (
    ("model.vision_tower.encoder.layer.", "vision_model.encoder.layers."),
    ("model.vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    ("model.vision_tower.embeddings.patch_embeddings.projection.", "vision_model.embeddings.patch_embedding."),
    ("model.vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding"),
    (".attention.projection_layer.", ".attn.proj."),
    (".layernorm_before.", ".norm1."), (".layernorm_after.", ".norm2."), (".lambda_1", ".ls1"), (".lambda_2", ".ls2"),
    ("model.multi_modal_projector.layer_norm.", "mlp1.0."), ("model.multi_modal_projector.linear_1.", "mlp1.1."),
    ("model.multi_modal_projector.linear_2.", "mlp1.3."), ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)  # fmt: skip


def _chat_weights(native: dict[str, Any]) -> dict[str, Any]:
    import torch

    chat = {}
    for name, weight in native.items():
        if ".attention.k_proj." in name or ".attention.v_proj." in name:
            continue
        if ".attention.q_proj." in name:
            parts = [native[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            name, weight = name.replace("attention.q_proj", "attn.qkv"), torch.cat(parts)
        for old, new in CHAT_NAMES:
            name = name.replace(old, new)
        chat[name] = weight.contiguous()
    return chat


FAMILIES = {
    "internvl_chat": FamilyCase(
        tiny=TinyFamily(
            architecture="InternVLChatModel",
            config_class="InternVLConfig",
            processor_class="InternVLProcessor",
            vision=internvl.vision,
            text=text,
            make=make,
        ),
        reference="tests.reference.frames:FramesReference",
        facts=Facts(
            frame_size=(112, 112),
            grid=(4, 4),
            whole_frames=True,
            makes_frames=True,
            rotary=frozenset({"DynamicNTKScalingRotaryEmbedding"}),
            remote_code=True,
        ),
    ),
}
