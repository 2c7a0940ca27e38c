# SPDX-License-Identifier: Apache-2.0
"""Another set of weights for the tiny model, as a LoRA adapter and as a whole checkpoint with the adapter merged."""

from __future__ import annotations

import shutil
from pathlib import Path


def write_adapter(model: Path, adapter: Path, merged: Path) -> None:
    """Writes an adapter of the language model's attention, and the model whose weights it makes.

    Args:
        model: A tiny model's folder.
        adapter, merged: Folders to write.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    tuned = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    tuned.save_pretrained(adapter)
    shutil.copytree(model, merged)
    whole = tuned.merge_and_unload()
    # Under the names of the checkpoint, which are other than those in memory: what differs is what was merged.
    stored = load_file(model / "model.safetensors")
    new = dict(whole.named_parameters())
    changed = {}
    for name, weight in stored.items():
        tail = name.split("language_model.")[-1].removeprefix("model.")
        if name.endswith(("q_proj.weight", "v_proj.weight")) and "visual" not in name:
            (found,) = [each for key, each in new.items() if key.endswith(tail) and "visual" not in key]
            assert found.shape == weight.shape
            changed[name] = found.detach().clone().contiguous()
    assert changed and all(not torch.equal(stored[name], weight) for name, weight in changed.items())
    save_file({**stored, **changed}, merged / "model.safetensors", metadata={"format": "pt"})
