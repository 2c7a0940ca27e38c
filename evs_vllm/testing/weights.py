# SPDX-License-Identifier: Apache-2.0
"""Random weights of tiny models, in memory and as released checkpoints hold them."""

import math
from pathlib import Path
from typing import Any


def empty_model(cls: Any, config: Any) -> Any:
    """An fp32 instance of a model class of transformers, without the slow random weights that it begins with."""
    import torch

    with torch.device("meta"):
        model = cls._from_config(config, dtype=torch.float32)
    return model.to_empty(device="cpu")


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


def transpose_experts(path: Path) -> None:
    """Rewrites a checkpoint's expert weights (expert, out, in) as (expert, in, out)."""
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    stored = {name: w.mT.contiguous() if "experts." in name else w for name, w in weights.items()}
    save_file(stored, path, metadata={"format": "pt"})
