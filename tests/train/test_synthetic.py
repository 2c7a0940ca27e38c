# SPDX-License-Identifier: Apache-2.0
"""The synthetic clips: what they show is what is asked."""

import hashlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from evs_vllm.errors import ConfigError, EVSError
from evs_vllm.train.codec import through_h264, to_mp4
from evs_vllm.train.data import ChatCollator, DrawnDataset
from evs_vllm.train.synthetic import COLOURS, CONDITIONS, SCENES, TASKS, SceneSettings, make_example


@pytest.fixture
def processor(reference):
    return reference("qwen2_5_vl").processor


SMALL = SceneSettings(units=5)


def square_of(frame, cell=28, square=14):
    """Finds the square by its pixels alone: (cell, colour), or None if there is none."""
    margin = (cell - square) // 2
    best = None
    for row in range(frame.shape[0] // cell):
        for column in range(frame.shape[1] // cell):
            inner = frame[row * cell + margin :, column * cell + margin :][:square, :square].astype(int)
            for name, rgb in COLOURS.items():
                distance = np.abs(inner - np.array(rgb)).mean()
                if best is None or distance < best[0]:
                    best = (distance, row * (frame.shape[1] // cell) + column, name)
    return best[1:] if best[0] < 15 else None


@pytest.mark.parametrize("settings", [SceneSettings(units=12), SceneSettings(units=36, strides=(3,))])
def test_answers_are_what_the_pixels_show(settings):
    tasks, times, out_of_sight = {}, [], 0
    for seed in range(60):
        example = make_example(settings, seed)
        assert example.frames.shape == (24, 56, 84, 3)
        seen = [square_of(example.frames[2 * unit]) for unit in range(12)]
        first, *others = [square for square in seen if square is not None]
        visits = [first]
        for square in others:
            visits += [square] if square != visits[-1] else []
        out_of_sight += seen[-1] is None
        expected = {
            "where": str(visits[-1][0] + 1),
            "last": visits[-1][1],
            "first": visits[0][1],
            "count": str(len(visits)),
        }
        if example.task == "when":
            tenths = int(example.question.split()[7])
            times.append(tenths)
            begun = seen[: -(-tenths * 12 // 10)]  # units that began before that time
            expected["when"] = [square for square in begun if square is not None][-1][1]
        assert example.answer == expected[example.task]
        tasks[example.task] = tasks.get(example.task, 0) + 1
    assert set(tasks) == set(TASKS) and len(set(times)) > 4 and 30 < out_of_sight < 60
    assert np.array_equal(make_example(SMALL, 5).frames, make_example(SMALL, 5).frames)
    for wrong in (
        {"square": 30},
        {"noise": 128},
        {"tasks": ("why",)},
        {"rows": 1, "columns": 1},
        {"units": 0},
        {"strides": ()},
        {"units": 4, "strides": (1, 3)},
        {"strides": (0,)},
        {"h264": (9, 60)},
    ):
        with pytest.raises(ConfigError):
            SceneSettings(**wrong)


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        (SceneSettings(), "61da259b5f77c164"),
        (SceneSettings(units=12, strides=(1, 2, 4), lost=0.8, texture=None), "b4001b008fd13e39"),
        (SceneSettings(rows=3, columns=4, cell=20, square=9, noise=0), "727a08231d131623"),
    ],
)
def test_clips_are_those_that_the_demos_model_was_trained_on(settings, digest):
    """Digests of what the module drew before it knew conditions."""
    found = hashlib.sha256()
    for number in range(20):
        example = make_example(settings, [3, number])
        found.update(example.frames.tobytes())
        found.update(f"{example.fps} {example.task} {example.question} {example.answer}".encode())
        assert example.condition == "noise" and example.scene == ()
    assert found.hexdigest()[:16] == digest


def backgrounds(example):
    """The frames of each unit, and where no square is in any unit: (T, H, W, 3) float and (H, W)."""
    units = example.frames[::2].astype(float)
    free = np.ones(units.shape[1:3], bool)
    for visit in example.visits:
        row, column = divmod(visit.cell, 3)
        free[row * 28 : row * 28 + 28, column * 28 : column * 28 + 28] = False
    return units, free


def test_still_clips_are_still_and_noise_is_noise():
    for seed in range(8):
        for condition, most in (("still", 0), ("noise", 12)):
            units, free = backgrounds(make_example(SceneSettings(conditions=(condition,)), seed))
            changes = np.abs(units - units[0])[:, free]
            assert changes.max() == most or not free.any()


def test_light_falls_or_rises():
    directions = set()
    for seed in range(8):
        example = make_example(SceneSettings(conditions=("light",), noise=0, light=0.2), seed)
        units, free = backgrounds(example)
        if not free.any():
            continue
        light = units[:, free].mean(axis=(1, 2))
        falls = light[0] > light[-1]
        directions.add(bool(falls))
        light, words = (light, example.scene) if falls else (light[::-1], example.scene[::-1])
        assert (np.diff(light) < 0).all() and abs(light[-1] / light[0] - 0.2 ** (1 / 2.2)) < 0.01
        stops = np.log(light / light[0]) / np.log(light[-1] / light[0])
        assert list(words) == [SCENES["light"][1][min(2, int(3 * stop + 0.001))] for stop in stops]
    assert directions == {True, False}
    # A clip that is sampled more rarely shows the same light at the same time.
    whole, rare = (
        {make_example(SceneSettings(conditions=("light",), strides=(stride,)), seed).scene for seed in range(8)}
        for stride in (1, 8)
    )
    assert len(whole) == 2 and rare == {scene[::8] for scene in whole}


def shift_between(one, other, free):
    """By how many pixels the background moved to the right between two pictures; it has to fit exactly."""

    def misses(shift):
        left, right = max(0, shift), min(84, 84 + shift)
        both = free[:, left:right] & free[:, left - shift : right - shift]
        difference = np.abs(one[:, left:right] - other[:, left - shift : right - shift])[both]
        return difference.mean() if both.any() else 0

    found = min(range(-6, 7), key=misses)
    assert misses(found) == 0
    return found


def test_the_camera_turns_behind_the_cells():
    words = set()
    for seed in range(12):
        example = make_example(SceneSettings(conditions=("pan",), noise=0, pan=5.0), seed)
        units, free = backgrounds(example)
        at = np.cumsum([0, *(shift_between(one, other, free) for one, other in pairwise(units))])
        if free.mean() < 0.3:
            continue
        steps = np.abs(np.diff(at))
        assert 1 <= np.median(steps) <= 5 and max(at) - min(at) <= 84
        for word, limits in zip(SCENES["pan"][1], ((0, 28), (28, 56), (56, 84)), strict=True):
            here = [place for place, shown in zip(at, example.scene, strict=True) if shown == word]
            words |= {word} if here else set()
            assert not here or max(here) - min(here) <= 1 + limits[1] - limits[0]
        order = [SCENES["pan"][1].index(word) for word in example.scene]
        assert all(
            (later - earlier) * (b - a) >= 0 for (earlier, a), (later, b) in pairwise(zip(at, order, strict=True))
        )
    assert words == set(SCENES["pan"][1])


def test_cuts_are_between_three_scenes():
    shown = {}
    for seed in range(8):
        example = make_example(SceneSettings(conditions=("cuts",), noise=0), seed)
        units, free = backgrounds(example)
        pieces = [0]
        for before, now, (one, other) in zip(
            example.scene[:-1], example.scene[1:], pairwise(units[:, free]), strict=True
        ):
            assert (before == now) == np.array_equal(one, other) or not free.any()
            pieces = [*pieces, 1] if before != now else [*pieces[:-1], pieces[-1] + 1]
        pieces[0] += 1
        assert all(3 <= piece <= 8 for piece in pieces[:-1]) and len(pieces) > 3
        for word, unit in zip(example.scene, units, strict=True):
            known = shown.setdefault(word, np.full(unit.shape, -1.0))
            both = free[..., None] & (known >= 0)
            assert (known[both] == unit[both]).all(), "all clips have the same three scenes"
            known[free] = unit[free]
    assert set(shown) == {"1", "2", "3"}


def test_frames_tell_cells_apart_whatever_moves_behind_them():
    edge = np.ones((28, 28), bool)
    edge[2:-2, 2:-2] = False
    for condition in CONDITIONS:
        settings = SceneSettings(conditions=(condition,), noise=0, frame=2, light=0.9999)
        plain, framed = (make_example(replace(settings, frame=width), 5) for width in (0, 2))
        cells, behind = (e.frames.reshape(64, 2, 28, 3, 28, 3).swapaxes(2, 3) for e in (framed, plain))
        hues = cells[0, :, :, 0, 0]
        assert len(np.unique(hues.reshape(6, 3), axis=0)) == 6
        assert (np.abs(cells[:, :, :, edge].astype(int) - hues[:, :, None]) <= 1).all()
        assert np.array_equal(cells[:, :, :, ~edge], behind[:, :, :, ~edge])
    with pytest.raises(ConfigError, match="frame"):
        SceneSettings(frame=8)


def test_a_tint_tells_scenes_apart_by_their_colour():
    for condition in ("cuts", "pan"):
        settings = SceneSettings(conditions=(condition,), noise=0)
        leaning = {}
        for seed in range(8):
            plain, tinted = (make_example(replace(settings, tint=width), seed) for width in (0, 40))
            assert tinted.scene == plain.scene
            for unit, word in enumerate(tinted.scene):
                means = [example.frames[2 * unit].astype(int).mean(axis=(0, 1)) for example in (tinted, plain)]
                leaning.setdefault(word, []).append(means[0] - means[1])
        means = {word: np.mean(found, axis=0) for word, found in leaning.items()}
        assert set(means) == set(SCENES[condition][1])
        for word, found in leaning.items():
            nearest = [min(means, key=lambda other, one=one: np.abs(one - means[other]).sum()) for one in found]
            assert np.mean([other == word for other in nearest]) > (0.99 if condition == "cuts" else 0.8)
    noise = [make_example(SceneSettings(tint=width), 3).frames for width in (0, 40)]
    assert np.array_equal(*noise), "nothing is asked for there"
    with pytest.raises(ConfigError, match="tint"):
        SceneSettings(tint=90)


@pytest.mark.parametrize("condition", SCENES)
def test_the_scene_is_asked_for_at_a_time(condition):
    settings = SceneSettings(conditions=CONDITIONS, tasks=(*TASKS, "scene"))
    asked = set()
    for seed in range(300):
        example = make_example(settings, seed)
        assert example.task != "scene" or example.condition in SCENES
        if example.task == "scene" and example.condition == condition:
            tenths = int(example.question.split(" tenths")[0].split()[-1])
            begun = [word for unit, word in enumerate(example.scene) if unit < tenths * 32 / 10]
            assert example.answer == begun[-1] and example.asked == len(begun) - 1
            asked.add(example.answer)
            if condition == "light":  # never where it just turns from one answer into the next
                assert 0.15 < 3 * example.asked / 31 % 1 < 0.85
    assert asked == set(SCENES[condition][1])


def test_conditions_are_drawn_and_checked():
    settings = SceneSettings(units=12, conditions=CONDITIONS)
    examples = [make_example(settings, seed) for seed in range(60)]
    assert {example.condition for example in examples} == set(CONDITIONS)
    # A condition changes nothing of what the square does.
    for example, seed in zip(examples, range(60), strict=True):
        one, other = (make_example(replace(settings, conditions=(name,)), seed) for name in ("noise", "cuts"))
        assert one.visits == other.visits == example.visits
    strided = make_example(SceneSettings(conditions=("cuts",), strides=(4,), noise=0), 3)
    whole = make_example(SceneSettings(conditions=("cuts",), noise=0), 3)
    assert strided.frames.shape[0] == whole.frames.shape[0] // 4
    for wrong in ({"conditions": ()}, {"conditions": ("rain",)}, {"light": 0}, {"light": 1.5}, {"pan": 0}):
        with pytest.raises(ConfigError):
            SceneSettings(**wrong)
    with pytest.raises(ConfigError, match="scene"):
        SceneSettings(tasks=("scene",), conditions=("noise", "pan"))


def test_lost_cells_are_grey_but_every_visit_is_seen():
    shares = []
    for seed in range(30):
        plain = make_example(SceneSettings(units=12, noise=0), seed)
        example = make_example(SceneSettings(units=12, noise=0, lost=0.8), seed)
        assert example.visits == plain.visits
        cells = example.frames.reshape(12, 2, 2, 28, 3, 28, 3)
        grey = (cells == 128).all(axis=(1, 3, 5, 6))
        same = (cells == plain.frames.reshape(cells.shape)).all(axis=(1, 3, 5, 6))
        assert (grey ^ same).all()
        for visit in example.visits:
            assert same[visit.begin].reshape(-1)[visit.cell]
            assert square_of(example.frames[2 * visit.begin])[1] == visit.colour
        shares.append(grey.mean())
    assert min(shares) < 0.2 and 0.6 < max(shares) < 0.9
    with pytest.raises(ConfigError, match="lost"):
        SceneSettings(lost=1.0)


def test_strides_make_clips_of_the_same_length_in_time(processor):
    settings = SceneSettings(units=12, strides=(1, 2, 4))
    examples = [make_example(settings, seed) for seed in range(30)]
    strides = [24 // len(example.frames) for example in examples]
    assert set(strides) == {1, 2, 4}
    assert all(len(example.frames) / example.fps == 12 for example in examples)
    batch = ChatCollator(processor)([DrawnDataset(settings, 8, 0)[number] for number in range(8)])
    units = batch["video_grid_thw"][:, 0].float()
    assert len(set(units.tolist())) > 1 and (units * batch["second_per_grid_ts"] == 12).all()


def test_h264_is_what_a_server_decodes(tmp_path):
    """The codec is lossy but close, gives the same bytes again, and OpenCV (vLLM's decoder) sees the same frames."""
    cv2 = pytest.importorskip("cv2")
    example = make_example(SceneSettings(units=6, noise=0), 4)
    encoded, seen = to_mp4(example.frames, fps=3), through_h264(example.frames)
    rng = np.random.default_rng(0)
    for _ in range(150):  # what was freed before must not matter: x264's assembly reads memory that nobody wrote
        _ = [rng.integers(0, 256, int(size), dtype=np.uint8) for size in rng.integers(1000, 200_000, 20)]
        assert np.array_equal(through_h264(example.frames), seen) and encoded == to_mp4(example.frames, fps=3)
    assert seen.shape == example.frames.shape
    difference = np.abs(seen.astype(int) - example.frames)
    swapped = np.abs(seen[..., ::-1].astype(int) - example.frames)
    assert 0 < difference.mean() < 10 and swapped.mean() > 2 * difference.mean(), "order of the colours"
    (tmp_path / "c.mp4").write_bytes(encoded)
    capture = cv2.VideoCapture(str(tmp_path / "c.mp4"))
    decoded = np.stack([capture.read()[1][..., ::-1] for _ in range(12)]).astype(int)
    assert capture.get(cv2.CAP_PROP_FPS) == 3 and not capture.read()[0]
    assert np.abs(decoded - seen).mean() < difference.mean() / 2, "they interpolate colours differently"
    with pytest.raises(EVSError, match="even"):
        to_mp4(np.zeros((2, 28, 27, 3), np.uint8))


def test_drawn_clips_through_h264():
    plain, coded = SceneSettings(units=6), SceneSettings(units=6, h264=(20, 30))
    first, same, raw = make_example(coded, 3), make_example(coded, 3), make_example(plain, 3)
    assert np.array_equal(first.frames, same.frames) and not np.array_equal(first.frames, raw.frames)
    assert (first.visits, first.question, first.answer) == (raw.visits, raw.question, raw.answer)
