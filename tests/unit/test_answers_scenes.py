# SPDX-License-Identifier: Apache-2.0
"""The scenes and questions of bench.answers: what is seen against the pixels, answers against what is seen."""

from pathlib import Path

import numpy as np
import pytest

from bench.answers.questions import NUMBER_OF, TASKS, VOCABULARY, ask_about
from bench.answers.scenes import COLOURS, PLAIN, SHAPES, Maker, Seen, joined
from bench.answers.settings import Settings
from bench.selection.clips import TOKEN

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
