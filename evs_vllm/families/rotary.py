# SPDX-License-Identifier: Apache-2.0
"""How many position IDs a language model's rotary cache holds."""

from collections.abc import Mapping
from typing import Any

MROPE_CACHE_FACTOR = 4
"""Multiple of max_position_embeddings at which M-RoPE's cos/sin cache is made: vLLM's default for most families
(vllm/model_executor/layers/rotary_embedding/mrope.py, positions_factor), with `compat.widen_rotary_caches` for all of
ours."""


def rotary_length(text_config: Any, max_model_len: int) -> int:
    """Number of position IDs that the cos/sin cache of a language model with 1-D RoPE holds in vLLM.

    Args:
        text_config: The language model's Hugging Face config.
        max_model_len: The engine's context length.

    Returns:
        As ``get_rope`` in vllm/model_executor/layers/rotary_embedding does: YaRN's cache is as long as the context that
        it was scaled to, linear scaling's is longer by its factor, the others' is the model's context. LongRoPE has two
        caches, one behind the other, and an engine uses one: the short one if its context fits into that. Behind its
        end the other one begins, so a larger ID would silently be another angle. Where layers differ, the shortest.
    """
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    kinds = [each for each in rope.values() if isinstance(each, Mapping)] or [rope]
    return min(_rows_of_cache(each, text_config.max_position_embeddings, max_model_len) for each in kinds)


def _rows_of_cache(rope: Mapping[str, Any], length: int, max_model_len: int) -> int:
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor", 1)
    if kind == "longrope":
        short: int = rope["original_max_position_embeddings"]
        return length if max_model_len > short else short
    if kind == "yarn":
        length = rope.get("original_max_position_embeddings", length)
    return int(length * factor) if kind in ("yarn", "linear") else length
