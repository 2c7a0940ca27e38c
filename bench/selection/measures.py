# SPDX-License-Identifier: Apache-2.0
"""What a selection loses, as a pretrained tower sees it.

*Hold*: how far a token is from the last kept one of its place, which is what a reader who holds on to the last that was
shown takes it for. *Coverage*: how far it is from the nearest kept token within some units, at any place: content that
nothing kept resembles. Both are 1 - cosine, of features without the clip's mean, over all tokens, kept ones too.
"""

import torch
import torch.nn.functional as F

WINDOW = 4
"""Units before and after in which coverage looks."""
NOTHING = 0.0
"""Similarity to something where nothing was kept within the window."""


class Judge:
    """Measures selections of one clip.

    Args:
        features: (T, P, C) fp32, what the full tower makes of every token.
        window: Units before and after in which coverage looks.
    """

    def __init__(self, features: torch.Tensor, window: int = WINDOW) -> None:
        self.unit = F.normalize(features - features.mean((0, 1)), dim=-1)
        units = len(self.unit)
        self.reach = [offset for offset in range(-window, window + 1) if abs(offset) < units]
        # Similarities do not depend on what is kept: (units that have such a neighbour, P, P) per offset.
        self.similar = [
            self.unit[max(0, -offset) : units - max(0, offset)]
            @ self.unit[max(0, offset) : units + min(0, offset)].transpose(1, 2)
            for offset in self.reach
        ]

    def hold(self, kept: torch.Tensor) -> torch.Tensor:
        """(T, P) cosine to the last kept token of the place; `kept` is (T, P) bool with unit 0 whole."""
        unit = torch.arange(len(kept))[:, None].expand(kept.shape)
        last = torch.where(kept, unit, 0).cummax(0).values
        return (self.unit * self.unit[last, torch.arange(kept.shape[1])]).sum(-1)

    def coverage(self, kept: torch.Tensor) -> torch.Tensor:
        """(T, P) cosine to the nearest token that (T, P) bool `kept` has within the window."""
        units = len(kept)
        nearest = torch.full(kept.shape, -torch.inf)
        for offset, similar in zip(self.reach, self.similar, strict=True):
            there = kept[max(0, offset) : units + min(0, offset), None]
            best = torch.where(there, similar, -torch.inf).amax(-1)
            here = nearest[max(0, -offset) : units - max(0, offset)]
            torch.maximum(here, best, out=here)
        return torch.where(nearest.isinf(), NOTHING, nearest)


MEASURES = ("hold", "coverage")
FIGURES = tuple(f"{measure}{figure}" for measure in MEASURES for figure in ("", "_p05", "_worst_unit"))


def figures(judge: Judge, kept: torch.Tensor) -> dict[str, float]:
    """The figures of a selection.

    Returns:
        By `FIGURES`: of each measure its mean (1 - cosine, lower is better), the cosine that 5 % of the tokens do not
        reach, and the mean of the unit that has the worst one.
    """
    found = {}
    for measure, similar in zip(MEASURES, (judge.hold(kept), judge.coverage(kept)), strict=True):
        found[measure] = float(1 - similar.mean())
        found[f"{measure}_p05"] = float(similar.flatten().quantile(0.05))
        found[f"{measure}_worst_unit"] = float((1 - similar.mean(1)).max())
    return found
