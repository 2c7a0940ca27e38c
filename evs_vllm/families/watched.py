# SPDX-License-Identifier: Apache-2.0
"""What processors that are watched have in common: what is noted, who is known, what becomes of a byte.

`evs_vllm.families.front_end` is where it is used.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from evs_vllm.families.seen import Seen, Squares

PROVEN_ROWS = ("Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor", "Glm4vVideoProcessor", "Glm46VVideoProcessor")
"""Classes of transformers whose pixel rows `evs_kernels.resize_patches` makes: resized bicubically with antialiasing,
then cut into patches in the order of Qwen2-VL."""

PROVEN_FRAMES = ("InternVLVideoProcessor", "LlavaOnevisionVideoProcessor")
"""Classes, of transformers and of vLLM, whose whole frames it makes: squashed to a square, bicubically with
antialiasing."""

PROVEN = (*PROVEN_ROWS, *PROVEN_FRAMES, "Ovis2_5Processor")
"""Tests compare each with what is made here, and `why_not` does where it is installed."""

BICUBIC = (3, "bicubic")
"""A resampling filter, as Pillow and as torchvision name it."""


@dataclass
class Watch:
    """What `watching` has seen.

    Attributes:
        leave_rows: Whether processors may leave out pixels.
        squares: What the model's frames are, if its processor makes whole ones.
        seen: The videos in the order in which they were processed.
    """

    leave_rows: bool
    squares: Squares | None = None
    seen: list[Seen] = field(default_factory=list)
    unpermuted: bool = False
    """Whether the frames of the call that is running are views, which its processor would have copied."""


_watch: ContextVar[Watch | None] = ContextVar("evs_watch", default=None)


@contextmanager
def watching(leave_rows: bool = False, squares: Squares | None = None) -> Iterator[Watch]:
    """Notes what watched processors are given in this context.

    Args:
        leave_rows: Whether processors that are proven equal leave out their pixels: the field then has the right number
            of rows and no columns.
        squares: What the model's frames are, if its processor makes whole ones; without it their videos are not noted.
    """
    outer, watch = _watch.get(), Watch(leave_rows, squares)
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)
        if outer is not None:
            outer.seen += watch.seen


def current_watch() -> Watch | None:
    """That of the context, if any."""
    return _watch.get()


class Watched:
    """Goes before a video processor's class."""

    _evs_with_cells = False


def stock_of(cls: type) -> type:
    """The class that a watched one stands for; others are their own."""
    return next(base for base in cls.__mro__ if not issubclass(base, Watched))


def bytes_of_colours(video: Any) -> bool:
    """Whether a video is (F, H, W, 3) uint8 frames, at least one."""
    return isinstance(video, np.ndarray) and video.dtype == np.uint8 and video.ndim == 4 and video.shape[3] == 3


def unknown(processor: Any) -> str:
    """Why nothing is known of a processor's pixels, or ""."""
    name = stock_of(type(processor)).__name__
    return "" if name in PROVEN else f"what {name} does with pixels is not known"


OF_LEVELS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
"""What rescales and normalises pixels: arguments of a processor's `rescale_and_normalize`, in its order."""


def attributes_of(processor: Any) -> dict[str, Any]:
    """What a processor of transformers rescales and normalises by, if nobody says otherwise."""
    values = {name: getattr(processor, name) for name in OF_LEVELS}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def levels_of(processor: Any, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What the processor's own arithmetic makes of every value of every colour: (3, 256)."""
    values = torch.arange(256, dtype=torch.uint8).expand(1, 1, 3, 1, 256).contiguous()
    levels: torch.Tensor = processor.rescale_and_normalize(values, *(kwargs[name] for name in OF_LEVELS))
    return levels.view(3, 256)
