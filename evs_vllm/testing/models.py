# SPDX-License-Identifier: Apache-2.0
"""Writes tiny models: complete Hugging Face folders."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from evs_vllm.testing.patches import text_config, write_processor
from evs_vllm.testing.qwen import FAMILIES
from evs_vllm.testing.tiny import SIZES, TinyFamily
from evs_vllm.testing.tokenizer import SPECIAL_TOKENS, make_tokenizer
from evs_vllm.testing.weights import empty_model, fill_weights, transpose_experts


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
    return write_model(directory, FAMILIES[family], seed, **overrides)


def write_model(directory: str | Path, row: TinyFamily, seed: int = 0, **overrides: Any) -> Path:
    """As `make_model`, of a family that is told by its row, not by its name in `FAMILIES`."""
    if unknown := set(overrides) - set(SIZES):
        raise ValueError(f"unknown sizes {sorted(unknown)}; expected some of {sorted(SIZES)}")
    import transformers

    sizes, directory = SIZES | overrides, Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if row.make is not None:
        row.make(directory, row, sizes, seed)
        return directory
    names = [*SPECIAL_TOKENS, *(token for token in row.tokens.values() if token not in SPECIAL_TOKENS)]
    tokenizer = make_tokenizer(names, row.chat_template)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in names}
    write_processor(directory, row, tokenizer, sizes["max_tokens_per_frame"])

    text = text_config(row, sizes, tokenizer)
    config = getattr(transformers, row.config_class)(
        text_config=text, vision_config=row.vision(sizes), tie_word_embeddings=False, dtype="float32",
        **{name: ids[token] for name, token in row.tokens.items()},
    )  # fmt: skip
    config.architectures = [row.architecture]
    model = empty_model(getattr(transformers, row.architecture), config)
    fill_weights(model, tokenizer, seed)
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    model.save_pretrained(directory)
    if row.transposed_experts:
        transpose_experts(directory / "model.safetensors")
    return directory


def cached_model(family: str = "qwen2_5_vl", **sizes: Any) -> Path:
    """`make_model` in a folder of the temporary directory, made on first use; the same arguments find it again."""
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
