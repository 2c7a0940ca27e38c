# SPDX-License-Identifier: Apache-2.0
"""Lets the video processors of a model be watched, and makes pixels in their place."""

from functools import wraps
from typing import Any

import torch

from evs_vllm.engine.metrics import metrics
from evs_vllm.families.front_end import watch_processor
from evs_vllm.families.seen import Seen


def rows_of(seen: Seen, tokens: Any, dtype: torch.dtype) -> torch.Tensor:
    """`Seen.rows`, timed."""
    with metrics().rows_time.time():
        return seen.rows(tokens, dtype)


def part_to_watch(processor: Any) -> Any:
    """The part of a Hugging Face processor that sees to videos, or None for a model that takes none."""
    return getattr(processor, "video_processor", processor)


def watch_processors(info: Any) -> None:
    """Lets every video processor that vLLM's `info` hands out be watched; keyword arguments make other ones."""
    get_hf_processor = info.get_hf_processor

    @wraps(get_hf_processor)
    def watched(*args: Any, **kwargs: Any) -> Any:
        processor = get_hf_processor(*args, **kwargs)
        if (to_watch := part_to_watch(processor)) is not None:
            watch_processor(to_watch)
        return processor

    info.get_hf_processor = watched
