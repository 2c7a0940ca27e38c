# SPDX-License-Identifier: Apache-2.0
"""Ways to choose which tokens of a clip stay: one object each, in one table, `SELECTIONS`.

A `Selection` returns the tokens. `Anchored` compares each token with the last one kept at its place, by a descriptor; a
`Scorer` says how much each token is worth by itself. The rules of budget, threshold and ties are written here once.
CONTRIBUTING.md, "Add a selection", says how to add one. The choice is made from pixels: the prompt is laid out before
the vision tower runs, so scores from the tower's features do not fit here.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch

import evs_kernels
from evs_vllm.config import EVSConfig
from evs_vllm.core.budget import token_budget, tokens_saved
from evs_vllm.core.causal import NOISE_PARTS, Distances, FixedScores, Judge, spend
from evs_vllm.core.clip import Anchors, Clip
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
        noise: The change, as ``threshold`` counts it, below which a token of a clip that goes on shows nothing new; 0
            where any change does.
        high_threshold: A threshold that leaves little beside unit 0, where a slider may end.
    """

    name: str
    reads_pixels: bool = True
    stock_count: bool = False
    threshold_counts: str
    noise: float = 0
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
            clip: The clip; what earlier clips left (`Clip.previous`) comes first, as one more unit.

        Returns:
            On the clip's device, for T units or T + 1: (T, P) int32 scores, of which the highest stay, or (T, P, F)
            uint8 descriptors, whose L1 distance from the last kept one at their place counts.

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
        size = clip.num_units, clip.tokens_per_unit
        if clip.previous is None:
            return token_budget(*size, config, stock_count=self.stock_count)
        return token_budget(*size, config, True, self.stock_count, clip.previous.saved)

    def allowance(self, clip: Clip, config: EVSConfig) -> list[int]:
        """(T,) for each unit what `budget` would be if the clip ended with it."""
        return [self.budget(replace(clip, grid=(t + 1, *clip.grid[1:])), config) for t in range(clip.num_units)]

    def spend(self, judge: Judge, clip: Clip, config: EVSConfig, level: Callable[[float], float]) -> torch.Tensor:
        """What `select` returns with the causal budget (`evs_vllm.core.causal`), on the CPU.

        Args:
            judge: Scores the clip's units, higher being better, and of unit t by no later ones.
            clip, config: As for `select`.
            level: The score that a number of the option ``threshold`` means.
        """
        weights = unit_weights(clip, config)
        kept = spend(
            judge,
            clip.tokens_per_unit,
            self.allowance(clip, config),
            whole_first=clip.previous is None,
            noise=level(self.noise / NOISE_PARTS),
            level=level(config.threshold) if config.threshold else None,
            most=config.max_tokens,
            least=config.min_tokens_per_unit,
            weights=None if weights is None else weights.tolist(),
        )
        return torch.from_numpy(kept)

    def looks(self, clip: Clip) -> torch.Tensor:
        """(T, P, F) uint8 on the clip's device: what each token looks like to later clips of a stream (`Anchors`).

        What is in `SELECTIONS` has it.

        Raises:
            UnsupportedError: It compares by something else, so that its clips cannot go on from others.
        """
        raise UnsupportedError(
            f"The selection {self.name} cannot go on from one clip to the next. Choose one of {', '.join(SELECTIONS)}."
        )

    def changed(self, clip: Clip, config: EVSConfig) -> int:
        """How many tokens of a clip that goes on from others (`Clip.previous`) show something new.

        Such a token differs from what stands for its place, if all such tokens are kept, by the option ``threshold`` or
        more, or where that is not set by `noise`. What is in `SELECTIONS` has it.
        """
        raise UnsupportedError(f"The selection {self.name} cannot go on from one clip to the next.")

    def anchors(self, kept: torch.Tensor, clip: Clip, config: EVSConfig) -> Anchors:
        """What a clip of a stream leaves behind for the next one.

        Args:
            kept: (K,) int64, sorted indices of its tokens that stay.
            clip, config: As for `select`.

        Returns:
            Of each place what its last kept token looks like; where none of this clip stays, what was there before. On
            the CPU, so that it can be kept.
        """
        looks, places = self.looks(clip), clip.tokens_per_unit
        kept = kept.to(looks.device)
        latest = torch.full((places,), -1, dtype=torch.int64, device=looks.device)
        latest.scatter_reduce_(0, kept % places, kept // places, "amax")
        shown = looks[latest.clamp(min=0), torch.arange(places, device=looks.device)].cpu()
        saved = 0
        if clip.previous is not None:
            shown = torch.where(latest.cpu()[:, None] >= 0, shown, clip.previous.looks)
            saved = clip.previous.saved
        left = tokens_saved(clip.num_units, places, config, len(kept), saved)
        return Anchors(shown, (clip.grid[1], clip.grid[2]), left)

    def looks_and_before(self, clip: Clip) -> torch.Tensor:
        """`looks`; of a clip that goes on from others after `Anchors.looks` as one more unit."""
        looks = self.looks(clip)
        if clip.previous is None:
            return looks
        return torch.cat([clip.previous.looks.to(looks.device)[None], looks])


class Anchored(Selection):
    """Compares a token with the last one kept at its place, which is what the model was last shown of it.

    Compared with the unit before, a slow change never counts, and everything after a cut is old news one unit later.
    With a rate, tokens are chosen so that what is dropped differs least, in sum, from what was last shown of its place
    (`evs_kernels.select_hold`). With a threshold, nothing that is dropped differs from that by the threshold or more
    (`evs_kernels.select_anchored`), unless ``max_tokens`` bites.

    Of a clip that goes on from others a rate is an upper bound: no more tokens are kept than show something new
    (`changed`), so that a still scene costs nothing.

    Args:
        descriptor: What tokens are compared by; the selection has its name.
        noise: See `Selection`.
        high_threshold: Where a slider for thresholds ends.
    """

    reads_pixels = False

    def __init__(self, descriptor: Descriptor, noise: float = 0, high_threshold: float = 100) -> None:
        self.name, self.descriptor, self.noise = descriptor.name, descriptor, noise
        self.threshold_counts, self.high_threshold = f"change in {descriptor.counts}", high_threshold

    def looks(self, clip: Clip) -> torch.Tensor:
        return self.descriptor.describe(clip)

    def evidence(self, clip: Clip) -> torch.Tensor:
        return self.looks_and_before(clip)

    def unit(self, clip: Clip) -> float:
        return self.descriptor.unit

    def changed(self, clip: Clip, config: EVSConfig) -> int:
        level = self._level(config.threshold or self.noise)
        kept = evs_kernels.select_anchored(self.evidence(clip), threshold=level).indices
        return len(kept) - clip.tokens_per_unit

    def _level(self, threshold: float) -> int:
        return max(1, math.ceil(exact(threshold) * exact(self.descriptor.unit)))

    def select(self, clip: Clip, config: EVSConfig) -> torch.Tensor:
        if config.budget == "causal":
            shown = None if clip.previous is None else clip.previous.looks.numpy()
            looks = self.looks(clip)
            return self.spend(Distances(looks.cpu().numpy(), shown), clip, config, self._level).to(looks.device)
        descriptors = self.evidence(clip)
        before = clip.tokens_per_unit if clip.previous is not None else 0
        budget = before + self.budget(clip, config)
        least = config.min_tokens_per_unit
        if config.threshold:
            level, most = self._level(config.threshold), budget if config.max_tokens else None
            kept = evs_kernels.select_anchored(descriptors, most, threshold=level, min_per_unit=least).indices
        else:
            if before:
                budget = min(budget, before + self.changed(clip, config))
            weights = unit_weights(clip, config)
            kept = evs_kernels.select_hold(descriptors, budget, min_per_unit=least, weights=weights).indices
        kept = kept[before:] - before
        if len(kept):
            return kept
        # A prompt needs a token of the clip, also where nothing changed.
        return evs_kernels.select_hold(descriptors, before + 1).indices[before:] - before


class Scorer(Selection):
    """A selection by scores: the highest ones within a budget, or all that reach a threshold.

    Of a clip that goes on from others a rate is an upper bound: no more tokens are kept than show something new
    (`changed`). Its unit 0 is compared with the pixels that were last kept at each place.
    """

    @abstractmethod
    def score(self, tokens: torch.Tensor) -> torch.Tensor:
        """Says how much each token is worth.

        Args:
            tokens: (T, P, D) uint8, CPU or CUDA, contiguous.

        Returns:
            (T, P) int32 or float32 on the same device; the higher stays. Unit 0 has nothing to be compared with and
            scores 0. For the causal budget, the scores of a unit depend on no later one.
        """

    @abstractmethod
    def level(self, threshold: float, values: int) -> float:
        """The score from which a token stays under the option ``threshold``, for tokens of `values` pixel values.

        It is proportional to `threshold`, but for being rounded up where scores are integers.
        """

    def looks(self, clip: Clip) -> torch.Tensor:
        return clip.tokens

    def evidence(self, clip: Clip) -> torch.Tensor:
        return self.score(self.looks_and_before(clip))

    def changed(self, clip: Clip, config: EVSConfig) -> int:
        level = self.level(config.threshold or self.noise, clip.tokens.shape[-1])
        scores = self.evidence(clip)[1:]
        return int(((scores >= level) & (scores > 0)).sum())

    def unit(self, clip: Clip) -> float:
        return self.level(1, clip.tokens.shape[-1])

    def top(self, tokens: torch.Tensor, budget: int, min_per_unit: int) -> torch.Tensor:
        """Sorted indices of unit 0 and of the highest scores, `budget` in all; ties go to the lower index."""
        return evs_kernels.select_topk(self.score(tokens), budget, min_per_unit=min_per_unit).indices

    def select(self, clip: Clip, config: EVSConfig) -> torch.Tensor:
        if config.budget == "causal":
            size, scores = clip.tokens.shape[-1], self.evidence(clip)
            judge = FixedScores(scores[len(scores) - clip.num_units :].cpu().numpy())
            return self.spend(judge, clip, config, lambda threshold: self.level(threshold, size)).to(scores.device)
        # What was there before stands as one more unit in front, which is then taken off again.
        tokens, before = self.looks_and_before(clip), 0 if clip.previous is None else clip.tokens_per_unit
        least, budget = config.min_tokens_per_unit, before + self.budget(clip, config)
        if before and not config.threshold:
            budget = min(budget, before + self.changed(clip, config))
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
            kept = evs_kernels.select_topk(weighted.to(scores.dtype), budget, min_per_unit=least).indices
        else:
            kept = self.top(tokens, budget, least)
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
    noise = 10
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


LEARNED = Anchored(Learned(), noise=20, high_threshold=100)

SELECTIONS: dict[str, Selection] = {
    selection.name: selection
    for selection in (LEARNED, Anchored(Contrast(), noise=4, high_threshold=200), PixelChange())
}
