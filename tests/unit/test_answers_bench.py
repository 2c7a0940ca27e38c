# SPDX-License-Identifier: Apache-2.0
"""bench.answers: questions against what is seen, scenes against their pixels, the model against itself asked alone."""

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
from bench.answers.model import PADDING, Prompt, Reader, Shape, clip_positions, collate, visible
from bench.answers.questions import NUMBER_OF, TASKS, VOCABULARY, Question, ask_about
from bench.answers.scenes import COLOURS, PLAIN, SHAPES, Maker, Seen, joined
from bench.answers.settings import Settings, Way
from bench.answers.train import STRIDES, Known, _labelled, align, draw_view, new_model, prompt_of, strides_of, train
from bench.common.pretrained_tower import random_tower
from bench.selection import ways
from bench.selection.clips import TOKEN, as_clip
from evs_vllm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "answers"
SMOKE = Settings.from_yaml(CONFIGS / "smoke.yaml")


# questions


def track(number, colours, x=(0.5, 0.5), y=(0.5, 0.5), shape="disc", at=0):
    """An object from unit `at` on, one colour a unit, moving evenly."""
    steps = np.linspace(0, 1, len(colours))
    return {
        at + t: Seen(number, colour, shape, x[0] + (x[1] - x[0]) * step, y[0] + (y[1] - y[0]) * step)
        for t, (colour, step) in enumerate(zip(colours, steps))
    }


def units_of(count, *tracks):
    return tuple(tuple(each[t] for each in tracks if t in each) for t in range(count))


RED = track(0, ["red"] * 12, x=(0.17, 0.83), y=(0.17, 0.17))
BLUE = track(1, ["blue"] * 6 + ["green"] * 2, x=(0.5, 0.5), y=(0.83, 0.83), shape="ring", at=2)
WHITE = track(2, ["white"] * 4, x=(0.83, 0.83), y=(0.5, 0.5), shape="square", at=8)
UNITS = units_of(12, RED, BLUE, WHITE)


def asked(task, units, words=None):
    """The answers that many draws give, by question."""
    found = {}
    for seed in range(200):
        for question in ask_about(units, np.random.default_rng(seed), [task]):
            found.setdefault(" ".join(question.words), set()).add(question.answer)
    return found if words is None else found[words]


@pytest.mark.parametrize(
    "task, words, answer, backwards",
    [
        ("first", "what colour came first ?", {"red"}, None),  # backwards red and white come together
        ("last", "what colour came last ?", {"white"}, {"green"}),
        ("shape", "what shape came last ?", {"square"}, {"ring"}),
        ("where", "where was red in the end ?", {"top-right"}, {"top-left"}),
        ("where", "where was white in the end ?", {"middle-right"}, {"middle-right"}),
        ("when", "when came red ?", {"start"}, {"start"}),
        ("stays", "was white there in the end ?", {"yes"}, {"no"}),
        ("count", "how many were there ?", {"three"}, {"three"}),
        ("change", "what became of blue ?", {"green"}, None),
        ("change", "what became of green ?", None, {"blue"}),
        ("move", "how did red move ?", {"rightwards"}, {"leftwards"}),
        ("move", "how did white move ?", {"not"}, {"not"}),
        ("order", "came white or red first ?", {"red"}, None),
    ],
)
def test_questions_have_the_answer_that_can_be_seen(task, words, answer, backwards):
    for units, wanted in ((UNITS, answer), (UNITS[::-1], backwards)):
        assert asked(task, units).get(words) == wanted


def test_what_has_no_one_answer_is_not_asked():
    two_red = units_of(12, RED, track(1, ["red"] * 4, at=4))
    assert not asked("where", two_red) and not asked("order", two_red) and not asked("change", two_red)
    assert set(asked("when", two_red)) == {f"when came {colour} ?" for colour in COLOURS if colour != "red"}
    assert asked("count", two_red) == {"how many were there ?": {"two"}}
    at_a_border = units_of(12, track(0, ["red"] * 12, x=(0.35, 0.35)))
    assert not asked("where", at_a_border)
    at_a_third = units_of(12, track(0, ["red"] * 8, at=4))
    assert "when came red ?" not in asked("when", at_a_third)
    assert asked("when", units_of(12, track(0, ["red"] * 6, at=6)), "when came red ?") == {"halfway"}
    assert asked("at", units_of(10, track(0, ["red"] * 10)))["what was there at five tenths ?"] == {"red"}
    assert "what was there at five tenths ?" not in asked("at", units_of(10, track(0, ["red"] * 5, at=5)))


def test_where_every_colour_is_there_none_is_asked_for_that_is_not():
    units = units_of(12, *(track(number, [colour] * 12) for number, colour in enumerate(COLOURS)))
    assert {answer for told in asked("when", units).values() for answer in told} == {"start"}


def test_every_word_is_known():
    maker = Maker("drawn", (3, 4), 16, cuts=0.5)
    tasks = set()
    for number in range(40):
        for question in ask_about(maker.make(number).seen, np.random.default_rng(number)):
            tasks.add(question.task)
            assert all(VOCABULARY[NUMBER_OF[word]] == word for word in (*question.words, question.answer))
            assert question.words[-1] == "?"
    assert tasks == set(TASKS)


# scenes


def test_a_scene_shows_what_it_says():
    """Where an object is said to be, its colour is; where it is not yet, another picture is."""
    maker = Maker("drawn", (5, 5), 12)
    checked = 0
    for number in range(40):
        scene = maker.make(number)
        if scene.light != PLAIN:
            continue
        height, width = scene.frames.shape[1:3]
        for frame, unit in zip(scene.frames, scene.seen):
            for seen in unit:
                if seen.shape == "ring":  # has a hole in the middle
                    continue
                y, x = (min(n - 4, max(3, round(at * n))) for at, n in ((seen.y, height), (seen.x, width)))
                mean = frame[y - 3 : y + 4, x - 3 : x + 4].reshape(-1, 3).mean(0)
                close = {
                    name: np.abs(mean / mean.max() - np.array(rgb) / max(rgb)).sum() for name, rgb in COLOURS.items()
                }
                assert min(close, key=close.get) == seen.colour
                checked += 1
    assert checked > 50


def test_scenes_are_the_same_again_and_differ():
    first, again, other = (Maker("drawn", (3, 4), 8).make(number) for number in (3, 3, 4))
    assert first.frames.shape == (8, 3 * TOKEN, 4 * TOKEN, 3) and first.frames.dtype == np.uint8
    assert np.array_equal(first.frames, again.frames) and first.seen == again.seen
    assert not np.array_equal(first.frames, other.frames)


def test_a_cut_joins_two_scenes():
    maker = Maker("drawn", (3, 4), 12, cuts=1.0)
    for number in range(6):
        scene = maker.make(number)
        before = {seen.number for unit in scene.seen[: scene.cut] for seen in unit}
        after = {seen.number for unit in scene.seen[scene.cut :] for seen in unit}
        assert 3 <= scene.cut <= 9 and len(scene.seen) == len(scene.frames) == 12 and not before & after
        uncut = Maker("drawn", (3, 4), 12).make(number)
        assert np.array_equal(scene.frames[: scene.cut], uncut.frames[: scene.cut])
        assert np.abs(scene.frames[scene.cut].astype(int) - uncut.frames[scene.cut]).mean() > 5
    one = (Seen(0, "red", "disc", 0.5, 0.5),)
    assert joined([one, one], [one]) == (one, one, (one[0]._replace(number=1),))
    assert joined([()], [one])[1] == one


def test_all_shapes_and_masks():
    from bench.answers.scenes import _mask

    masks = [_mask(shape, 40, 10) > 0 for shape in SHAPES]
    assert all(0.2 < mask.mean() < 0.9 for mask in masks)
    assert all((a != b).mean() > 0.05 for i, a in enumerate(masks) for b in masks[:i])


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
