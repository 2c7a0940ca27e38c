# SPDX-License-Identifier: Apache-2.0
"""Budget and selection against a plain reference, and what the 'stricter' rule promises for real clips."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evs_vllm.config import EVSConfig
from evs_vllm.core.budget import token_budget
from evs_vllm.core.clip import Clip, TokenPixels
from evs_vllm.core.selection import make_plan
from evs_vllm.options import SELECTION_NAMES


def reference(tokens: np.ndarray, config: EVSConfig) -> list[int]:
    """Kept flat indices, written from the rules with sorting and sets."""
    units, per_unit, values = tokens.shape
    change = np.zeros((units, per_unit), dtype=np.int64)
    for t in range(1, units):
        change[t] = np.abs(tokens[t].astype(np.int64) - tokens[t - 1].astype(np.int64)).sum(axis=-1)
    flat = change.reshape(-1)
    always = set(range(per_unit))
    for t in range(1, units):
        unit = sorted(range(t * per_unit, (t + 1) * per_unit), key=lambda i: (-flat[i], i))
        always |= set(unit[: config.min_tokens_per_unit])
    rest = sorted((i for i in range(units * per_unit) if i not in always), key=lambda i: (-flat[i], i))
    if config.threshold:
        rest = [i for i in rest if Fraction(int(flat[i]), values) >= Fraction(str(config.threshold))]
        room = len(rest)
    else:
        room = (units * per_unit * (1 - Fraction(str(config.rate or 0)))).__floor__() - len(always)
    if config.max_tokens is not None:
        room = min(room, config.max_tokens - len(always))
    return sorted(always | set(rest[: max(room, 0)]))


def random_clip(seed: int, units: int, per_unit: int, values: int, levels: int) -> np.ndarray:
    """Few grey levels, so that ties are common."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, levels, (units, per_unit, values)) * (255 // max(levels - 1, 1))).astype(np.uint8)


clips = st.builds(
    random_clip, st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 9), st.integers(1, 7), st.integers(1, 4)
)
configs = st.builds(
    lambda budget, least, most: EVSConfig(**budget, selection="paper", min_tokens_per_unit=least, max_tokens=most),
    st.one_of(
        st.sampled_from([0, 0.1, 0.3, 0.5, 0.75, 0.9, 0.99]).map(lambda q: {"rate": q}),
        st.sampled_from([1, 42.5, 85, 127.5, 255]).map(lambda tau: {"threshold": tau}),
    ),
    st.integers(0, 4),
    st.one_of(st.none(), st.integers(1, 40)),
)


@settings(max_examples=300)
@given(clips, configs)
def test_plan_equals_reference(clip: np.ndarray, config: EVSConfig) -> None:
    units, per_unit, _ = clip.shape
    plan = make_plan(Clip(torch.from_numpy(clip), (units, 1, per_unit)), config)
    assert plan.kept.tolist() == reference(clip, config)
    assert plan.counts.sum() == plan.num_kept == plan.mask.sum()
    if not config.threshold:
        assert plan.num_kept == token_budget(units, per_unit, config, stock_count=True)


any_selection = st.builds(
    lambda config, selection: replace(config, selection=selection), configs, st.sampled_from(SELECTION_NAMES)
)


@settings(max_examples=300)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 9), any_selection, any_selection)
def test_stricter_never_keeps_more(seed: int, units: int, per_unit: int, one: EVSConfig, other: EVSConfig) -> None:
    tokens = torch.from_numpy(random_clip(seed, units, per_unit, 48, 4))
    clip = Clip(tokens, (units, 1, per_unit), TokenPixels(1, 3, 1, 4))
    if one.is_at_most(other):
        assert make_plan(clip, one).num_kept <= make_plan(clip, other).num_kept


def test_a_higher_threshold_can_keep_more_than_the_servers() -> None:
    """So the rule `stricter` admits none but the server's own, of a selection that compares with the last kept one."""

    def clip_of(levels: list[int]) -> Clip:
        tokens = torch.tensor(levels, dtype=torch.uint8)[:, None, None].expand(-1, 1, 48).contiguous()
        return Clip(tokens, (len(levels), 1, 1), TokenPixels(1, 3, 1, 4))

    # Flat tokens: what differs is the mean colour, which counts 9 for a grey level; a threshold of 1 is 3.84.
    low, high = (EVSConfig(threshold=9 * grey / 3.84, selection="contrast") for grey in (4, 5))
    clip = clip_of([100, 104, 106, 101, 106, 101])
    assert make_plan(clip, low).num_kept == 2 and make_plan(clip, high).num_kept == 5
    assert not high.is_at_most(low) and low.is_at_most(low)
    one, other = (replace(config, selection="paper") for config in (low, high))
    assert other.is_at_most(one) and not one.is_at_most(other)


@settings(max_examples=100)
@given(st.integers(0, 2**32), configs, st.sampled_from([0, 0.1, 4, 35, 120.5, 255]))
def test_refreshed_tokens_are_those_of_the_reference(seed: int, config: EVSConfig, refresh: float) -> None:
    from tests.reference import appearance
    from tests.reference.tower import TowerSettings, computed_tokens

    rng = np.random.default_rng(seed)
    units, per_unit = (int(size) for size in rng.integers(1, 7, 2))
    frames = rng.integers(0, 256, (units, 4, per_unit * 4, 3)).astype(np.uint8)
    for t in range(1, units):  # parts of it stand still
        still = rng.random(per_unit).repeat(4) < 0.6
        frames[t, :, still] = frames[t - 1, :, still]
    tokens = frames.reshape(units, 4, per_unit, 4, 3).transpose(0, 2, 4, 1, 3).reshape(units, per_unit, 48)
    clip = Clip(torch.from_numpy(tokens), (units, 1, per_unit), TokenPixels(1, 3, 1, 4))
    config = replace(config, encoder="reuse", encoder_refresh=refresh)
    plan = make_plan(clip, config)
    looks = appearance.learned(appearance.pictures(frames, 1, [0], range(0, 4 * per_unit, 4), 4))
    expected = computed_tokens(looks, plan.kept, TowerSettings(rate=0.5, refresh=refresh))
    assert plan.computed.tolist() == np.flatnonzero(expected).tolist()
    dropped = plan.num_tokens - plan.num_kept
    assert len(plan.refreshed) <= (dropped // 2 if refresh else 0)
    assert plan.encoder == ("reuse" if dropped else "full")


@pytest.mark.parametrize(
    ("units", "per_unit", "rate", "expected"),
    [(10, 10, 0.9, 10), (10, 10, 0.75, 25), (10, 10, 0.99, 10), (1, 7, 0.9, 7), (3, 5, 0, 15), (7, 3, 0.5, 10)],
)
def test_stock_budget_by_hand(units: int, per_unit: int, rate: float, expected: int) -> None:
    assert token_budget(units, per_unit, EVSConfig(rate=rate), stock_count=True) == expected


@pytest.mark.parametrize(
    ("units", "per_unit", "rate", "expected"),
    [
        (5, 252, 0.9, 303),  # 252 + 50.4; a tenth of 1260 is 126
        (5, 252, 0.75, 378),  # 252 + 126; a quarter of 1260 is 315
        (5, 252, 0.5, 630),  # half of 1260; 252 + 252 is less
        (1, 252, 0.9, 252),
        (2, 1, 0.99, 2),  # 1 + 0.005
        (2, 7, 0.9, 8),  # 7 + 0.35
        (16, 10, 0.9, 18),  # 10 + 7.5
        (6, 10, 0.75, 17),  # 10 + 6.25
        (7, 10, 0.75, 18),  # 10 + 7.5; a quarter of 70 is 17.5
        (8, 10, 0.75, 20),  # a quarter of 80; 10 + 8.75 is less
        (20, 10, 0.9, 20),
        (128, 252, 0.9, 3225),  # a tenth of 32256 is 3225.6
        (3, 5, 0, 15),
    ],
)
def test_budget_by_hand(units: int, per_unit: int, rate: float, expected: int) -> None:
    assert token_budget(units, per_unit, EVSConfig(rate=rate)) == expected


def test_other_limits_of_a_short_clip_by_hand() -> None:
    assert token_budget(5, 252, EVSConfig(rate=0.9, max_tokens=260)) == 260
    assert token_budget(5, 252, EVSConfig(rate=0.9, max_tokens=10)) == 252
    assert token_budget(5, 252, EVSConfig(rate=0.9, min_tokens_per_unit=20)) == 252 + 4 * 20
    assert token_budget(5, 252, EVSConfig(rate=0.9), continues=True) == 126, "its unit 0 is not kept whole"
    assert token_budget(5, 252, EVSConfig(max_tokens=300)) == 300
    assert token_budget(5, 252, EVSConfig(threshold=3)) == 1260


@given(st.integers(1, 400), st.integers(1, 300), st.integers(0, 99))
def test_only_short_clips_keep_more_than_stock(units: int, per_unit: int, percent: int) -> None:
    """From (1 + rate) / (1 - rate) units on, the count is that of vLLM's own option; before, at least as large."""
    config = EVSConfig(rate=percent / 100)
    ours, stock = (token_budget(units, per_unit, config, stock_count=exact) for exact in (False, True))
    if units * (100 - percent) >= 100 + percent:
        assert ours <= stock + 1, "rounding up at the very limit"
        assert ours == stock or units * (100 - percent) == 100 + percent
    else:
        assert ours >= stock and per_unit <= ours <= units * per_unit
        share = Fraction((units - 1) * per_unit * (100 - percent), 100)
        assert units == 1 or 0 <= ours - per_unit - share / 2 < 1


def test_bytes_do_not_wrap_around() -> None:
    """255 -> 0 is the largest change there is, not a change of 1."""
    clip = np.zeros((2, 2, 4), dtype=np.uint8)
    clip[0, 1] = 255
    clip[1, 0] = 2
    plan = make_plan(Clip(torch.from_numpy(clip), (2, 1, 2)), EVSConfig(max_tokens=3, selection="paper"))
    assert plan.kept.tolist() == [0, 1, 3]


def test_threshold_is_exact_at_the_boundary() -> None:
    clip = np.zeros((2, 3, 10), dtype=np.uint8)
    clip[1, 0, 0] = 25  # mean change 2.5
    clip[1, 1, 0] = 24
    plan = make_plan(Clip(torch.from_numpy(clip), (2, 1, 3)), EVSConfig(threshold=2.5, selection="paper"))
    assert plan.kept.tolist() == [0, 1, 2, 3]
