# SPDX-License-Identifier: Apache-2.0
"""Ways to choose tokens that stand beside those of the package: what the tower would choose, and what needs no judge.

Each returns (T, P) bool with unit 0 whole and exactly `count` tokens.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Clip
from evs_vllm.core.selection import make_plan

STEPS = 24
"""Of the bisection for the threshold of an anchored selection."""


@dataclass(frozen=True)
class Scene:
    """A clip under a condition.

    Attributes:
        name: Of both, a seed for what is drawn.
        frames: (T, H, W, 3) uint8 RGB.
        clip: The same as tokens.
        features: (T, P, C) fp32 of the full tower.
    """

    name: str
    frames: np.ndarray
    clip: Clip
    features: torch.Tensor


def of_package(scene: Scene, count: int, rate: float, name: str) -> torch.Tensor:
    """A selection of the package, as the plugin uses it.

    Raises:
        RuntimeError: It keeps another number of tokens, or not all of unit 0: figures could not be compared.
    """
    # At 0.95 all of these clips are short (see `token_budget`): they would keep more than is compared.
    plan = make_plan(scene.clip, EVSConfig(rate=rate, selection=name, max_tokens=count))
    kept = torch.from_numpy(plan.mask).view(scene.clip.num_units, -1)
    if plan.num_kept != count or not kept[0].all():
        raise RuntimeError(
            f"{name} keeps {plan.num_kept} tokens and {int(kept[0].sum())} of unit 0 of {scene.name} at rate {rate}; "
            f"{count} and {kept.shape[1]} are compared."
        )
    return kept


CAUSAL, AS_MANY = "learned, causal", "learned, as many"
"""The causal budget keeps a number of its own; beside it stands the budget of the clip with as many tokens."""


def causal_budget(scene: Scene, rate: float) -> dict[str, torch.Tensor]:
    """What the causal budget keeps of a clip at a rate, and what the budget of the clip keeps with as many tokens."""
    causal = make_plan(scene.clip, EVSConfig(rate=rate, budget="causal"))
    as_many = make_plan(scene.clip, EVSConfig(max_tokens=causal.num_kept))
    if as_many.num_kept != causal.num_kept:
        raise RuntimeError(f"{causal.num_kept} and {as_many.num_kept} tokens of {scene.name} cannot be compared.")
    plans = {CAUSAL: causal, AS_MANY: as_many}
    return {way: torch.from_numpy(plan.mask).view(plan.num_units, -1) for way, plan in plans.items()}


def embedding(scene: Scene, count: int) -> torch.Tensor:
    """The paper's embedding mode: the cosine to the unit before, of the tower's features, over the whole clip."""
    scores = 1 - F.cosine_similarity(scene.features[1:], scene.features[:-1], dim=-1)
    kept = torch.zeros(scene.features.shape[:2], dtype=torch.bool)
    kept[0] = True
    kept[1:].view(-1)[scores.flatten().argsort(descending=True, stable=True)[: count - kept.shape[1]]] = True
    return kept


def embedding_anchored(scene: Scene, count: int) -> torch.Tensor:
    """The same against the last kept token of the place: what a judge could do at best that had run the tower."""
    unit = F.normalize(scene.features - scene.features.mean((0, 1)), dim=-1)
    return anchored(lambda t, anchor: 1 - (unit[t] * anchor).sum(-1), unit, count)


def normalised(scene: Scene, count: int) -> torch.Tensor:
    """A judge of pixels in floats: few of them over the local contrast, against the last kept token of the place."""
    values = descriptors(scene.frames, scene.clip.grid[1:])
    return anchored(lambda t, anchor: (values[t] - anchor).abs().sum(-1), values, count)


def at_random(scene: Scene, count: int) -> torch.Tensor:
    """Tokens drawn from all units but the first."""
    kept = torch.zeros(scene.features.shape[:2], dtype=torch.bool)
    kept[0] = True
    generator = torch.Generator().manual_seed(zlib.crc32(scene.name.encode()))
    drawn = torch.randperm(kept[1:].numel(), generator=generator)
    kept[1:].view(-1)[drawn[: count - kept.shape[1]]] = True
    return kept


def whole_units(scene: Scene, count: int) -> torch.Tensor:
    """Whole units, evenly spread: fewer frames. What is left over goes to one more unit, evenly spread over it."""
    kept = torch.zeros(scene.features.shape[:2], dtype=torch.bool)
    units, places = kept.shape
    chosen = -(-count // places)
    for number in range(chosen):
        kept[number * units // chosen] = True
    left_out = chosen * places - count
    kept[(chosen - 1) * units // chosen, torch.arange(left_out) * places // max(1, left_out)] = False
    return kept


def last_units(scene: Scene, count: int) -> torch.Tensor:
    """The end of the clip, beside unit 0."""
    kept = torch.zeros(scene.features.shape[:2], dtype=torch.bool)
    kept[0] = True
    kept.view(-1)[kept.numel() - (count - kept.shape[1]) :] = True
    return kept


WAYS: dict[str, Callable[[Scene, int], torch.Tensor]] = {
    "embedding": embedding,
    "embedding, anchored": embedding_anchored,
    "normalised, in floats": normalised,
    "random": at_random,
    "whole units": whole_units,
    "last units": last_units,
}
"""By name; those of the package stand beside them by their own names."""


def anchored(distance: Callable[[int, torch.Tensor], torch.Tensor], values: torch.Tensor, count: int) -> torch.Tensor:
    """Keeps whatever differs from the last kept token of its place by more than a threshold that bisection finds.

    Args:
        distance: Of unit t to (P, C) anchors, (P,).
        values: (T, P, C), what the tokens are compared by.
        count: Tokens to keep, unit 0 among them.

    Returns:
        (T, P) bool. What the threshold leaves of `count` goes to what differs most from its anchor.
    """
    units, places = values.shape[:2]

    def walk(threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
        """What is kept, and how far everything is from its anchor."""
        kept, far = torch.zeros(units, places, dtype=torch.bool), torch.full((units, places), torch.inf)
        anchor = values[0]
        kept[0] = True
        for t in range(1, units):
            far[t] = distance(t, anchor)
            kept[t] = far[t] > threshold
            anchor = torch.where(kept[t, :, None], values[t], anchor)
        return kept, far

    # Distances to unit 0 do not bound those to later anchors. Four times their largest does, for L1 and 1 - cosine.
    low, high = 0.0, 4 * float(walk(torch.inf)[1][1:].max()) + 1e-6
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if walk(middle)[0].sum() > count else (low, middle)
    kept, far = walk(high)
    rest = torch.where(kept, -torch.inf, far).flatten()
    kept.view(-1)[rest.argsort(descending=True, stable=True)[: count - int(kept.sum())]] = True
    return kept


def descriptors(frames: np.ndarray, grid: tuple[int, ...], side: int = 4, sigma: float = 6.0) -> torch.Tensor:
    """(T, P, 6 * side²) fp32: `side` x `side` pixels a token over the local contrast, beside the local mean colour.

    Args:
        frames: (T, H, W, 3) uint8.
        grid: (rows, columns) of tokens.
        side: Pixels of a token along each side, after shrinking.
        sigma: What is local, in those pixels.
    """
    import cv2

    rows, columns = grid
    found = []
    for frame in frames:
        small = cv2.resize(frame, (columns * side, rows * side), interpolation=cv2.INTER_AREA).astype(np.float32)
        mean = cv2.GaussianBlur(small, (0, 0), sigma)
        contrast = np.sqrt(np.maximum(cv2.GaussianBlur(small * small, (0, 0), sigma) - mean * mean, 0))
        # 6 grey levels are noise, not contrast; 40 of mean brightness count as much as the contrast does once.
        found.append(np.concatenate([(small - mean) / (contrast + 6), mean / 40], axis=-1))
    values = np.stack(found).reshape(len(frames), rows, side, columns, side, 6)
    return torch.from_numpy(values.transpose(0, 1, 3, 2, 4, 5).reshape(len(frames), rows * columns, -1))
