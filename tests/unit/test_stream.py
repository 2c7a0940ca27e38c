# SPDX-License-Identifier: Apache-2.0
"""Clips of a stream, one after the other, against the plain reference, and what a stream promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evs_vllm.config import EVSConfig
from evs_vllm.core.budget import token_budget, tokens_saved
from evs_vllm.core.clip import Anchors, Clip
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.scorers import SELECTIONS
from evs_vllm.core.selection import make_plan
from evs_vllm.testing import synthetic_clip
from tests.reference import selection as plain
from tests.reference.hf import Settings
from tests.unit.test_anchored import DESCRIPTORS, both, clip_of, config_of, drawn, drawn_budget, scene, seeds

TOKEN = 8
"""Pixels along the side of a token: 2 x 2 patches of 4."""


def planned(clips: list[Clip], config: EVSConfig) -> list[RetentionPlan]:
    """The plans of clips that are parts of one stream."""
    plans, anchors, selection = [], None, SELECTIONS[config.selection]
    for clip in clips:
        clip = clip.after(anchors)
        plans.append(make_plan(clip, config))
        anchors = selection.anchors(torch.from_numpy(plans[-1].kept), clip, config)
    return plans


def cut(frames: np.ndarray, seed: int, longest: int = 4) -> list[np.ndarray]:
    """Frames in pieces of random length."""
    rng, pieces = np.random.default_rng(seed), []
    while len(frames):
        count = int(rng.integers(1, longest + 1))
        pieces.append(frames[:count])
        frames = frames[count:]
    return pieces


def drawn_stream(seed: int) -> list[np.ndarray]:
    """Pieces of one video, of several, of something that stands still, and now and then of another size."""
    rng = np.random.default_rng(seed)
    shapes = [(1, 1), (1, 4), (2, 2), (2, 3)]
    sizes = [(shapes[i][0] * TOKEN, shapes[i][1] * TOKEN) for i in rng.choice(len(shapes), 2, replace=False)]
    pieces: list[np.ndarray] = []
    for number in range(int(rng.integers(1, 4))):
        height, width = sizes[int(rng.random() < 0.2)]
        kind = str(rng.choice(["moving", "moving", "flicker", "flat", "noise"]))
        frames = drawn(kind, int(rng.integers(1, 9)), height, width, seed + number)
        if rng.random() < 0.4:  # it stands still for a while
            frames = np.concatenate([frames, np.repeat(frames[-1:], int(rng.integers(1, 6)), axis=0)])
        pieces += cut(frames, seed + number)
    return pieces


@both
@settings(max_examples=80)
@given(seed=seeds)
def test_a_stream_keeps_what_the_reference_keeps(name: str, seed: int) -> None:
    asked = drawn_budget(seed)
    asked = Settings(**{**vars(asked), "selection": name})
    pieces = drawn_stream(seed)
    clips = [clip_of(frames, 1, 2, TOKEN // 2) for frames in pieces]
    described = [(clip.grid[1:], DESCRIPTORS[name].describe(clip).numpy().astype(int)) for clip in clips]
    expected = plain.stream(described, asked)
    plans = planned(clips, config_of(asked))
    assert [(plan.kept.tolist(), plan.unchanged) for plan in plans] == expected


@pytest.mark.parametrize("name", SELECTIONS)
@settings(max_examples=40)
@given(seed=seeds)
def test_with_a_threshold_pieces_keep_what_one_clip_keeps(name: str, seed: int) -> None:
    """As long as every piece shows something new; `paper` compares with the unit before, so of it unit 0 may differ."""
    frames = drawn("moving", 12, 2 * TOKEN, 3 * TOKEN, seed)
    config = EVSConfig(threshold=1, selection=name)
    plans = planned([clip_of(piece, 1, 2, TOKEN // 2) for piece in cut(frames, seed)], config)
    if any(plan.unchanged for plan in plans):
        return
    starts = np.cumsum([0, *(plan.num_tokens for plan in plans)])
    kept = [index + start for plan, start in zip(plans, starts, strict=False) for index in plan.kept.tolist()]
    one = make_plan(clip_of(frames, 1, 2, TOKEN // 2), config).kept.tolist()
    if name == "paper":
        firsts = {start + place for start in starts[:-1].tolist() for place in range(6)}
        kept, one = ([index for index in some if index not in firsts] for some in (kept, one))
    assert kept == one


@given(
    units=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    per_unit=st.integers(1, 40),
    rate=st.sampled_from([0.1, 0.5, 0.75, 0.9, 0.99]),
    least=st.sampled_from([0, 0, 2]),
    seed=seeds,
)
def test_a_stream_never_keeps_more_than_its_clips_alone_or_its_shares(
    units: list[int], per_unit: int, rate: float, least: int, seed: int
) -> None:
    """Whatever is new in its clips."""
    config, rng = EVSConfig(rate=rate, min_tokens_per_unit=least), np.random.default_rng(seed)
    saved, kept, shares = 0, 0, 0
    for count in units:
        budget = token_budget(count, per_unit, config, continues=True, saved=saved)
        assert 1 <= budget <= token_budget(count, per_unit, config)
        assert budget <= per_unit * count * (1 - rate) + per_unit + count * least + 1
        now = int(rng.integers(max(1, count * min(least, per_unit)), budget + 1))
        saved = tokens_saved(count, per_unit, config, now, saved)
        assert 0 <= saved <= per_unit
        kept, shares = kept + now, shares + int(count * per_unit * (1 - rate) + 1e-9)
        if not least and shares >= len(units):  # a clip needs a token, also where its share is none
            assert kept <= shares + len(units)
    assert tokens_saved(3, per_unit, EVSConfig(threshold=4), 1, 0) == 0


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_cut_after_a_still_scene_is_shown_at_once(name: str) -> None:
    """What still pieces did not need is there for the new scene: at 0.9 a piece's own share is a fifth of a unit."""
    before, after = (scene(seed, 48, 64).astype(np.uint8) for seed in (5, 6))
    pieces = [np.stack([before] * 2)] * 6 + [np.stack([255 - after] * 2)] * 3
    plans = planned([clip_of(piece, 1, 2, 8) for piece in pieces], EVSConfig(rate=0.9, selection=name))
    assert [plan.num_kept for plan in plans[:6]] == [13 if name != "paper" else 12, 1, 1, 1, 1, 1]
    assert [plan.unchanged for plan in plans] == [False, *[True] * 5, False, *[plan.unchanged for plan in plans[7:]]]
    # Of 12 tokens a unit, a share is 2 and 1 of it is spent: four pieces save 5, and its own share is 2.
    assert plans[6].num_kept == 7 and sum(plan.num_kept for plan in plans[6:]) >= 11
    assert plans[7].num_kept <= 2


@pytest.mark.parametrize("name", SELECTIONS)
def test_other_sizes_and_what_is_left(name: str) -> None:
    config, selection = EVSConfig(rate=0.75, selection=name), SELECTIONS[name]
    wide, high = (clip_of(synthetic_clip(6, size, moving=0.2, seed=1), 2, 2, 4) for size in ((16, 32), (32, 16)))
    one, two, three = planned([wide, high, wide], config)
    assert one.kept.tolist() == three.kept.tolist() == make_plan(wide, config).kept.tolist(), "it starts anew"
    assert two.kept.tolist() == make_plan(high, config).kept.tolist()
    left = selection.anchors(torch.from_numpy(one.kept), wide, config)
    assert left.grid == (2, 4) and left.looks.dtype == torch.uint8 and left.looks.shape[0] == 8
    assert left.looks.untyped_storage().nbytes() == left.looks.numel(), "the clip is not held on to"
    looks = selection.looks(wide).view(3, 8, -1)
    for place in range(8):
        unit = max(index // 8 for index in one.kept.tolist() if index % 8 == place)
        assert left.looks[place].tolist() == looks[unit, place].tolist()


def test_a_state_is_small() -> None:
    """256 tokens of 28 x 28 pixels and two frames a unit: at most 2 MiB a stream."""
    clip = clip_of(np.random.default_rng(1).integers(0, 256, (4, 448, 448, 3), dtype=np.uint8), 2, 2, 14)
    for name, most in (("learned", 8192), ("contrast", 8192), ("paper", 2 << 20)):
        config = EVSConfig(rate=0.5, selection=name)
        plan = make_plan(clip, config)
        anchors = SELECTIONS[name].anchors(torch.from_numpy(plan.kept), clip, config)
        assert anchors.looks.numel() <= most


@both
@pytest.mark.parametrize("refresh", [0, 25])
def test_a_tower_that_reuses_computes_unit_0_of_every_piece(name: str, refresh: float) -> None:
    frames = drawn("moving", 16, 4 * TOKEN, 4 * TOKEN, seed=3)
    config = EVSConfig(rate=0.75, selection=name, encoder="reuse", encoder_refresh=refresh)
    plans = planned([clip_of(piece, 1, 2, 4) for piece in np.split(frames, [4, 8, 9])], config)
    assert [plan.encoder for plan in plans] == ["reuse", "reuse", "full", "reuse"], "one unit alone has none to reuse"
    for plan in plans:
        assert plan.computed[:16].tolist() == list(range(16))
        assert set(plan.kept.tolist()) <= set(plan.computed.tolist())
        later = sum(index >= 16 for index in plan.refreshed.tolist())
        assert later <= (plan.num_tokens - 16) // 2 and (refresh or not later)
        assert RetentionPlan.from_array(with_layout(plan).to_array()).unchanged == plan.unchanged


def with_layout(plan: RetentionPlan) -> RetentionPlan:
    from evs_vllm.core.plan import Layout

    return plan.with_layout(Layout.contiguous(7, plan.num_tokens), plan.num_tokens)


def test_a_clip_may_not_go_on_by_a_selection_that_cannot() -> None:
    from evs_vllm.core.scorers import Selection
    from evs_vllm.errors import UnsupportedError

    class First(Selection):
        name = "first"

        def select(self, clip: Clip, config: EVSConfig) -> torch.Tensor:
            return torch.tensor([0])

    clip = clip_of(drawn("flat", 2, 8, 8, seed=1), 1, 2, 4)
    with pytest.raises(UnsupportedError, match="first cannot go on from one clip to the next"):
        First().anchors(torch.tensor([0]), clip, EVSConfig(rate=0.5))
    with pytest.raises(UnsupportedError, match="first cannot go on"):
        make_plan(clip.after(Anchors(torch.zeros(1, 4, dtype=torch.uint8), (1, 1))), EVSConfig(rate=0.5), First())
