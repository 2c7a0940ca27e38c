# SPDX-License-Identifier: Apache-2.0
"""The smoke version of bench/quality: a model is trained here, and a broken path costs it its answers."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import transformers

import evs_vllm.hf.prompt
from bench.quality import ask as quality_ask
from bench.quality import lab as quality
from bench.quality import models as quality_models
from bench.quality import report, shown
from evs_kernels import select_topk
from evs_vllm.config import EVSConfig
from evs_vllm.core.budget import token_budget
from evs_vllm.core.clip import Clip
from evs_vllm.core.scorers import SELECTIONS, PixelChange
from evs_vllm.errors import ConfigError
from evs_vllm.families.qwen2_vl import GRID, PIXELS
from evs_vllm.options import SELECTION_NAMES
from evs_vllm.train.data import ChatCollator, as_item
from evs_vllm.train.synthetic import CONDITIONS, TASKS, SceneSettings, make_example

ROOT = Path(__file__).resolve().parents[2]
MORE_WRONG = ("compare: [[paper, keep, full, [0.3]]]", "clips: 7\nscene: {conditions: [noise, pan]}")
SMOKE = ROOT / "configs" / "quality" / "smoke.yaml"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    settings = quality.Settings.from_yaml(SMOKE)
    return settings, folder, quality.measure(settings, folder, jobs=2)


def find(result, model, selection="evs", rate=0.5, tower="full", positions="keep"):
    wanted = {"model": model, "selection": selection, "rate": rate, "tower": tower, "positions": positions}
    (point,) = (point for point in result["points"] if wanted.items() <= point.items())
    return point


@pytest.mark.slow
def test_the_lab_learns_and_tells_good_from_bad(smoke):
    _, _, result = smoke
    assert find(result, "base", rate=0)["accuracy"] > 80, "training"
    uptrained = find(result, "uptrained")
    assert uptrained["tokens"] == 18 and uptrained["accuracy"] > 70, "training"
    assert find(result, "uptrained", tower="reuse")["accuracy"] > uptrained["accuracy"] - 5, "reuse"
    assert find(result, "base")["readable"] > find(result, "base", "random_unit0")["readable"]


@pytest.mark.slow
def test_selections_positions_and_towers_are_crossed(smoke):
    _, _, result = smoke
    for model in ("base", "uptrained"):
        whole, *others = (find(result, model, "frames", 0.5, tower, "sequential") for tower in quality_models.TOWERS)
        assert whole["tokens"] == 18 and all(other["right"] == whole["right"] for other in others), "whole units"
        assert find(result, model, "cosine", 0.5, "skip", "sequential")["tokens"] == 18


@pytest.mark.slow
def test_a_variant_asked_alone_and_sharing_nothing_gives_the_same(smoke):
    settings, folder, result = smoke
    base = quality_models.train_base(folder, settings, 0)  # finds what is there
    for line in settings.compare:
        (alone,) = quality_ask.ask(base, quality.unseen(settings), [(quality_ask.Variant(*line), 0.5)], share=False)
        selection, positions, tower = line
        assert alone.items() <= find(result, "base", selection, 0.5, tower, positions).items(), line


def test_the_faster_tower_is_the_stock_tower(tmp_path):
    settings = quality_models.Settings(scene={"rows": 2, "columns": 3})
    folder = quality_models.untrained(tmp_path, settings, 0)
    generator = torch.Generator().manual_seed(5)
    grids = torch.tensor([[3, 4, 6], [5, 4, 6]])
    pixels = torch.randn(8 * 24, 3 * 2 * 14 * 14, generator=generator)
    load = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained
    stock, fast = load(folder), quality_models.speed_up(load(folder))
    results = []
    for model in (stock, fast):
        embeds = torch.cat(model.model.get_video_features(pixels, grids, return_dict=True).pooler_output)
        embeds.square().sum().backward()
        results.append((embeds.detach(), [weight.grad for weight in model.model.visual.parameters()]))
    (expected, gradients), (embeds, others) = results
    assert embeds.shape == (8 * 6, 128)
    torch.testing.assert_close(embeds, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


def test_processing_clip_by_clip_is_the_stock_processing(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    shapes = [(4, 3, 56, 84), (6, 3, 28, 56), (4, 3, 56, 84), (5, 3, 30, 61)]
    clips = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]
    given = {"videos": clips, "do_sample_frames": False, "return_tensors": "pt"}
    given["size"] = {"shortest_edge": 28 * 28, "longest_edge": 24 * 28 * 28}
    processor = quality_models.Qwen2VLVideoProcessor()
    stock = processor(**given)
    kind = type(processor)
    monkeypatch.setattr(kind, "_preprocess", quality_models._clip_by_clip(kind._preprocess))
    ours = processor(**given)
    assert stock.keys() == ours.keys()
    for key, values in stock.items():
        assert torch.equal(values, ours[key]) and values.dtype == ours[key].dtype, key


@pytest.mark.slow
def test_it_notices_what_is_broken(smoke, monkeypatch):
    settings, folder, result = smoke
    uptrained = quality_models.train_further(folder, settings, 0, "uptrained")  # finds what is there
    examples = quality.unseen(settings)
    good = find(result, "uptrained")

    def ask():
        (point,) = quality_ask.ask(uptrained, examples, [(quality_ask.Variant(), 0.5)])
        return point

    assert ask()["right"] == good["right"], "asking again gives the same"
    stock = evs_vllm.hf.prompt.lay_out

    def still(token_ids, items):
        return torch.zeros_like(stock(token_ids, items)[0]), 0

    with monkeypatch.context() as broken:
        broken.setattr(evs_vllm.hf.prompt, "lay_out", still)
        assert ask()["accuracy"] < good["accuracy"] - 20, "positions"

    class LeastChanged(PixelChange):
        def top(self, tokens, budget, min_per_unit):
            return select_topk(-self.score(tokens), budget).indices

    with monkeypatch.context() as broken:
        broken.setitem(SELECTIONS, SELECTION_NAMES[0], LeastChanged())
        assert ask()["tasks"]["last"] < good["tasks"]["last"] - 10, "selection"


@pytest.mark.slow
def test_it_notices_broken_training(smoke, monkeypatch, tmp_path):
    settings, _, result = smoke
    stock = ChatCollator._labels
    with monkeypatch.context() as broken:
        broken.setattr(ChatCollator, "_labels", lambda *args: stock(*args).roll(1))
        checkpoint = quality_models.train_base(tmp_path, settings, 0)
    (point,) = quality_ask.ask(checkpoint, quality.unseen(settings), [(quality_ask.Variant(), 0.0)])
    assert point["accuracy"] < 20 < find(result, "base", rate=0)["accuracy"] - 40


@pytest.mark.slow
def test_results_are_written(smoke, tmp_path):
    _, _, result = smoke
    json.dumps(result)
    tables, bars = report.markdown(result).split("**Bars**")
    assert "base, nothing dropped" in bars and "met" in bars
    table = tables.split("**All conditions**")[1].split("**By condition**")[0]
    assert table.count("\n| ") == 3 + len(report.lines_of(result)) and "still readable" in table
    report.plot(result, tmp_path / "p.svg")
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_workers_end_with_the_main_process():
    main = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from bench.quality import lab as quality
pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), quality._start, (1,))
print(pool.submit(os.getpid).result(), flush=True)
pool.submit(time.sleep, 600).result()
"""
    process = subprocess.Popen([sys.executable, "-c", main], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process.stdout as printed:
        worker = psutil.Process(int(printed.readline()))
    assert worker.is_running()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    with contextlib.suppress(psutil.NoSuchProcess):  # gone
        while worker.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                worker.kill()
                pytest.fail("the worker goes on")
            time.sleep(0.1)


def test_conditions_take_turns():
    settings = quality.Settings(scene={"conditions": CONDITIONS}, clips=20)
    examples = quality.unseen(settings)
    assert [example.condition for example in examples] == [*CONDITIONS] * 4
    assert len({example.frames.tobytes() for example in examples}) == 20


def test_readable_is_what_the_kept_tokens_show():
    tasks = set()
    for seed in range(40):
        example = make_example(SceneSettings(units=12), seed)
        everything = np.arange(72)
        assert quality_ask.readable(example, everything, 6)
        begins = np.array([visit.begin * 6 + visit.cell for visit in example.visits])
        assert quality_ask.readable(example, begins, 6)
        squares = [unit * 6 + v.cell for v in example.visits for unit in range(v.begin, v.end)]
        assert not quality_ask.readable(example, np.setdiff1d(everything, squares), 6)
        # By one visit alone only that one is seen: which one a question needs follows from its answer's colour.
        alone = [quality_ask.readable(example, begins[n : n + 1], 6) for n in range(len(begins))]
        if example.task == "count":
            assert alone == [len(begins) == 1] * len(begins)
        else:
            wanted = example.visits[-1].colour if example.task == "where" else example.answer
            assert alone == [visit.colour == wanted for visit in example.visits]
        tasks.add(example.task)
    assert tasks == set(TASKS)


def test_the_scene_is_readable_from_the_latest_token():
    checked = 0
    for seed in range(30):
        example = make_example(SceneSettings(conditions=("cuts",), tasks=("scene",)), seed)
        if example.scene[0] == example.answer:
            continue
        checked += 1
        first, last = np.arange(6), np.array([6 * example.asked + 4])
        assert not quality_ask.readable(example, first, 6)
        assert quality_ask.readable(example, np.concatenate([first, last]), 6)
        assert not quality_ask.readable(example, np.concatenate([first, last + 6]), 6), "that is later"
        assert not quality_ask.readable(example, last + 6, 6)
    assert checked > 10


def test_a_clip_without_a_model_is_what_the_processor_makes(tmp_path):
    scene = SceneSettings(units=6, rows=2, columns=3)
    folder = quality_models.untrained(tmp_path, quality_models.Settings(), 0)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    adapter = quality_ask.FAMILY.bind(transformers.AutoConfig.from_pretrained(folder), processor=processor)
    example = make_example(scene, 3)
    inputs = ChatCollator(processor)([as_item(example)])
    expected = adapter.clip({PIXELS: inputs["pixel_values_videos"], GRID: inputs["video_grid_thw"][0]})
    found = shown.clip_of(example, scene)
    assert torch.equal(found.tokens, expected.tokens)
    assert (found.grid, found.pixels) == (expected.grid, expected.pixels)


def test_what_is_shown_is_counted():
    settings = quality.Settings(scene={"conditions": ["still", "cuts"], "tasks": ["last", "scene"]}, clips=40)
    examples = quality.unseen(settings)
    points = shown.measure(settings, examples)
    found = {(p["selection"], p["rate"], p["condition"], p["kind"]): (p["clips"], p["readable"]) for p in points}
    assert len(found) == len(points) == len(shown.WAYS) * 4 * 3
    assert found["evs", 0.5, "still", "square"] == (20, 100) and found["frames", 0.95, "still", "square"][1] < 50
    clips = [found["evs", 0.9, "cuts", kind][0] for kind in ("square", "scene")]
    assert sum(clips) == 20 and clips[1] == sum(example.task == "scene" for example in examples)
    settings = {"scene": {"conditions": ["still", "cuts"]}, "clips": 40}
    result = {"points": points, "settings": settings, "seed": 5, "seconds": 1}
    table = shown.markdown(result | {"environment": {"time_utc": "today", "command": "c"}})
    assert table.count("\n| ") == 4 * 3 and "| still | square | 0.5 | 100.0 |" in table


def test_a_focus_is_on_the_time_that_is_asked_for():
    tasks = ("when", "first")
    for example in (make_example(SceneSettings(tasks=tasks), seed) for seed in range(12)):
        focus = quality_ask.Variant("focus").settings(0.9, example).focus
        if example.task == "first":
            assert focus is None
            continue
        tenths = int(example.question.split(" tenths")[0].split()[-1])
        ((start, end, weight),) = focus
        # A unit is a second, the clip 32; the last unit that begins before the time is in it.
        assert end == np.ceil(3.2 * tenths) and start == max(0, end - 9.6) and weight > 1
        starts = np.array(quality_ask.unit_starts(example))
        assert ((starts < end) == (starts < 3.2 * tenths)).all() and len(starts) == 32
        assert quality_ask.Variant().settings(0.9, example).focus is None


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "quality").glob("*.yaml")), ids=lambda path: path.stem)
def test_settings_are_read(path, tmp_path):
    assert quality.Settings.from_yaml(path).scenes.units > 1
    for wrong in ("speed: 1", "compare: [[best, keep, full]]", "compare: [[random, keep, reuse]]", *MORE_WRONG):
        (tmp_path / "s.yaml").write_text(wrong)
        with pytest.raises(ConfigError):
            quality.Settings.from_yaml(tmp_path / "s.yaml")


def test_the_interval_of_three_seeds():
    assert report.interval([90.0, 92.0, 94.0]) == pytest.approx(4.30 * 2 / 3**0.5)
    assert report.interval([90.0]) == 0


QUESTIONS = [["noise", "last"]] * 50 + [["pan", "when"]] * 25 + [["pan", "scene"]] * 25


def made_up(model, rate, noise, when=0, scene=0, seed=0, selection="evs", tower="full"):
    """A point with so many right answers, of 50 and twice 25."""
    point = {"seed": seed, "model": model, "selection": selection, "positions": "keep", "tower": tower, "rate": rate}
    right = "".join("1" * good + "0" * (count - good) for good, count in ((noise, 50), (when, 25), (scene, 25)))
    return point | {"right": right, "shown": "1" * 100, "tokens": 9 if selection == "paper" else 11}


def test_bars_are_read_off_the_points():
    points = [made_up("base", 0.0, 50, 24, 25), made_up("base", 0.75, 48, 20, 20), made_up("base", 0.9, 40, 15, 25)]
    points += [
        made_up("base", 0.9, 30, 15, 20, selection="random_unit0"),
        made_up("base", 0.9, 39, 15, 25, tower="reuse"),
    ]
    points += [
        made_up("base", 0.75, 49, 10, 20, selection="paper"),
        made_up("base", 0.9, 39, 18, 25, selection="paper"),
    ]
    points += [made_up("base", 0.9, 40, 20, 24, selection="focus")]
    for seed, gain in enumerate((1, 2, 6)):
        points += [made_up("control", 0.9, 40, seed=seed), made_up("uptrained", 0.9, 40, gain, seed=seed)]
    engine = [{"seed": 0, "model": "base", "rate": 0.0, "right": points[0]["right"][:48] + "00"}]
    bars = report.bars({"points": points, "engine": engine, "questions": QUESTIONS})
    found = {bar["what"]: (round(bar["measured"], 6), bar["met"]) for bar in bars}
    assert found == {
        "base, nothing dropped, worst condition (pan)": (98, True),
        "plug-in EVS below dense, q=0.75, noise": (4, False),
        "uptrained above control, q=0.9 (95 % interval \u00b1 6.6)": (3, True),  # of 1, 2 and 6
        "EVS above random tokens with unit 0, q=0.9": (15, True),
        "base: reuse below the full tower, worst rate (q=0.9)": (1, False),
        "EVS below paper, worst condition and rate (pan, q=0.9)": (6, False),
        "EVS above paper, pan, q=0.75 (95 % interval \u00b1 0.0)": (20, True),
        "EVS above paper, pan, q=0.9 (95 % interval \u00b1 0.0)": (-6, False),
        "focus above none where a time is asked for, q=0.9": (8, True),
        "base: vLLM and transformers agree, worst rate (q=0)": (96, False),
    }


def test_tables_have_each_condition_and_kind_of_question():
    points = [made_up("base", 0.0, 50, 24, 25), made_up("base", 0.9, 40, 15, 24)]
    points += [made_up("base", 0.9, 39, 18, 20, selection="paper"), made_up("base", 0.9, 40, 20, 25, selection="focus")]
    settings = {"clips": 100, "curriculum": [[32, 5]], "seeds": [0]}
    environment = {"time_utc": "today", "command": "python -m bench.quality"}
    result = {"points": points, "engine": [], "questions": QUESTIONS, "settings": settings, "seconds": 1}
    text = report.markdown(result | {"environment": environment})
    for row in (
        "| base | evs | keep | full | 99.0 | 79.0 |",
        "| base | paper | keep | full |  | 77.0 |",
        "| *tokens kept* | evs |  |  | 11 | 11 |",
        "| *tokens kept* | paper |  |  |  | 9 |",
        "| noise | base | evs | 100.0 | 80.0 |",
        "| pan | base | paper |  | 76.0 |",
        "| pan | *readable* | evs | 100.0 | 100.0 |",
        "| pan | square | evs | 96.0 | 60.0 |",
        "| pan | scene | paper |  | 80.0 |",
        "| pan | 78.0 | 90.0 |",
    ):
        assert f"\n{row}\n" in text, row


@pytest.mark.parametrize("count", [6, 7, 19, 48])
def test_other_selections_keep_as_many_tokens(count):
    clip = Clip(torch.zeros(8, 6, 12, dtype=torch.uint8), (8, 2, 3))
    config = EVSConfig(max_tokens=count)
    generator = np.random.default_rng(0)
    for keep_first in (False, True):
        kept = quality_ask.RandomTokens(keep_first, generator).select(clip, config)
        assert len(kept) == token_budget(8, 6, config) == count and kept.tolist() == sorted(set(kept.tolist()))
        assert not keep_first or kept[:6].tolist() == list(range(6))
    frames = quality_ask.WholeUnits().select(clip, config).view(-1, 6)
    assert len(frames) == count // 6 and (frames[:, 0] % 6 == 0).all() and (frames.diff() == 1).all()
    embeddings = torch.ones(8, 6, 4)
    embeddings[3:, 2] *= torch.tensor([1.0, -1.0, 1.0, -1.0])  # slot 2 turns in unit 3
    kept = quality_ask.EmbeddingChange([embeddings.view(48, 4)]).select(clip, config)
    assert len(kept) == count and kept[:6].tolist() == list(range(6)) and (count == 6 or 3 * 6 + 2 in kept)
