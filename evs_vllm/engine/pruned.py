# SPDX-License-Identifier: Apache-2.0
"""A pruned clip as vLLM's prompt updates and placeholders know it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo, PromptUpdateDetails

from evs_vllm.core.plan import BoolArray, RetentionPlan
from evs_vllm.core.prompt import pruned_clip
from evs_vllm.engine.plan_field import PrunedRange


@dataclass
class PrunedUpdateDetails(PromptUpdateDetails):
    """A clip's shortened placeholders; it stays in the processor cache, so cache hits know the numbers too.

    Attributes:
        plan: The clip's plan.
    """

    plan: RetentionPlan = field(kw_only=True)


@dataclass
class _PrunedFeatures(PlaceholderFeaturesInfo):
    """Where a pruned clip stands, before vLLM makes a range of it."""

    plan: RetentionPlan = field(kw_only=True)

    def to_range(self) -> PrunedRange:
        stock = super().to_range()
        return PrunedRange(stock.offset, stock.length, stock.is_embed, self.plan.extra_positions)


def placed(info: PlaceholderFeaturesInfo, contents: Sequence[Any]) -> PlaceholderFeaturesInfo:
    """Where a clip stands, with its plan if it is pruned.

    Args:
        info: vLLM's.
        contents: The contents of the prompt updates of all clips.
    """
    content = contents[info.item_idx]
    return _PrunedFeatures(**vars(info), plan=content.plan) if isinstance(content, PrunedUpdateDetails) else info


class _FixedMask:
    """An ``is_embed`` callable that gives the same mask whatever it is asked for."""

    def __init__(self, mask: BoolArray) -> None:
        self._mask = torch.from_numpy(mask)

    def __call__(self, full: list[int]) -> torch.Tensor:
        return self._mask


def full_mask(stock: PromptUpdateDetails) -> BoolArray | None:
    """Which tokens of the unpruned sequence are embeddings, or None where vLLM takes all for such.

    Evaluated on that sequence: some families' masks are precomputed and ignore their argument.
    """
    return None if stock.is_embed is None else stock.is_embed(stock.full).numpy()


def shortened(stock: PromptUpdateDetails, plan: RetentionPlan) -> PrunedUpdateDetails:
    """What stands in the prompt for a clip of which stays what `plan`, with its layout, says."""
    ids, embeds = pruned_clip(plan)
    return PrunedUpdateDetails(ids, None if stock.is_embed is None else _FixedMask(embeds), plan=plan)
