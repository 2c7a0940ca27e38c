# SPDX-License-Identifier: Apache-2.0
"""Ways to choose which tokens of a clip stay: one object each, in one table, `SELECTIONS`.

A `Selection` returns the tokens. `Anchored` compares each token with the last one kept at its place, by a descriptor; a
`Scorer` says how much each token is worth by itself. The rules of budget, threshold and ties are written here once.
CONTRIBUTING.md, "Add a selection", says how to add one. The choice is made from pixels: the prompt is laid out before
the vision tower runs, so scores from the tower's features do not fit here.
"""

import math
from abc import ABC, abstractmethod

import torch

import evs_kernels
from evs_vllm.config import EVSConfig
from evs_vllm.core.budget import token_budget
from evs_vllm.core.clip import Clip
from evs_vllm.core.descriptors import Contrast, Descriptor
from evs_vllm.core.focus import SIXTEENTHS, unit_weights
from evs_vllm.core.learned import Learned
from evs_vllm.errors import ConfigError, UnsupportedError
from evs_vllm.options import exact


class Selection(ABC):
    """A way to choose tokens.

    Attributes:
        name: Its name in `SELECTIONS`. It is part of the cache identity: a method that changes needs another name.
        reads_pixels: Whether it looks at `Clip.tokens`. Others see the low-resolution picture of a clip alone
            (`evs_vllm.core.descriptors.low_resolution`), for which resized pixels need not exist.
        stock_count: Whether it keeps exactly the number of tokens that vLLM's ``--video-pruning-rate`` keeps, of short
            clips too (see `token_budget`).
        threshold_counts: What the option ``threshold`` counts, in words.
        high_threshold: A threshold that leaves little beside unit 0, where a slider may end.
    """

    name: str
    reads_pixels: bool = True
    stock_count: bool = False
    threshold_counts: str
    high_threshold: float = 100

    @abstractmethod
    def select(self, clip: Clip, config: EVSConfig) -> torch.Tensor:
        """Chooses the tokens that stay.

        Args:
            clip: The clip.
            config: Active settings (`EVSConfig.active`).

        Returns:
            (K,) int64 on the clip's device, sorted flat indices ``t*P + p``, at least one. Of a clip without
            `Clip.previous`, all of unit 0 is among them if the vision tower is to reuse keys and values.
        """

    def evidence(self, clip: Clip) -> torch.Tensor:
        """All that the choice is made from, for whoever shows a clip and lets its settings be moved.

        What is in `SELECTIONS` has it.

        Args:
            clip: The clip; what `Clip.previous` holds comes first, as one more unit.

        Returns:
            On the clip's device, (T, P) int32 scores, of which the highest stay, or (T, P, F) uint8 descriptors, whose
            L1 distance from the last kept one at their place counts.

        Raises:
            UnsupportedError: It chooses by something else.
        """
        raise UnsupportedError(
            f"The selection {self.name} has no scores or descriptors to show. Choose one of {', '.join(SELECTIONS)}."
        )

    def unit(self, clip: Clip) -> float:
        """The score or distance, as in `evidence`, that the option ``threshold`` counts as 1; an exact decimal.

        Raises:
            UnsupportedError: As `evidence`.
        """
        raise UnsupportedError(f"The selection {self.name} has no unit of the option threshold to show.")

    def budget(self, clip: Clip, config: EVSConfig) -> int:
        """`token_budget` of a clip."""
        continues = clip.previous is not None
        return token_budget(clip.num_units, clip.tokens_per_unit, config, continues, self.stock_count)


class Anchored(Selection):
    """Compares a token with the last one kept at its place, which is what the model was last shown of it.

    Compared with the unit before, a slow change never counts, and everything after a cut is old news one unit later.
    With a rate, tokens are chosen so that what is dropped differs least, in sum, from what was last shown of its place
    (`evs_kernels.select_hold`). With a threshold, nothing that is dropped differs from that by the threshold or more
    (`evs_kernels.select_anchored`), unless ``max_tokens`` bites.

    Args:
        descriptor: What tokens are compared by; the selection has its name.
        high_threshold: Where a slider for thresholds ends.
    """

    reads_pixels = False

    def __init__(self, descriptor: Descriptor, high_threshold: float) -> None:
        self.name, self.descriptor = descriptor.name, descriptor
        self.threshold_counts, self.high_threshold = f"change in {descriptor.counts}", high_threshold

    def evidence(self, clip: Clip) -> torch.Tensor:
        return self.descriptor.describe(clip)

    def unit(self, clip: Clip) -> float:
        return self.descriptor.unit

    def select(self, clip: Clip, config: EVSConfig) -> torch.Tensor:
        descriptors = self.evidence(clip)
        before = clip.tokens_per_unit if clip.previous is not None else 0
        budget = before + self.budget(clip, config)
        least = config.min_tokens_per_unit
        if config.threshold:
            level = max(1, math.ceil(exact(config.threshold) * exact(self.unit(clip))))
            most = budget if config.max_tokens else None
            kept = evs_kernels.select_anchored(descriptors, most, threshold=level, min_per_unit=least).indices
        else:
            weights = unit_weights(clip, config)
            kept = evs_kernels.select_hold(descriptors, budget, min_per_unit=least, weights=weights).indices
        kept = kept[before:] - before
        if len(kept):
            return kept
        # A prompt needs a token of the clip, also where nothing changed.
        return evs_kernels.select_hold(descriptors, before + 1).indices[before:] - before


class Scorer(Selection):
    """A selection by scores: the highest ones within a budget, or all that reach a threshold."""

    @abstractmethod
    def score(self, tokens: torch.Tensor) -> torch.Tensor:
        """Says how much each token is worth.

        Args:
            tokens: (T, P, D) uint8, CPU or CUDA, contiguous.

        Returns:
            (T, P) int32 or float32 on the same device; the higher stays. Unit 0 has nothing to be compared with and
            scores 0.
        """

    @abstractmethod
    def level(self, threshold: float, values: int) -> float:
        """The score from which a token stays under the option ``threshold``, for tokens of `values` pixel values.

        It is proportional to `threshold`, but for being rounded up where scores are integers.
        """

    def evidence(self, clip: Clip) -> torch.Tensor:
        return self.score(clip.tokens if clip.previous is None else torch.cat([clip.previous[None], clip.tokens]))

    def unit(self, clip: Clip) -> float:
        return self.level(1, clip.tokens.shape[-1])

    def top(self, tokens: torch.Tensor, budget: int, min_per_unit: int) -> torch.Tensor:
        """Sorted indices of unit 0 and of the highest scores, `budget` in all; ties go to the lower index."""
        return evs_kernels.select_topk(self.score(tokens), budget, min_per_unit=min_per_unit).indices

    def select(self, clip: Clip, config: EVSConfig) -> torch.Tensor:
        tokens, before = clip.tokens, 0
        if clip.previous is not None:
            # What was there before stands as one more unit in front, which is then taken off again.
            tokens, before = torch.cat([clip.previous[None], tokens]), clip.tokens_per_unit
        least = config.min_tokens_per_unit
        if config.threshold:
            kept = evs_kernels.select_threshold(
                self.score(tokens),
                self.level(config.threshold, tokens.shape[-1]),
                min_per_unit=least,
                max_tokens=None if config.max_tokens is None else config.max_tokens + before,
            ).indices
        elif (weights := unit_weights(clip, config)) is not None:
            scores = self.score(tokens)
            weighted = scores.double() * weights.to(scores.device)[:, None] / SIXTEENTHS
            kept = evs_kernels.select_topk(
                weighted.to(scores.dtype), self.budget(clip, config) + before, min_per_unit=least
            ).indices
        else:
            kept = self.top(tokens, self.budget(clip, config) + before, least)
        kept = kept[before:] - before
        # A prompt needs a token of the clip, also where nothing changed.
        return kept if len(kept) else self.score(tokens)[1:].flatten().argmax()[None]


class PixelChange(Scorer):
    """How much a token's pixels changed since the unit before, summed.

    Source: Efficient Video Sampling, arXiv 2510.14624, RGB mode: the L1 distance between the pixels of a token's patch
    and of the same patch one unit earlier, before the vision encoder.
    """

    name = "paper"
    stock_count = True
    threshold_counts = "mean pixel change"
    high_threshold = 64

    def score(self, tokens: torch.Tensor) -> torch.Tensor:
        """(T, P) int32: ``score[t, p] = sum_d |tokens[t, p, d] - tokens[t-1, p, d]|``."""
        return evs_kernels.temporal_score(tokens)

    def level(self, threshold: float, values: int) -> float:
        """A threshold is a mean change in grey levels, 0..255; in integers, score >= threshold * D."""
        return math.ceil(exact(threshold) * values)

    def top(self, tokens: torch.Tensor, budget: int, min_per_unit: int) -> torch.Tensor:
        # Scores and selects in one pass over the pixels, to the same indices.
        return evs_kernels.prune_topk(tokens, budget, min_per_unit=min_per_unit).indices


def named_selection(name: str) -> Selection:
    """The selection of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in SELECTIONS:
        raise ConfigError(f"selection got {name!r}; allowed: {' or '.join(SELECTIONS)}.")
    return SELECTIONS[name]


LEARNED = Anchored(Learned(), high_threshold=100)

SELECTIONS: dict[str, Selection] = {
    selection.name: selection for selection in (LEARNED, Anchored(Contrast(), high_threshold=200), PixelChange())
}
