# SPDX-License-Identifier: Apache-2.0
"""What a model family has to say about itself: where its pixels are, how the clip lies in the prompt.

An adapter holds no state of requests and knows nothing of budgets, plans' making, caches or vLLM's runners.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from evs_vllm.core.clip import Clip
from evs_vllm.core.plan import BoolArray, Layout, RetentionPlan
from evs_vllm.errors import UnsupportedError
from evs_vllm.families.rotary import rotary_length
from evs_vllm.families.seen import Squares


@dataclass(frozen=True)
class PixelStats:
    """How the processor normalised pixels: ``(x / 255 - mean) / std`` per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


PIXEL_KWARGS = (
    "merge_size", "patch_size", "temporal_patch_size", "pooling_kernel_size", "input_data_format",
    "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip
"""Arguments of video processors that decide which pixel value stands where, and so what a token's pixels are.

Others, such as sizes and frame rates, change the clip, and the adapter reads what came of it.
"""


class FamilyAdapter(ABC):
    """The contract of one model family, bound to one model. `item` is always one video's fields, name -> tensor.

    Args:
        hf_config: The model's Hugging Face config.
        processor: Its Hugging Face processor, where pixels are to be read.
        stats: How pixels were normalised, where no processor is at hand to tell.

    Attributes:
        config: The part of the model's config that vLLM's processor of the model works with.
        pixels: The name of the field of a clip's pixels.
        growing_fields: Fields of a clip that get longer with it, in families that have `unit_pixels`: its pixels, its
            grid, and what the prompt spells out. Of clips that begin alike all other fields are equal.
    """

    pixels = "pixel_values_videos"
    growing_fields: tuple[str, ...] = ()

    def __init__(self, hf_config: Any, processor: Any = None, stats: PixelStats | None = None) -> None:
        self.config = self.media_config(hf_config)
        self._processor = processor
        self._stats = stats

    @property
    def judges_source(self) -> bool:
        """Whether the low-resolution picture of a clip is made of its frames before they were resized, as they are
        where `evs_vllm.families.front_end` can watch the family's video processor. Otherwise it is made of the pixels
        that the model sees."""
        return False

    @property
    def squares(self) -> Squares | None:
        """The frames that the model sees, if its processor squashes them to squares; None otherwise. Their blocks are
        tokens if the family has a `reuse_tower`."""
        return None

    @staticmethod
    def media_config(hf_config: Any) -> Any:
        """The part of a model's config that its processor works with; given that part, itself. By default all of it."""
        return hf_config

    @cached_property
    def stats(self) -> PixelStats:
        """How the pixels of a clip were normalised (only used where they arrive normalised)."""
        return self.pixel_stats(self._processor) if self._stats is None else self._stats

    def pixel_stats(self, processor: Any) -> PixelStats:
        """How the family's Hugging Face processor normalises the pixels of a clip."""
        source: Any = getattr(processor, "video_processor", None) or processor.image_processor
        return PixelStats(tuple(source.image_mean), tuple(source.image_std))

    @abstractmethod
    def clip(self, item: Mapping[str, Any]) -> Clip | None:
        """The clip's pixels as one row per token, or None if the item has none (precomputed embeddings)."""

    @abstractmethod
    def frames(self, item: Mapping[str, Any]) -> np.ndarray:
        """The frames as the model sees them: (T * frames per unit, height, width, 3) uint8. For pictures only."""

    def computed_pixels(self, item: Mapping[str, Any], plan: RetentionPlan) -> dict[str, Any]:
        """The pixel fields of `item` reduced to the tokens that the tower computes; other fields are left out.

        By default none: a family without a `reuse_tower` computes every token.
        """
        return {}

    def unit_pixels(self, item: Mapping[str, Any], plan: RetentionPlan) -> Sequence[torch.Tensor]:
        """The pixels of `item`, reduced to the tokens that the tower computes, of each unit by itself.

        Raises:
            UnsupportedError: The family does not know (see `Family.grows`).
        """
        raise UnsupportedError("This model family has no pixels of a unit.")

    def flat_rows(self, batch: Mapping[str, Any], plans: Sequence[RetentionPlan]) -> dict[str, Sequence[int]]:
        """The fields of a batch in which all clips' rows lie one after the other, and how many rows each clip has.

        By default none: a field has one entry a clip.
        """
        return {}

    def select_clips(
        self, batch: Mapping[str, Any], plans: Sequence[RetentionPlan], start: int, stop: int
    ) -> dict[str, Any]:
        """The keyword arguments of ``embed_multimodal`` for clips `start` to `stop` of a batch."""
        bounds = {name: (sum(rows[:start]), sum(rows[:stop])) for name, rows in self.flat_rows(batch, plans).items()}
        return {name: value[slice(*bounds.get(name, (start, stop)))] for name, value in batch.items()}

    def reuse_tower(self, model: Any) -> "ReuseTower | None":
        """The model's vision tower as one that can reuse keys and values, or None if the family has none."""
        return None

    def why_not_reuse(self) -> str:
        """Why the tower of this model cannot reuse keys and values, or ""."""
        if type(self).reuse_tower is FamilyAdapter.reuse_tower:
            return "this model family's vision tower is not supported."
        return ""

    def unsupported_kwargs(self, mm_processor_kwargs: Mapping[str, Any]) -> str:
        """Why clips cannot be pruned under these arguments of the Hugging Face processor, or "".

        By default, those of `PIXEL_KWARGS` that differ from what the processor does anyway; all of them where no
        processor is at hand.
        """
        source: Any = getattr(self._processor, "video_processor", None) or self._processor
        given = dict(mm_processor_kwargs)
        for nested in mm_processor_kwargs.values():  # {"videos_kwargs": {...}}
            given |= nested if isinstance(nested, Mapping) else {}
        changed = [
            name
            for name in PIXEL_KWARGS
            if name in given and (source is None or given[name] != getattr(source, name, None))
        ]
        if not changed:
            return ""
        return f"{', '.join(changed)} would lay out or scale pixels otherwise than the model's files say"

    def max_position(self, max_model_len: int) -> int:
        """Number of position IDs that the language model's cos/sin cache holds. By default that of 1-D RoPE."""
        return rotary_length(self.config.get_text_config(), max_model_len)

    def position_span(self, item: Mapping[str, Any], grid: tuple[int, int, int]) -> int:
        """Position IDs that the unpruned clip takes up: the text after it starts that much later. By default N."""
        return grid[0] * grid[1] * grid[2]

    def layout(self, token_ids: Sequence[int], is_embed: BoolArray | None, clip: Clip) -> Layout:
        """The unpruned layout of the clip's prompt.

        Args:
            token_ids: The placeholder sequence that vLLM's processor made.
            is_embed: Which of them take an embedding row; None means all.
            clip: The clip.

        Returns:
            By default, every embedding row is a token of the grid. Families with extra rows override this.
        """
        ids = np.asarray(token_ids, dtype=np.int64)
        embeds = np.ones(len(ids), dtype=np.bool_) if is_embed is None else np.asarray(is_embed, dtype=np.bool_)
        return Layout(ids, embeds, np.ones(int(embeds.sum()), dtype=np.bool_))


class ReuseTower(ABC):
    """A vision tower that can compute some tokens of a clip and reuse keys and values for the rest.

    Attributes:
        has_varlen: Whether its attention modules follow schedules of the form "varlen" off the CPU. Set by who wraps
            them.
    """

    has_varlen: bool = False

    @abstractmethod
    def attentions(self) -> Iterable[torch.nn.Module]:
        """Its attention modules, one for each layer.

        They are called with query, key, value of (1, rows, heads, head size) or (1, rows, heads * head size). During
        `encode` each has the schedule of its layer on itself (`evs_vllm.core.schedule.scheduled`), which has been
        placed on the device before the first one is called (`evs_vllm.core.schedule.place`).
        """

    @abstractmethod
    def encode(self, batch: Mapping[str, Any], plans: Sequence[RetentionPlan]) -> torch.Tensor:
        """(computed tokens of all clips, hidden) embeddings, in the order of ``plan.computed``."""


def to_uint8(rows: torch.Tensor, channels: int, stats: PixelStats) -> torch.Tensor:
    """Pixel values 0..255 of patch rows, whether or not the processor normalised them.

    Args:
        rows: (N, channels * values) patch rows, channels outermost: uint8, or floating point and normalised.
        channels: Number of colour channels.
        stats: How they were normalised, if they are floating point.

    Returns:
        (N, channels * values) uint8. From float32 exactly the original values; from bf16 to within its rounding.
    """
    if rows.dtype == torch.uint8:
        return rows
    mean = torch.tensor(stats.mean, dtype=torch.float32, device=rows.device).view(1, channels, 1)
    std = torch.tensor(stats.std, dtype=torch.float32, device=rows.device).view(1, channels, 1)
    values = rows.view(rows.shape[0], channels, -1).float() * std + mean
    return (values * 255).round_().clamp_(0, 255).to(torch.uint8).view(rows.shape)
