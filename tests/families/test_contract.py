# SPDX-License-Identifier: Apache-2.0
"""What holds for every family's adapter, seen without an engine: what a token's pixels are, what is kept of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evs_vllm.core.descriptors import low_resolution
from evs_vllm.core.scorers import PixelChange
from evs_vllm.families import supported_architectures
from evs_vllm.testing import synthetic_clip
from tests.families.facts import Facts
from tests.families.processing import (
    adapter_for,
    clip_in,
    fields_in,
    pixels_in,
    plan_in,
    process,
    processor_for,
)
from tests.families.registry import FAMILIES, families
from tests.reference import appearance, hf, selection

pytestmark = [pytest.mark.vllm, families(lambda facts: True)]


def test_each_architecture_has_a_family_here() -> None:
    assert sorted({case.tiny.architecture for case in FAMILIES.values()}) == sorted(supported_architectures())


def test_a_painted_pixel_changes_the_score_of_its_token_and_no_other(whole: Any, facts: Facts) -> None:
    """Through the real Hugging Face processor: the rows we score are the pixels of that token, at that place."""
    height, width = facts.frame_size
    frames = np.full((4 * facts.unit_frames, height, width, 3), 100, dtype=np.uint8)
    under = facts.tokens_under or (lambda pixel: [pixel // facts.token_side])
    rng = np.random.default_rng()
    for _ in range(12):
        frame = int(rng.integers(facts.unit_frames, len(frames)))
        top, left = int(rng.integers(height)), int(rng.integers(width))
        painted = frames.copy()
        painted[frame, top, left, int(rng.integers(3))] = 137
        clip = clip_in(whole, process(whole, painted))
        assert clip.grid == (4, *facts.grid) and clip.tokens.dtype == torch.uint8
        t, expected = frame // facts.unit_frames, np.zeros(clip.grid, dtype=np.int64)
        for row in under(top):
            for column in under(left):
                expected[t : t + 2, row, column] = 37
        assert PixelChange().score(clip.tokens).view(clip.grid).tolist() == expected.tolist(), (frame, top, left)


@families(lambda facts: facts.whole_frames)
def test_the_rows_of_the_tower_are_the_tokens(model: Path, whole: Any, family: str, facts: Facts) -> None:
    """With its attention silenced, row i of the tower answers to the pixels that are compared for token i alone."""
    reference = FAMILIES[family].load_reference()(model)  # one of its own, which it may change
    reference.silence_attention()
    height, width = facts.frame_size
    frames = synthetic_clip(3, (height, width), "noise", seed=1)
    before, grid, _ = reference.see_clip(hf.Clip(frames))
    rng = np.random.default_rng()
    one = clip_in(whole, process(whole, frames))
    assert one.grid == grid == (3, *facts.grid)
    changed_once = np.zeros(grid, dtype=bool)
    for _ in range(10):
        t, top, left = int(rng.integers(3)), int(rng.integers(height)), int(rng.integers(width))
        painted = frames.copy()
        painted[t, top, left] = 255 - painted[t, top, left]
        after, _, _ = reference.see_clip(hf.Clip(painted))
        changed = (after - before).abs().amax(dim=1)[reference.lead :][: int(np.prod(grid))]
        rows = changed.view(grid) > 0
        pixels = (clip_in(whole, process(whole, painted)).tokens != one.tokens).any(dim=-1).view(grid)
        assert rows.tolist() == pixels.tolist(), (t, top, left)
        changed_once |= rows.numpy()
    assert changed_once.any()


def blocks_along(size: int, facts: Facts) -> tuple[list[int], int]:
    """First pixel of every token's block along a side of a frame, and the side of a block."""
    under = facts.tokens_under or (lambda pixel: [pixel // facts.token_side])
    tokens = [under(pixel) for pixel in range(size)]
    count = 1 + max(max(of_pixel) for of_pixel in tokens if of_pixel)
    spans = [[pixel for pixel in range(size) if token in tokens[pixel]] for token in range(count)]
    (side,) = {len(span) for span in spans}
    return [span[0] for span in spans], side


def pictures_of(frames: np.ndarray, facts: Facts) -> np.ndarray:
    """The reference's low-resolution pictures of the tokens in frames as the model sees them."""
    (tops, side), (lefts, _) = (blocks_along(size, facts) for size in facts.frame_size)
    return appearance.pictures(frames, facts.unit_frames, tops, lefts, side)


def test_the_picture_of_a_token_is_that_of_its_block(whole: Any, facts: Facts) -> None:
    """`Clip.pixels` says rightly where in a token every value of a row is."""
    result = process(whole, synthetic_clip(3 * facts.unit_frames, facts.frame_size, "noise", seed=6))
    clip = clip_in(whole, result)
    assert clip.pixels is not None and clip.pixels.values == clip.tokens.shape[-1]
    assert clip.pixels.frames == facts.unit_frames and clip.tokens.is_contiguous()
    expected = pictures_of(adapter_for(whole).frames(fields_in(result)), facts)
    assert low_resolution(clip, 4).tolist() == expected.tolist()


def test_blocks_begin_where_the_adapter_says(whole: Any, facts: Facts) -> None:
    starts = getattr(adapter_for(whole), "block_starts", None)
    if facts.tokens_under is not None:
        assert starts is not None, "its tokens overlap"
    if starts is not None:
        assert starts() == blocks_along(facts.frame_size[0], facts) == blocks_along(facts.frame_size[1], facts)


def test_a_painted_block_changes_the_picture_of_its_token_and_no_other(whole: Any, facts: Facts) -> None:
    (tops, side), (lefts, _) = (blocks_along(size, facts) for size in facts.frame_size)
    frames = synthetic_clip(3 * facts.unit_frames, facts.frame_size, "noise", seed=7)
    before = low_resolution(clip_in(whole, process(whole, frames)), 4)
    colour = [3, 250, 120]
    rng = np.random.default_rng()
    for _ in range(4):
        t, row, column = int(rng.integers(3)), int(rng.integers(len(tops))), int(rng.integers(len(lefts)))
        painted = frames.copy()
        unit = painted[t * facts.unit_frames : (t + 1) * facts.unit_frames]
        unit[:, tops[row] : tops[row] + side, lefts[column] : lefts[column] + side] = colour
        after = low_resolution(clip_in(whole, process(whole, painted)), 4)
        assert (after[t, row, column] == torch.tensor(colour)).all()
        expected = np.zeros(before.shape[:3], dtype=bool)
        for r, c in np.ndindex(len(tops), len(lefts)):
            expected[t, r, c] = abs(tops[r] - tops[row]) < side and abs(lefts[c] - lefts[column]) < side
        changed = (after != before).flatten(3).any(dim=-1)
        assert changed.tolist() == expected.tolist(), (t, row, column)


@pytest.mark.parametrize("name", ["learned", "contrast"])
def test_what_stays_is_what_the_reference_keeps(
    model: Path, whole: Any, clip: np.ndarray, facts: Facts, name: str
) -> None:
    """From the frames that the model sees to the plan, by the selections that look at pictures."""
    cells = pictures_of(adapter_for(whole).frames(fields_in(process(whole, clip))), facts)
    processor = processor_for(model, {"rate": 0.75, "selection": name, "request_overrides": "any"})
    for kwargs, asked in (
        ({}, hf.Settings(0.75, selection=name)),
        ({"evs_threshold": 20, "evs_max_tokens": 300}, hf.Settings(threshold=20.0, max_tokens=300, selection=name)),
    ):
        plan = plan_in(process(processor, clip, **kwargs))
        assert plan is not None and plan.kept.tolist() == selection.select(cells, asked).tolist(), kwargs


def test_frames_come_back_as_they_went_in(whole: Any, facts: Facts) -> None:
    frames = synthetic_clip(3 * facts.unit_frames, facts.frame_size, "noise", seed=2)
    shown = adapter_for(whole).frames(fields_in(process(whole, frames)))
    assert shown.shape == frames.shape and (shown == frames).all()


@families(lambda facts: not facts.whole_frames)
def test_host_normalised_pixels_give_the_same_plan(model: Path, clip: np.ndarray, facts: Facts) -> None:
    raw = process(processor_for(model, {"rate": 0.75}), clip)
    normalised = process(processor_for(model, {"rate": 0.75}, mm_device_do_normalize=False), clip)
    assert pixels_in(raw).dtype == (torch.uint8 if facts.raw_pixels else torch.float32)
    assert pixels_in(normalised).dtype == torch.float32
    one, other = plan_in(raw), plan_in(normalised)
    assert one is not None and other is not None and one.kept.tolist() == other.kept.tolist()
