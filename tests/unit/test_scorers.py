# SPDX-License-Identifier: Apache-2.0
"""Every selection of the table against a plain reference, and clips that go on from another one."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evs_vllm.config import EVSConfig
from evs_vllm.core.budget import token_budget, token_floor
from evs_vllm.core.clip import Anchors, Clip, TokenPixels
from evs_vllm.core.scorers import SELECTIONS, PixelChange, Scorer, named_selection
from evs_vllm.core.selection import make_plan
from evs_vllm.errors import ConfigError
from evs_vllm.options import SELECTION_NAMES


def pixel_change(tokens: np.ndarray) -> np.ndarray:
    change = np.zeros(tokens.shape[:2], dtype=np.int64)
    for t in range(1, len(tokens)):
        change[t] = np.abs(tokens[t].astype(int) - tokens[t - 1].astype(int)).sum(-1)
    return change


REFERENCES = {"paper": pixel_change}
"""For every `Scorer` of the table its scores in plain numpy."""


def random_tokens(seed: int, units: int, per_unit: int, values: int, levels: int) -> torch.Tensor:
    """Few grey levels, so that ties are common."""
    rng = np.random.default_rng(seed)
    grey = rng.integers(0, levels, (units, per_unit, values)) * (255 // max(levels - 1, 1))
    return torch.from_numpy(grey.astype(np.uint8))


tokens = st.builds(
    random_tokens, st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 9), st.integers(1, 7), st.integers(1, 4)
)
budgets = st.one_of(
    st.sampled_from([0, 0.3, 0.5, 0.9]).map(lambda q: {"rate": q, "max_tokens": 1000}),
    st.sampled_from([1, 42.5, 127.5, 255]).map(lambda tau: {"threshold": tau}),
    st.integers(1, 20).map(lambda most: {"max_tokens": most}),
)
configs = st.builds(
    lambda budget, least: EVSConfig(**budget, selection="paper", min_tokens_per_unit=least), budgets, st.integers(0, 3)
)


def test_every_scorer_has_a_reference() -> None:
    assert REFERENCES.keys() == {name for name, selection in SELECTIONS.items() if isinstance(selection, Scorer)}
    assert all(name == selection.name for name, selection in SELECTIONS.items())
    assert tuple(SELECTIONS) == SELECTION_NAMES and EVSConfig().selection == SELECTION_NAMES[0] == "learned"
    with pytest.raises(ConfigError, match="selection got 'best'; allowed: learned or contrast or paper"):
        named_selection("best")


@pytest.mark.parametrize("name", REFERENCES)
@given(clip=tokens, config=configs)
def test_scores_and_the_fused_choice_are_those_of_the_reference(
    name: str, clip: torch.Tensor, config: EVSConfig
) -> None:
    scorer = SELECTIONS[name]
    assert isinstance(scorer, Scorer)
    scores = REFERENCES[name](clip.numpy())
    assert scorer.score(clip).tolist() == scores.tolist()
    units, per_unit, _ = clip.shape
    budget, least = token_budget(units, per_unit, config, stock_count=True), config.min_tokens_per_unit
    assert scorer.top(clip, budget, least).tolist() == Scorer.top(scorer, clip, budget, least).tolist()
    assert scorer.select(Clip(clip, (units, 1, per_unit)), config)[:per_unit].tolist() == list(range(per_unit))


NOISE = 10
"""Mean change of a pixel below which a token of a clip that goes on is no news."""


def going_on(clip: torch.Tensor, previous: torch.Tensor, config: EVSConfig, saved: int) -> list[int]:
    """What is kept of a clip that goes on, with sorting and sets."""
    units, per_unit, values = clip.shape
    flat = pixel_change(np.concatenate([previous.numpy()[None], clip.numpy()]))[1:].reshape(-1)
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
    always = set()
    for t in range(units):
        always |= set([i for i in order if i // per_unit == t][: config.min_tokens_per_unit])
    rest = [i for i in order if i not in always]
    if config.threshold:
        rest = [i for i in rest if flat[i] >= config.threshold * values]
        room = len(rest) if config.max_tokens is None else config.max_tokens - len(always)
    else:
        most = token_budget(units, per_unit, config, continues=True, stock_count=True, saved=saved)
        news = sum(1 for score in flat if score >= max(NOISE * values, 1))
        room = min(most, news) - len(always)
    return sorted(always | set(rest[: max(room, 0)])) or order[:1]


@given(clip=tokens, config=configs, seed=st.integers(0, 9))
def test_a_clip_that_goes_on_is_compared_with_what_was_before_it(
    clip: torch.Tensor, config: EVSConfig, seed: int
) -> None:
    units, per_unit, values = clip.shape
    previous, saved = clip[0] if seed < 4 else random_tokens(seed, 1, per_unit, values, 3)[0], seed % (per_unit + 1)
    after = Clip(clip, (units, 1, per_unit)).after(Anchors(previous, (1, per_unit), saved))
    plan = make_plan(after, replace(config, encoder="reuse", encoder_refresh=0))
    assert plan.kept.tolist() == going_on(clip, previous, config, saved)
    whole_unit = sorted({*range(per_unit), *plan.kept.tolist()})
    assert plan.computed.tolist() == (whole_unit if plan.encoder == "reuse" else list(range(units * per_unit)))
    assert (plan.encoder == "full") == (len(whole_unit) == units * per_unit), "as all of it is computed"


def test_a_chunk_in_which_nothing_changed_keeps_one_token() -> None:
    still = torch.full((4, 6, 48), 77, dtype=torch.uint8)
    clip = Clip(still, (4, 2, 3), TokenPixels(1, 3, 1, 4))
    for name, options in product(SELECTIONS, [{"threshold": 5, "encoder": "reuse"}, {"rate": 0.5}, {"max_tokens": 9}]):
        config, selection = EVSConfig(**options, selection=name), SELECTIONS[name]
        first = make_plan(clip, config)
        following = clip.after(selection.anchors(torch.from_numpy(first.kept), clip, config))
        plan = make_plan(following, config)
        assert plan.kept.tolist() == [0] and plan.counts.tolist() == [1, 0, 0, 0]
        assert plan.unchanged and not first.unchanged
    assert token_floor(4, 6, 0, continues=True) == 1 and token_floor(4, 6, 2, continues=True) == 8


def test_another_selection_can_be_handed_in() -> None:
    class LastUnit(PixelChange):
        name = "last"

        def score(self, tokens: torch.Tensor) -> torch.Tensor:
            units, per_unit, _ = tokens.shape
            return (
                torch.arange(units, dtype=torch.int32)[:, None] * torch.ones(per_unit, dtype=torch.int32)
            ).contiguous()

        top = Scorer.top

    clip = Clip(random_tokens(1, 5, 4, 3, 4), (5, 2, 2))
    plan = make_plan(clip, EVSConfig(rate=0.6), LastUnit())
    assert plan.counts.tolist() == [4, 0, 0, 0, 4]
