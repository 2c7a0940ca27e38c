# SPDX-License-Identifier: Apache-2.0
"""What a selection shows of its choice: `Selection.evidence` and `Selection.unit`."""

import pytest
import torch

from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Anchors, Clip, TokenPixels
from evs_vllm.core.scorers import SELECTIONS, Selection
from evs_vllm.errors import UnsupportedError

PIXELS = TokenPixels(merge=1, channels=3, frames=2, side=4)


@pytest.mark.parametrize("name", SELECTIONS)
def test_what_came_before_is_one_more_unit(name: str) -> None:
    pixels = torch.randint(256, (6, 12, PIXELS.values), dtype=torch.uint8)
    whole = Clip(pixels, (6, 3, 4), PIXELS)
    going_on = Clip(pixels[1:], (5, 3, 4), PIXELS).after(Anchors(SELECTIONS[name].looks(whole)[0], (3, 4)))
    evidence = SELECTIONS[name].evidence(whole)
    assert evidence.shape[:2] == (6, 12) and evidence.dtype == (torch.int32, torch.uint8)[evidence.ndim - 2]
    assert torch.equal(SELECTIONS[name].evidence(going_on), evidence)


@pytest.mark.parametrize("name", SELECTIONS)
def test_the_unit_is_what_a_threshold_counts(name: str) -> None:
    """Two units, and so every token's distance or score is that from unit 0."""
    selection = SELECTIONS[name]
    clip = Clip(torch.randint(256, (2, 40, PIXELS.values), dtype=torch.uint8), (2, 5, 8), PIXELS)
    evidence = selection.evidence(clip).int()
    change = evidence[1] if evidence.ndim == 2 else (evidence[1] - evidence[0]).abs().sum(dim=1)
    threshold = float(change.float().median() / selection.unit(clip))
    assert 0 < threshold <= 255
    for factor in (0.999, 1.001):  # beside the median, where rounding cannot matter
        kept = selection.select(clip, EVSConfig(threshold=factor * threshold))
        assert (
            kept[40:].tolist() == (40 + (change >= factor * threshold * selection.unit(clip)).nonzero()[:, 0]).tolist()
        )


def test_one_that_shows_nothing_says_so() -> None:
    class First(Selection):
        name = "first"

        def select(self, clip: Clip, config: EVSConfig) -> torch.Tensor:
            return torch.arange(clip.tokens_per_unit)

    clip = Clip(torch.zeros((2, 1, PIXELS.values), dtype=torch.uint8), (2, 1, 1), PIXELS)
    for ask in (First().evidence, First().unit):
        with pytest.raises(UnsupportedError, match="The selection first has no"):
            ask(clip)
