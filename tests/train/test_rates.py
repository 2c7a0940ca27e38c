# SPDX-License-Identifier: Apache-2.0
"""The generator of rates and selections, and the recipe file."""

import json
import random

import numpy as np
import pytest
import torch

from evs_vllm.cli import main
from evs_vllm.errors import ConfigError
from evs_vllm.train.rates import RateSampler, RateSettings
from evs_vllm.train.recipe import Recipe


def test_ranks_draw_the_same_and_nobody_disturbs_them():
    one, two = RateSampler(RateSettings(seed=3)), RateSampler(RateSettings(seed=3))
    drawn = []
    for _ in range(50):
        drawn.append(one.draw())
        np.random.rand(3), random.random(), torch.rand(2)
        assert two.draw() == drawn[-1]
    assert len(set(drawn)) > 40
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    one.draw()
    assert torch.equal(torch.rand(1), expected)
    assert RateSampler(RateSettings(seed=4)).draw() != drawn[0]


@pytest.mark.parametrize(
    ("settings", "mean"),
    [
        (RateSettings("beta", alpha=2, beta=1, high=0.9), 0.6),
        (RateSettings("beta", alpha=1, beta=3, low=0.2, high=0.6), 0.3),
        (RateSettings("uniform", low=0.1, high=0.5), 0.3),
        (RateSettings("list", values=(0, 0.3, 0.9)), 0.4),
    ],
)
def test_distributions(settings, mean):
    sampler = RateSampler(settings)
    drawn = np.array([sampler.draw() for _ in range(4000)])
    low, high = (0, 0.9) if settings.values else (settings.low, settings.high)
    assert drawn.min() >= low and drawn.max() <= high and abs(drawn.mean() - mean) < 0.02
    if settings.values:
        assert set(drawn) == set(settings.values)


def test_the_stream_goes_on_where_it_was():
    sampler = RateSampler(RateSettings())
    [sampler.draw() for _ in range(7)]
    state = json.loads(json.dumps(sampler.state()))
    ahead = [sampler.draw() for _ in range(5)]
    resumed = RateSampler(RateSettings())
    resumed.restore(state)
    assert [resumed.draw() for _ in range(5)] == ahead
    with pytest.raises(ConfigError, match="Resume with the same"):
        RateSampler(RateSettings(alpha=3)).restore(state)


@pytest.mark.parametrize(
    "wrong",
    [
        {"distribution": "normal"},
        {"low": 0.5, "high": 0.4},
        {"high": 1.0},
        {"alpha": 0},
        {"values": (0.5,)},
        {"selections": ("learned", "best")},
        {"distribution": "list"},
        {"distribution": "list", "values": (1.0,)},
    ],
)
def test_rate_settings_are_checked(wrong):
    with pytest.raises(ConfigError):
        RateSettings(**wrong)


def test_selections_are_drawn_beside_the_rates():
    settings = RateSettings(selections=("learned", "paper"))
    one, two = RateSampler(settings), RateSampler(settings)
    drawn = [(one.draw(), one.draw_selection()) for _ in range(400)]
    assert drawn == [(two.draw(), two.draw_selection()) for _ in range(400)]
    assert 150 < sum(name == "paper" for _, name in drawn) < 250 and {name for _, name in drawn} == {"learned", "paper"}
    state = json.loads(json.dumps(one.state()))
    ahead = [(one.draw(), one.draw_selection()) for _ in range(5)]
    two.restore(state)
    assert [(two.draw(), two.draw_selection()) for _ in range(5)] == ahead
    with pytest.raises(ConfigError, match="Resume with the same"):
        RateSampler(RateSettings()).restore(state)
    # Where none are named, nothing is drawn for them, and checkpoints are those of before there were any.
    plain, asked = RateSampler(RateSettings()), RateSampler(RateSettings())
    for _ in range(5):
        assert asked.draw_selection() is None and asked.draw() == plain.draw()
    assert "selections" not in plain.state()["settings"]


GOOD = {"model": "m", "data": {"train": "t.jsonl"}, "trainer": {"output_dir": "o"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 1}, "speed"),
        ({"model": None}, "'model' is missing"),
        ({"trainer": {"max_steps": 2}}, "output_dir"),
        ({"trainer": {"output_dir": "o", "remove_unused_columns": True}}, "set by the recipe"),
        ({"data": {}}, "either 'train'"),
        ({"data": {"train": "a", "synthetic": {}}}, "either 'train'"),
        ({"data": {"synthetic": {"unit": 2}}}, "unit"),
        ({"rates": {"high": 2}}, "high"),
        ({"eval_rates": [1]}, "eval_rates"),
        ({"lora": {"rank": 2}}, "rank"),
        ({"lora": {}, "freeze_vision": True}, "freeze_vision"),
        ({"data": 3}, "mapping"),
    ],
)
def test_recipes_are_checked(change, message):
    Recipe.from_mapping(GOOD)
    with pytest.raises(ConfigError, match=message):
        Recipe.from_mapping(GOOD | change)


@pytest.mark.parametrize("name", ["qwen2_5_vl_lora", "synthetic"])
def test_example_recipes_are_valid(name, request):
    Recipe.from_yaml(request.config.rootpath / "configs" / "train" / f"{name}.yaml")


def test_a_bad_recipe_is_one_line(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    for content, message in (("a: [", "not YAML"), ("model: x", "data must be"), (json.dumps(GOOD | {"x": 1}), "x in")):
        path.write_text(content)
        assert main(["uptrain", "--config", str(path)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
