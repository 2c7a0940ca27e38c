# SPDX-License-Identifier: Apache-2.0
"""The option `focus`: as many tokens, more of them where the client looks."""

import numpy as np
import pytest
import torch

from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Anchors, Clip, TokenPixels
from evs_vllm.core.focus import unit_weights
from evs_vllm.core.selection import make_plan
from evs_vllm.engine.times import metadata_of, unit_starts
from evs_vllm.errors import ConfigError, RequestError, UnsupportedError
from evs_vllm.options import SELECTION_NAMES
from evs_vllm.requests import admit

GRID = (24, 4, 6)
STARTS = tuple(0.5 * unit for unit in range(GRID[0]))


def noisy_clip(seed: int, starts: tuple[float, ...] | None = STARTS) -> Clip:
    """A clip that changes everywhere by about as much, so that nothing but a focus tells its units apart."""
    units, rows, columns = GRID
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (units, rows * columns, 3 * 8 * 8), generator=generator).to(torch.uint8)
    return Clip(tokens, GRID, TokenPixels(2, 3, 1, 4), starts=starts)


def test_weights_are_those_of_the_first_range_that_a_unit_lies_in() -> None:
    clip = Clip(torch.zeros(4, 1, 12, dtype=torch.uint8), (4, 1, 1), starts=(0.0, 1.0, 2.0, 3.5))
    # Units are [0, 1), [1, 2), [2, 3.5) and, as long as the one before, [3.5, 5).
    config = EVSConfig(rate=0.5, focus=((1.9, 2.1, 4), (0, 2, 0.5), (4.9, 9, 2)))
    weights = unit_weights(clip, config)
    assert weights is not None and weights.tolist() == [8, 64, 64, 32] and weights.dtype == torch.int32
    assert unit_weights(clip, EVSConfig(rate=0.5)) is None
    goes_on = clip.after(Anchors(clip.tokens[0], (1, 1)))
    weights = unit_weights(goes_on, config)
    assert weights is not None and weights.tolist() == [16, 8, 64, 64, 32], "what came before counts once"


@pytest.mark.parametrize("selection", SELECTION_NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_as_many_tokens_and_more_of_them_in_the_range(selection: str, seed: int) -> None:
    clip, config = noisy_clip(seed), EVSConfig(rate=0.75, selection=selection)
    inside = slice(10, 14)  # 5 s to 7 s
    plain = make_plan(clip, config)
    looked_at = make_plan(clip, EVSConfig(rate=0.75, selection=selection, focus=((5, 7, 8),)))
    looked_past = make_plan(clip, EVSConfig(rate=0.75, selection=selection, focus=((5, 7, 0),)))
    assert plain.num_kept == looked_at.num_kept == looked_past.num_kept
    assert looked_at.counts[inside].sum() > plain.counts[inside].sum() + 24
    assert looked_past.counts[inside].sum() == 0 < plain.counts[inside].sum()
    same = make_plan(clip, EVSConfig(rate=0.75, selection=selection, focus=((0, 100, 1),)))
    assert same.kept.tolist() == plain.kept.tolist(), "a weight of 1 everywhere changes nothing"


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="needs to know when the clip's units begin"):
        make_plan(noisy_clip(0, starts=None), EVSConfig(rate=0.75, focus=((0, 1, 4),)))
    with pytest.raises(ConfigError, match="focus and threshold=6 contradict"):
        EVSConfig(threshold=6, focus=((0, 1, 4),))
    with pytest.raises(RequestError, match="focus and threshold=6 contradict"):
        admit(EVSConfig(threshold=6), {"evs_focus": [[0, 1, 4]]})
    with pytest.raises(ConfigError, match="focus got .*; allowed: a list of 1 to 32 ranges"):
        EVSConfig(rate=0.5, focus=[[0, 1, 1]] * 33)  # type: ignore[arg-type]


def test_a_request_has_its_own_focus_and_its_own_cache_key() -> None:
    server = EVSConfig(rate=0.75)
    asked = [admit(server, {"evs_focus": focus}) for focus in ([[0, 1, 4]], [[0, 1.0, 4]], [[0, 1, 5]])]
    assert asked[0].identity == asked[1].identity, "1 and 1.0 are the same second"
    assert len({server.identity, asked[0].identity, asked[2].identity}) == 3
    assert {asked[0], asked[0]} == {asked[0]}, "settings with a focus can be hashed"


def test_times_come_from_the_loader() -> None:
    clip = Clip(torch.zeros(3, 1, 24, dtype=torch.uint8), (3, 1, 1), TokenPixels(1, 3, 2, 2))
    known = {"fps": 4.0, "frames_indices": np.array([0, 3, 6, 9, 12]), "do_sample_frames": False}
    assert unit_starts(known, clip) == (0.0, 1.5, 3.0), "the last unit's second frame was made by the processor"
    assert unit_starts({}, clip) is None and unit_starts(known | {"fps": 0}, clip) is None
    assert unit_starts(known | {"do_sample_frames": True}, clip) is None
    assert unit_starts(known | {"frames_indices": [0, 3, 6, 9]}, clip) is None, "too few frames for three units"

    class Items:
        metadata = [None, known]

    assert metadata_of(Items(), 0) == {} and metadata_of(Items(), 1) is known and metadata_of(object(), 0) == {}
