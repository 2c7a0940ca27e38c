# SPDX-License-Identifier: Apache-2.0
"""The model of bench.answers against itself asked alone, and its training."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.answers.model import PADDING, Prompt, Reader, Shape, clip_positions, collate, visible
from bench.answers.questions import Question
from bench.answers.scenes import COLOURS, SHAPES, Maker, Seen
from bench.answers.settings import Settings
from bench.answers.train import STRIDES, Known, _labelled, align, draw_view, new_model, prompt_of, strides_of, train

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "answers"
SMOKE = Settings.from_yaml(CONFIGS / "smoke.yaml")


# the model


def reader(seed=0, features=24):
    torch.manual_seed(seed)
    model = Reader(features, Shape(width=64, layers=2, head=32)).eval()
    for weight in model.parameters():  # as trained ones: a new model answers nearly the same whatever it sees
        torch.nn.init.normal_(weight, std=0.3)
    return model


def prompt(seed, units=3, kept=None, questions=3, features=24):
    generator = torch.Generator().manual_seed(seed)
    grid = (units, 2, 3)
    kept = torch.arange(units * 6) if kept is None else kept
    positions, text_from = clip_positions(kept, grid)
    asked = [
        Question("count", ("how", "many", "were", "there", "?"), "two"),
        Question("last", ("what", "colour", "came", "last", "?"), "red"),
        Question("when", ("when", "came", "blue", "?"), "late"),
    ]
    rows = torch.randn(units * 6, features, generator=generator)[kept]
    return Prompt(rows, positions, text_from, asked[:questions])


def test_questions_side_by_side_are_answered_as_alone():
    model = reader()
    prompts = [prompt(1), prompt(2, units=5), prompt(3, kept=torch.tensor([0, 1, 2, 3, 4, 5, 9, 17]))]
    with torch.inference_mode():
        together = model(collate(prompts))
        alone = torch.cat([
            model(collate([Prompt(each.features, each.positions, each.text_from, [question])]))
            for each in prompts
            for question in each.questions
        ])  # fmt: skip
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)
    assert together.std(0).max() > 0.1


def test_only_what_was_asked_before_the_answer_counts():
    """Neither features of other clips nor later units move an earlier token, but all move the answer."""
    model = reader()
    batch = collate([prompt(1), prompt(2)])
    changed = collate([prompt(1), prompt(4)])
    with torch.inference_mode():
        one, other = model(batch), model(changed)
    torch.testing.assert_close(one[:3], other[:3])
    assert (one[3:] - other[3:]).abs().max() > 1e-2


def test_who_sees_whom():
    part = torch.tensor([[0, 0, 1, 1, 2, PADDING]])
    wanted = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert visible(part)[0, 0, :5, :5].int().tolist() == wanted
    assert not visible(part)[0, 0, :5, 5].any()


@pytest.mark.parametrize("seed", range(5))
def test_positions(seed):
    rng = np.random.default_rng(seed)
    units, rows, columns, ticks = (int(each) for each in rng.integers(1, 6, 4))
    kept = np.flatnonzero(rng.random(units * rows * columns) < 0.6)
    places, text_from = clip_positions(torch.from_numpy(kept), (units, rows, columns), ticks=ticks)
    everywhere = [[1 + t * ticks, 1 + y, 1 + x] for t in range(units) for y in range(rows) for x in range(columns)]
    assert places.tolist() == [everywhere[index] for index in kept]
    assert text_from == 1 + max(max(each) for each in everywhere)
    places, text_from = clip_positions(torch.from_numpy(kept), (units, rows, columns), "sequential", ticks)
    assert places.tolist() == [[1 + index] * 3 for index in range(len(kept))] and text_from == 1 + len(kept)


def test_positions_are_relative_and_count():
    model = reader()
    some = prompt(1)
    later = Prompt(some.features, some.positions + 5, some.text_from + 5, some.questions)
    elsewhere = Prompt(some.features, *clip_positions(torch.arange(18), (3, 2, 3), "sequential"), some.questions)
    batches = [collate([each]) for each in (some, later, elsewhere)]
    batches[1].positions[:, 0] += 5  # the first token, too
    with torch.inference_mode():
        plain, moved, other = (model(batch) for batch in batches)
    torch.testing.assert_close(plain, moved, atol=1e-3, rtol=1e-3)
    assert (plain - other).abs().max() > 1e-2


# training


def known(count=3, units=12):
    """Scenes whose frames, features and objects all say which scene and unit they are of."""
    found = []
    for scene in range(count):
        marks = np.arange(units) + 50 * scene
        frames = np.broadcast_to(marks[:, None, None, None].astype(np.uint8), (units, 84, 112, 3))
        features = torch.from_numpy(marks)[:, None, None].expand(-1, 12, 4).half()
        seen = tuple((Seen(0, "red", "disc", float(mark), 0.0),) for mark in marks)
        found.append(Known(np.ascontiguousarray(frames), features, seen))
    return found


def test_views_keep_frames_features_and_objects_together():
    scenes, lengths, steps, cuts = known(), set(), set(), 0
    for seed in range(300):
        view = draw_view(scenes, 12, np.random.default_rng(seed))
        marks = view.frames[:, 0, 0, 0].astype(int)
        assert view.features[:, 0, 0].int().tolist() == marks.tolist()
        assert [unit[0].x for unit in view.seen] == marks.tolist()
        assert len({seen[0].number for seen in view.seen}) == len(set(marks // 50)) or len(set(marks // 50)) == 1
        inside = np.diff(marks)[np.diff(marks // 50) == 0]
        assert set(np.abs(inside)) <= {view.ticks // 2} and len(set(np.sign(inside))) <= 1
        lengths.add(len(marks))
        steps |= set(inside.tolist())
        cuts += len(set(marks // 50)) > 1
    assert max(lengths) == 12 and min(lengths) >= 3 and steps == {s * stride for s in (-1, 1) for stride in STRIDES}
    assert cuts > 5


def test_short_views_are_thinner():
    assert strides_of(24, 24) == pytest.approx(STRIDES)
    assert set(strides_of(24, 12)) == {2, 3, 4} and sum(strides_of(24, 12).values()) == pytest.approx(1)
    assert set(strides_of(24, 6)) == set(strides_of(24, 3)) == {4}
    assert all(len(draw_view(known(), 3, np.random.default_rng(seed)).frames) <= 3 for seed in range(20))


def test_uptraining_drops_by_the_rate():
    scene = Maker("drawn", (3, 4), 12).make(0)
    features = torch.arange(144).view(12, 12, 1).expand(-1, -1, 4).half()
    rng = np.random.default_rng(1)
    view = draw_view([Known(scene.frames, features, scene.seen)], 12, rng)
    whole, half = (prompt_of(view, (3, 4), rate, np.random.default_rng(0)) for rate in (0.0, 0.5))
    assert len(whole.features) == 12 * len(view.frames) and len(half.features) == 6 * len(view.frames)
    place = {int(row[0]): position.tolist() for row, position in zip(whole.features, whole.positions)}
    assert all(place[int(row[0])] == position.tolist() for row, position in zip(half.features, half.positions))
    assert half.text_from == whole.text_from


@pytest.mark.slow
def test_training_learns():
    """Features that say the colour: after some steps the model does, too."""
    scenes = []
    for number in range(24):
        colour = list(COLOURS)[number % 6]
        features = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(number)) * 0.1
        features[..., number % 6] += 2
        seen = ((Seen(0, colour, "disc", 0.5, 0.5),),) * 4
        scenes.append(Known(np.zeros((4, 56, 56, 3), np.uint8), features.half(), seen))
    settings = Settings(grid=[2, 2], shape={"width": 64, "layers": 2, "head": 32})
    model = new_model(settings, scenes, 0)
    said: list[str] = []
    train(model, scenes, settings, [[4, 200, 8]], 2e-3, 0, log=said.append)
    assert float(said[-1].split()[-1].rstrip("%")) > float(said[0].split()[-1].rstrip("%"))
    rng = np.random.default_rng(0)
    prompts = [prompt_of(draw_view([each], 4, rng), (2, 2), 0.0, rng) for each in scenes]
    batch = collate([Prompt(p.features, p.positions, p.text_from, [q for q in p.questions if q.task == "first"])
                     for p in prompts])  # fmt: skip
    with torch.inference_mode():
        right = (model(batch).argmax(-1) == batch.answers).float().mean()
    assert len(batch.answers) > 12 and right > 0.9


def test_tokens_are_labelled_by_what_they_show():
    seen = (Seen(0, "red", "disc", 0.15, 0.1), Seen(1, "white", "ring", 0.8, 0.9))
    features = torch.arange(32).view(2, 16, 1).expand(-1, -1, 4).half()
    rows, labels = _labelled([Known(np.zeros((2, 112, 112, 3), np.uint8), features, (seen, ()))], (4, 4), 1)
    found = dict(zip(rows[:, 0].int().tolist(), labels.tolist()))
    red, white = 1 + list(COLOURS).index("red"), 1 + list(COLOURS).index("white")
    assert found[0] == [red, 1 + SHAPES.index("disc"), 0, 0] and found[15] == [white, 1 + SHAPES.index("ring"), 3, 3]
    assert 1 not in found and found[6] == [0, 0, 1, 2]  # at a border, and far from both
    assert [found[16 + place] for place in range(16)] == [[0, 0, place // 4, place % 4] for place in range(16)]


def test_aligning_teaches_the_merger_and_nothing_else():
    scenes = []
    for number in range(30):
        colour, shape = list(COLOURS)[number % 6], SHAPES[number % 4]
        features = 0.3 * torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(number))
        features[:, :, 6:22] += 2 * torch.eye(16)
        features[:, 5, number % 6] += 2
        features[:, 5, 22 + number % 4] += 2
        seen = ((Seen(0, colour, shape, 0.375, 0.375),),) * 2
        scenes.append(Known(np.zeros((2, 112, 112, 3), np.uint8), features.half(), seen))
    model = new_model(Settings(shape={"width": 64, "layers": 1, "head": 32}), scenes, 0)
    before, said = {name: value.clone() for name, value in model.state_dict().items()}, []
    align(model, scenes, (4, 4), 150, 0, said.append)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"merger.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert all(float(share.rstrip("%")) > 90 for share in said[0].split(": ")[1].split(", "))
