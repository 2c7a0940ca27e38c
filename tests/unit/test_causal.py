# SPDX-License-Identifier: Apache-2.0
"""The causal budget against the plain reference, and what it promises of a clip that grows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evs_vllm.config import EVSConfig
from evs_vllm.core.causal import DEBT_UNITS, FixedScores, spend
from evs_vllm.core.clip import Anchors, Clip
from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.scorers import SELECTIONS, named_selection
from evs_vllm.core.selection import make_plan
from tests.reference import appearance, causal
from tests.reference import selection as plain
from tests.reference.hf import Settings, select
from tests.reference.tower import TowerSettings, computed_tokens
from tests.unit.test_anchored import cells_of, clip_of, drawn_case, seeds


def drawn_options(seed: int) -> dict[str, object]:
    """Settings of the causal budget."""
    rng = np.random.default_rng(seed)
    options: dict[str, object] = {"min_tokens_per_unit": int(rng.choice([0, 0, 0, 1, 2, 9]))}
    if rng.random() < 0.7:
        options["rate"] = float(rng.choice([0.1, 0.5, 0.75, 0.9, 0.99]))
    else:
        options["threshold"] = float(rng.choice([0.25, 3, 12.5, 40, 120, 255]))
    if rng.random() < 0.3:
        options["max_tokens"] = int(rng.integers(1, 60))
    return options


def beginning(clip: Clip, units: int) -> Clip:
    starts = None if clip.starts is None else clip.starts[:units]
    return Clip(clip.tokens[:units], (units, *clip.grid[1:]), clip.pixels, clip.previous, starts)


def before(clip: Clip, name: str, seed: int) -> Clip:
    """The clip, going on from another one that left something like its last unit."""
    rng = np.random.default_rng(seed)
    looks = named_selection(name).looks(clip)[-1].cpu().clone()
    changed = torch.from_numpy(rng.random(len(looks)) < 0.5)
    looks[changed] = torch.from_numpy(rng.integers(0, 256, looks.shape).astype(np.uint8))[changed]
    return clip.after(Anchors(looks, clip.grid[1:], int(rng.integers(0, clip.tokens_per_unit + 1))))


@pytest.mark.parametrize("name", SELECTIONS)
@settings(max_examples=120)
@given(seed=seeds, options=seeds.map(drawn_options), continues=st.booleans())
def test_the_kept_tokens_are_those_of_the_reference(
    name: str, seed: int, options: dict[str, object], continues: bool
) -> None:
    frames, unit_frames, merge, side = drawn_case(seed, 14)
    clip, saved = clip_of(frames, unit_frames, merge, side), None
    asked = Settings(**{"rate": 0.0, **options}, selection=name, budget="causal")  # type: ignore[arg-type]
    config = EVSConfig(**options, selection=name, budget="causal")  # type: ignore[arg-type]
    if name == "paper":
        expected = select(clip.tokens.numpy(), asked)
    else:
        looks = appearance.DESCRIBE[name](cells_of(frames, unit_frames, merge * side))
        if continues:
            clip = before(clip, name, seed)
            assert clip.previous is not None
            looks, saved = (
                np.concatenate([clip.previous.looks.numpy()[None].astype(np.int64), looks]),
                clip.previous.saved,
            )
        expected = plain.choose(looks, asked, saved)
    plan = make_plan(clip, config)
    assert plan.kept.tolist() == expected.tolist()


@settings(max_examples=60)
@given(seed=seeds, options=seeds.map(drawn_options), refresh=st.sampled_from([3, 25, 90]))
def test_what_the_tower_computes_is_that_of_the_reference(seed: int, options: dict[str, object], refresh: int) -> None:
    frames, unit_frames, merge, side = drawn_case(seed, 10)
    clip = clip_of(frames, unit_frames, merge, side)
    plan = make_plan(clip, EVSConfig(**options, budget="causal", encoder="reuse", encoder_refresh=refresh))  # type: ignore[arg-type]
    looks = appearance.learned(cells_of(frames, unit_frames, merge * side))
    asked = TowerSettings(**{"rate": 0.0, **options}, selection="learned", budget="causal", refresh=refresh)  # type: ignore[arg-type]
    if plan.encoder == "reuse":
        assert (
            np.isin(np.arange(plan.num_tokens), plan.computed).tolist()
            == computed_tokens(looks, plan.kept, asked).tolist()
        )
    else:
        assert len(plan.kept) == plan.num_tokens or computed_tokens(looks, plan.kept, asked).all()


@settings(max_examples=150)
@given(seed=seeds, alone=st.booleans())
def test_long_clips_with_still_parts_are_those_of_the_reference(seed: int, alone: bool) -> None:
    """Scores by themselves: long enough to save up all that can be saved, and to owe all that can be owed."""
    rng = np.random.default_rng(seed)
    units, places = int(rng.integers(20, 70)), int(rng.integers(1, 7))
    still = np.repeat(rng.random(10) < 0.6, 7)[:units, None]
    scores = np.where(still, rng.integers(0, 4, (units, places)), rng.integers(0, 60, (units, places)))
    asked = Settings(rate=float(rng.choice([0.25, 0.5, 0.75, 0.9])), selection="learned")
    allowed = [plain.tokens_allowed(t + 1, places, asked, None if alone else 2) for t in range(units)]
    noise = int(rng.integers(1, 5))
    kept = spend(FixedScores(scores), places, allowed, whole_first=alone, noise=noise)
    found = causal.purse(allowed, places, asked, lambda t, p: scores[t, p], lambda t, p: None, noise, 0, alone)
    assert kept.tolist() == found.tolist()


def drawn_clip(seed: int) -> Clip:
    return clip_of(*drawn_case(seed, 16))


@pytest.mark.parametrize("name", SELECTIONS)
@settings(max_examples=60)
@given(seed=seeds, options=seeds.map(drawn_options), continues=st.booleans(), focused=st.booleans())
def test_whatever_comes_later_the_beginning_is_the_same(
    name: str, seed: int, options: dict[str, object], continues: bool, focused: bool
) -> None:
    """For every end: what is kept and computed of a clip that ends there is what is kept of it in the longer one."""
    clip = drawn_clip(seed)
    if continues:
        clip = before(clip, name, seed)
    elif focused and "threshold" not in options:
        clip = replace(clip, starts=tuple(t / 2 for t in range(clip.num_units)))
        options = options | {"focus": ((0.5, 1.75, 8.0), (3.0, 4.0, 0.25), (5.0, 5.5, 0.0))}
    config = EVSConfig(**options, selection=name, budget="causal", encoder="reuse")  # type: ignore[arg-type]
    whole = make_plan(clip, config)
    for units in range(1, clip.num_units):
        part, end = make_plan(beginning(clip, units), config), units * clip.tokens_per_unit
        assert part.kept.tolist() == whole.kept[whole.kept < end].tolist()
        if part.encoder == whole.encoder == "reuse":
            assert part.computed.tolist() == whole.computed[whole.computed < end].tolist()


@pytest.mark.parametrize("name", SELECTIONS)
@settings(max_examples=60)
@given(seed=seeds, options=seeds.map(drawn_options), continues=st.booleans())
def test_no_beginning_has_more_than_the_clip_would_have_and_what_it_may_owe(
    name: str, seed: int, options: dict[str, object], continues: bool
) -> None:
    clip = drawn_clip(seed)
    if continues:
        clip = before(clip, name, seed)
    options["min_tokens_per_unit"] = 0
    config = EVSConfig(**options, selection=name, budget="causal")  # type: ignore[arg-type]
    counts = make_plan(clip, config).counts.cumsum()
    owed = 0 if continues else DEBT_UNITS * clip.tokens_per_unit
    if config.rate:
        allowed = named_selection(name).allowance(clip, config)
        assert (counts <= np.array(allowed) + owed).all()
    if config.max_tokens is not None:
        assert counts[-1] <= max(config.max_tokens, 1 if continues else clip.tokens_per_unit)


@pytest.mark.parametrize("name", SELECTIONS)
@settings(max_examples=40)
@given(seed=seeds, threshold=st.sampled_from([0.25, 3, 12.5, 40, 120]), least=st.integers(0, 3))
def test_a_threshold_keeps_the_same_with_either_budget(name: str, seed: int, threshold: float, least: int) -> None:
    clip = drawn_clip(seed)
    config = EVSConfig(threshold=threshold, min_tokens_per_unit=least, selection=name)
    clipwise, causal = make_plan(clip, config), make_plan(clip, replace(config, budget="causal"))
    assert clipwise.kept.tolist() == causal.kept.tolist()


def test_a_still_scene_saves_for_a_cut() -> None:
    """12 units stand still, then another scene: it gets what was saved, and what may be owed; then both are paid."""
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 256, (2, 1, 4 * 28, 5 * 28, 3)).astype(np.uint8)
    frames = np.concatenate([np.repeat(one, 12, axis=0), np.repeat(other, 12, axis=0)])
    plan = make_plan(clip_of(frames, 1, 2, 14), EVSConfig(rate=0.75, budget="causal"))
    assert plan.counts.tolist() == [20, *[0] * 11, 20, *[0] * 11]


def test_what_was_never_seen_before_is_shown_though_the_purse_is_empty() -> None:
    """Noise everywhere leaves nothing; a cut is above it, and is paid for afterwards."""
    rng = np.random.default_rng(1)
    scene, other = rng.integers(0, 256, (2, 4 * 28, 5 * 28, 3))
    # The picture moves by a pixel with every unit.
    moving = [np.roll(scene, t, axis=1) for t in range(12)] + [np.roll(other, t, axis=1) for t in range(12)]
    plan = make_plan(clip_of(np.stack(moving).astype(np.uint8), 1, 2, 14), EVSConfig(rate=0.75, budget="causal"))
    assert plan.counts[12] > plan.counts[1:12].max()


def test_a_plan_carries_the_names_of_beginnings() -> None:
    from evs_vllm.core.plan import Layout

    names = np.arange(12).reshape(3, 4)
    plan = RetentionPlan((3, 1, 2), np.array([0, 1, 4]), beginnings=names)
    back = RetentionPlan.from_array(plan.with_layout(Layout.contiguous(7, 6), 6).to_array())
    assert back.beginnings.tolist() == names.tolist() and back.kept.tolist() == [0, 1, 4]
    assert back.prompt_units.tolist() == [0, 0, 2]
