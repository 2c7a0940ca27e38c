# SPDX-License-Identifier: Apache-2.0
"""A tiny Gemma 4, with a tower or unified.

As in the small released models, layers with a sliding window and layers with another head size and rotary embedding
take turns, the last ones use keys and values of earlier ones, and every token has another embedding in each layer.
"""

from pathlib import Path
from typing import Any

from evs_vllm.testing import TinyFamily
from evs_vllm.testing.tokenizer import make_tokenizer
from evs_vllm.testing.weights import empty_model, fill_weights
from tests.families.facts import Facts, FamilyCase
from tests.families.whole_frames import CHAT_TEMPLATE, TEXT_TOKENS

PATCH, POOL, TOKENS = 4, 3, 70
"""A token is 12 x 12 pixels. vLLM resizes every frame to at most 70 tokens, whatever the config says."""
SIZE = (7 * PATCH * POOL, 10 * PATCH * POOL)
"""Height and width of a frame of exactly 70 tokens, which is not resized."""

TOKEN_NAMES = {
    "boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>", "boa_token": "<|audio>",
    "eoa_token": "<audio|>", "audio_token": "<|audio|>",
}  # fmt: skip
VIDEO = "<|video|>"


def vision(s: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": s["vision_hidden"], "intermediate_size": 2 * s["vision_hidden"],
        "num_hidden_layers": s["vision_layers"], "num_attention_heads": s["vision_hidden"] // 32,
        "num_key_value_heads": s["vision_hidden"] // 32, "head_dim": 32, "patch_size": PATCH,
        "pooling_kernel_size": POOL, "position_embedding_size": 256, "default_output_length": TOKENS,
    }  # fmt: skip


def patch_embedding(s: dict[str, Any]) -> dict[str, Any]:
    return {
        "patch_size": PATCH, "pooling_kernel_size": POOL, "mm_embed_dim": s["vision_hidden"], "mm_posemb_size": 256,
        "output_proj_dims": s["vision_hidden"], "num_soft_tokens": TOKENS,
    }  # fmt: skip


def text(s: dict[str, Any]) -> dict[str, Any]:
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(s["layers"] + 1)]
    return {
        "hidden_size": s["hidden_size"], "intermediate_size": 2 * s["hidden_size"], "num_hidden_layers": len(kinds),
        "num_attention_heads": s["heads"], "num_key_value_heads": s["kv_heads"],
        "head_dim": s["hidden_size"] // s["heads"], "global_head_dim": 2 * s["hidden_size"] // s["heads"],
        "max_position_embeddings": s["max_position_embeddings"], "layer_types": kinds, "sliding_window": 96,
        "num_kv_shared_layers": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2,
        "tie_word_embeddings": False, "use_bidirectional_attention": None,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": s["rope_theta"]},
            "full_attention": {
                "rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 100 * s["rope_theta"],
            },
        },
    }  # fmt: skip


def make(directory: Path, row: TinyFamily, sizes: dict[str, Any], seed: int) -> None:
    """Writes the model."""
    import torch
    import transformers as t

    template = CHAT_TEMPLATE.replace("<image>", TOKEN_NAMES["image_token"]).replace("<video>", VIDEO)
    tokenizer = make_tokenizer([*TEXT_TOKENS, *TOKEN_NAMES.values(), VIDEO], template, **TOKEN_NAMES)
    shape = {"patch_size": PATCH, "pooling_kernel_size": POOL, "max_soft_tokens": TOKENS}
    kind = row.config_class.removesuffix("Config")
    getattr(t, row.processor_class)(
        getattr(t, f"{kind}AudioFeatureExtractor")(), getattr(t, f"{kind}ImageProcessor")(**shape), tokenizer,
        getattr(t, f"{kind}VideoProcessor")(**shape), chat_template=template, image_seq_length=TOKENS,
    ).save_pretrained(directory)  # fmt: skip

    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in TOKEN_NAMES.items()}
    ids["eoa_token_index"] = ids.pop("eoa_token_id")
    own = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": len(tokenizer)} if kind == "Gemma4" else {}
    config = getattr(t, row.config_class)(
        text_config=row.text(sizes) | own | {"vocab_size": len(tokenizer)},
        vision_config=row.vision(sizes), audio_config=None, tie_word_embeddings=False, dtype="float32",
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO), **ids,
    )  # fmt: skip
    config.architectures = [row.architecture]
    model = empty_model(getattr(t, row.architecture), config)
    fill_weights(model, tokenizer, seed)
    with torch.no_grad():
        for name, weight in (*model.named_parameters(), *model.named_buffers()):
            if "position_embedding_table" in name or "pos_embedding" in name:
                weight *= 0.5 / float(weight.std())
            elif name.endswith("embed_tokens.weight"):  # the model multiplies by the root of the width
                weight /= sizes["hidden_size"] ** 0.5
            elif name.endswith(("q_norm.weight", "k_norm.weight")):  # it does not divide by the root of the head size
                weight *= 0.6
            elif name.endswith("layer_scalar"):
                weight.fill_(1.0)
    model.generation_config = t.GenerationConfig(do_sample=False, bos_token_id=0, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(directory)


FACTS = Facts(
    frame_size=SIZE,
    grid=(7, 10),
    # For layers with a sliding window, vLLM caches only the last blocks of a prompt: a clip of 9 frames ends within the
    # block in which its prompt does. The layers' blocks hold 32 and 64 tokens.
    long=9,
    block_size=64,
    step_tokens=256,
    whole_frames=True,
    rotary=frozenset({"RotaryEmbedding", "Gemma4RotaryEmbedding"}),
)

FAMILIES = {
    "gemma4": FamilyCase(
        tiny=TinyFamily(
            architecture="Gemma4ForConditionalGeneration",
            config_class="Gemma4Config",
            processor_class="Gemma4Processor",
            vision=vision,
            text=text,
            make=make,
        ),
        reference="tests.reference.gemma4:Gemma4Reference",
        facts=FACTS,
    ),
    "gemma4_unified": FamilyCase(
        tiny=TinyFamily(
            architecture="Gemma4UnifiedForConditionalGeneration",
            config_class="Gemma4UnifiedConfig",
            processor_class="Gemma4UnifiedProcessor",
            vision=patch_embedding,
            text=text,
            make=make,
        ),
        reference="tests.reference.gemma4:Gemma4Reference",
        facts=FACTS,
    ),
}
