# SPDX-License-Identifier: Apache-2.0
"""bench.answers: how scenes are asked about, settings, the report and the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.answers import report
from bench.answers.ask import Case, answers, choose
from bench.answers.features import PatchFeatures
from bench.answers.model import clip_positions
from bench.answers.scenes import PLAIN, Maker
from bench.answers.settings import Settings, Way
from bench.common.pretrained_tower import random_tower
from bench.selection import ways
from bench.selection.clips import as_clip
from evs_vllm.errors import ConfigError
from tests.unit.test_answers_model import reader

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "answers"
SMOKE = Settings.from_yaml(CONFIGS / "smoke.yaml")


# asking


@pytest.fixture
def features(tmp_path):
    return PatchFeatures(random_tower(2, 64, 0), (3, 4), tmp_path)


def test_features_are_those_of_the_tower_patch_by_patch(features):
    frames = Maker("drawn", (3, 4), 4).make(1).frames
    got = features.of(frames)
    assert got.shape == (4, 12, 4 * 64) and got.dtype == torch.float16
    with torch.inference_mode():
        patches = features.tower.run(features.tower.embed(torch.from_numpy(frames)))[:, 1:].view(4, 6, 8, 64)
    # Token (1, 2) has the patches (2, 4), (2, 5), (3, 4) and (3, 5).
    wanted = torch.cat([patches[:, row, column] for row in (2, 3) for column in (4, 5)], dim=-1)
    cosine = torch.nn.functional.cosine_similarity(got[:, 6].float(), wanted, dim=-1)
    assert cosine.min() > 0.999
    features.tower.run = None
    assert torch.equal(features.of(frames), got)


def test_towers_that_compute_less(features):
    scene = Maker("drawn", (3, 4), 6).make(2)
    computed = torch.rand(6, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    computed[0] = True
    patches = torch.ones(6, 6, 8, dtype=torch.bool)
    for token in range(12):
        row, column = 2 * (token // 4), 2 * (token % 4)
        patches[:, row : row + 2, column : column + 2] = computed[:, token, None, None]
    rows = torch.cat([torch.ones(6, 1, dtype=torch.bool), patches.flatten(1)], dim=1)
    full = features.of(scene.frames)
    for mode in ("reuse", "skip"):
        got = features.of(scene.frames, computed, mode)
        assert not got[~computed].any()
        with torch.inference_mode():
            wanted = features.tower.run(features.tower.embed(torch.from_numpy(scene.frames)), rows, mode)[:, 1:]
        wanted = wanted.view(6, 3, 2, 4, 2, 64).permute(0, 1, 3, 2, 4, 5).reshape(6, 12, -1)
        # bfloat16 against fp32, and another result than that of the whole tower.
        off, other = ((got - each.float())[computed].norm() / wanted[computed].norm() for each in (wanted, full))
        assert off < 0.02 and 2 * off < other


def test_every_way_shows_as_many_tokens(features):
    scene = Maker("drawn", (3, 4), 12, 1.0).make(5)
    case = Case(scene, SMOKE, features, 5)
    full = features.of(scene.frames).flatten(0, 1)
    for rate, count in ((0.5, 72), (0.75, 36)):
        for way in SMOKE.all_ways():
            shown, kept = case.prompt(way, rate), case.kept[way.selection, rate]
            assert len(shown.features) == len(kept) and set(range(12)) <= set(kept.tolist())
            assert len(kept) == (len(case.kept["stream", rate]) if "stream" in way.selection else count)
            assert torch.equal(shown.features, full[kept]) == (way.tower == "full")
            grid = (12, 3, 4)
            assert torch.equal(shown.positions, clip_positions(kept, grid, way.positions)[0])
    assert not torch.equal(case.kept["stream", 0.5], case.kept["as stream", 0.5])
    assert case.share_kept("paper", 0.75) == 0.25
    everything = case.prompt(SMOKE.all_ways()[0], 0.0)
    assert torch.equal(everything.features, full) and everything.text_from == 24
    assert case.computed["learned", "skip", 0.75] == 0.25 <= case.computed["learned", "reuse", 0.75]


def test_a_stream_is_planned_chunk_by_chunk(features):
    """What a chunk keeps depends on nothing that comes later, as in a conversation that grows."""
    maker = Maker("drawn", (3, 4), 12)
    case = Case(maker.make(3), SMOKE, features, 3)
    frames = case.scene.frames.copy()
    frames[8:] = frames[8:, ::-1]
    other = choose(ways.Scene("other", frames, as_clip(frames), case.full), 36, 0.75, "stream").flatten()
    kept = torch.zeros(144, dtype=torch.bool)
    kept[case.kept["stream", 0.75]] = True
    assert torch.equal(kept[: 8 * 12], other[: 8 * 12]) and not torch.equal(kept, other)


def test_answers_are_those_of_one_scene_at_a_time(features):
    maker = Maker("drawn", (3, 4), 12, 0.5)
    cases = [Case(maker.make(number), SMOKE, features, number) for number in range(10)]
    model = reader(features=features.width)
    way = Way("learned", "keep", "full")
    together = answers(model, cases, way, 0.5)
    assert together == [right for case in cases for right in answers(model, [case], way, 0.5)]
    assert len(together) == sum(len(case.questions) for case in cases)


def test_a_selection_that_keeps_another_number_is_refused(features, monkeypatch):
    monkeypatch.setattr("bench.answers.ask.choose", lambda known, count, rate, selection: torch.ones(12, 12) > 0)
    with pytest.raises(RuntimeError, match="learned keeps 144 tokens of drawn 0, not 72"):
        Case(Maker("drawn", (3, 4), 12).make(0), SMOKE, features, 0)


# settings, report, the whole


def test_settings():
    full, small, choose = (Settings.from_yaml(CONFIGS / f"{name}.yaml") for name in ("full", "small", "choose"))
    assert {full.train, small.train, choose.train} == {"train"}
    assert (full.ask, small.ask, choose.ask) == ("report", "report", "choose")
    assert small.training() == choose.training() and small.ways == full.ways
    for bad, message in (
        ({"ask": "train"}, "train and ask are both train"),
        ({"ask": "test"}, "train and ask got test"),
        ({"ways": [["paper", "keep", "half"]]}, "ways: tower got half"),
        ({"ways": [["stream", "keep", "reuse"]]}, "stream and as stream are asked with tower full only"),
        ({"models": ["control"]}, "models has to begin with base"),
    ):
        with pytest.raises(ConfigError, match=message):
            Settings(**bad)


def some_result(right):
    questions = [["count", "how many were there ?", "two"], ["count", "how many were there ?", "one"],
                 ["last", "what colour came last ?", "red"]]  # fmt: skip
    scenes = [
        {"name": str(n), "kind": "photo", "camera": PLAIN, "light": PLAIN, "cut": None, "questions": questions}
        for n in range(4)
    ]
    way = {"selection": "learned", "positions": "keep", "tower": "full"}
    points = [{"seed": seed, "model": "base", **way, "rate": 0.0, "right": text} for seed, text in enumerate(right)]
    return {"settings": {"ways": [["learned", "keep", "full"]]}, "scenes": scenes, "points": points}


def test_intervals_are_of_scenes():
    told = report.Answers(some_result(["111000111000", "111000000000"]))
    shares = told.shares("base", ("paper", "sequential", "skip"), 0.0)  # at rate 0 all ways are one
    assert shares.tolist() == [1, 1, 1, 0, 0, 0, 0.5, 0.5, 0.5, 0, 0, 0]
    assert told.shares("base", ("learned", "keep", "full"), 0.5) is None
    # Four scenes at 1, 0, .5, 0: a mean's standard error is .21, of which the interval is about 1.96 times.
    assert told.interval(shares) == pytest.approx(100 * 1.96 * 0.207, abs=5)
    assert told.interval(np.ones(12)) == 0
    assert told.most_frequent() == pytest.approx(100 * 2 / 3)


@pytest.mark.slow
def test_smoke(tmp_path):
    """The command itself, in small and without a network; a second run goes on from the first one's models."""
    environment = os.environ | {"PIP_NO_INDEX": "1", "TMPDIR": str(tmp_path)}
    arguments = ["--smoke", "--threads", "1", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    command = [sys.executable, "-m", "bench.answers", *arguments]
    told = []
    for _ in range(2):
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        told.append((run.stdout, json.loads((tmp_path / "out" / "answers.json").read_text())))
    (first, result), (again, same) = told
    assert "base 0, step 4/4" in first and "step" not in again.split("# What")[0]
    assert result["points"] == same["points"] and result["scenes"] == same["scenes"]
    ways, rates, models = (len(result["settings"][key]) for key in ("ways", "ask_rates", "models"))
    assert len(result["points"]) == models * (1 + ways * rates)
    questions = sum(len(scene["questions"]) for scene in result["scenes"])
    assert all(len(point["right"]) == questions for point in result["points"])
    text = (tmp_path / "out" / "answers.md").read_text()
    assert text == report.markdown(same) and "| whole units | keep | full |" in text
