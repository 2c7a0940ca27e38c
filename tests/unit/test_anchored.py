# SPDX-License-Identifier: Apache-2.0
"""The selections `learned` and `contrast` against the plain reference, and what they promise."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evs_vllm.config import EVSConfig
from evs_vllm.core.clip import Anchors, Clip, TokenPixels
from evs_vllm.core.descriptors import Contrast, Descriptor
from evs_vllm.core.learned import WEIGHTS, Learned
from evs_vllm.core.selection import make_plan
from evs_vllm.errors import UnsupportedError
from tests.reference import appearance
from tests.reference import selection as plain
from tests.reference.hf import Settings

DESCRIPTORS: dict[str, Descriptor] = {"contrast": Contrast(), "learned": Learned()}
both = pytest.mark.parametrize("name", DESCRIPTORS)


def clip_of(frames: np.ndarray, unit_frames: int, merge: int, side: int) -> Clip:
    """Rows of pixels in the order that `TokenPixels` says, of whole units of frames of whole tokens."""
    units, rows, columns = (
        len(frames) // unit_frames,
        frames.shape[1] // (merge * side),
        frames.shape[2] // (merge * side),
    )
    cut = frames.reshape(units, unit_frames, rows, merge, side, columns, merge, side, 3)
    tokens = np.ascontiguousarray(cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)).reshape(units, rows * columns, -1)
    return Clip(torch.from_numpy(tokens), (units, rows, columns), TokenPixels(merge, 3, unit_frames, side))


def cells_of(frames: np.ndarray, unit_frames: int, token: int) -> np.ndarray:
    tops, lefts = (list(range(0, size, token)) for size in frames.shape[1:3])
    return appearance.pictures(frames, unit_frames, tops, lefts, token)


def drawn(kind: str, count: int, height: int, width: int, seed: int) -> np.ndarray:
    """Frames of one of several kinds: what is equal, what moves a little, what has no contrast, what comes back."""
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.integers(0, 256, (count, height, width, 3)).astype(np.uint8)
    if kind == "black and white":
        return (rng.integers(0, 2, (count, height, width, 3)) * 255).astype(np.uint8)
    if kind == "flat":
        return np.broadcast_to(rng.integers(0, 256, (count, 1, 1, 3)), (count, height, width, 3)).astype(np.uint8)
    if kind == "flicker":
        few = rng.integers(0, 256, (3, height, width, 3))
        return few[rng.integers(0, 3, count)].astype(np.uint8)
    scene = rng.integers(0, 256, (height, width, 3))
    frames = np.stack([np.roll(scene, t // 2, axis=1) for t in range(count)])
    frames[:, height // 2 :] = frames[0, height // 2 :]  # half of it stands still
    return np.clip(frames + rng.integers(-2, 3, (count, 1, 1, 1)), 0, 255).astype(np.uint8)


KINDS = ["noise", "black and white", "flat", "moving", "flicker"]


def drawn_case(seed: int, units: int) -> tuple[np.ndarray, int, int, int]:
    rng = np.random.default_rng(seed)
    unit_frames, merge = [(1, 1), (1, 3), (2, 2)][rng.integers(3)]
    token = merge * int(rng.integers(-(-4 // merge), 8))
    rows, columns = [(1, 1), (1, 5), (4, 1), (2, 3), (3, 3)][rng.integers(5)]
    count = unit_frames * int(rng.integers(1, units + 1))
    frames = drawn(str(rng.choice(KINDS)), count, rows * token, columns * token, seed)
    return frames, unit_frames, merge, token // merge


def drawn_budget(seed: int) -> Settings:
    rng = np.random.default_rng(seed)
    kind = rng.integers(3)
    return Settings(
        rate=float(rng.choice([0.1, 0.5, 0.75, 0.9, 0.99])) if kind == 0 else 0.0,
        threshold=float(rng.choice([0.25, 3, 12.5, 40, 120, 255])) if kind == 1 else None,
        min_tokens_per_unit=int(rng.choice([0, 0, 1, 2, 4])),
        max_tokens=int(rng.integers(1, 30)) if kind == 2 or rng.random() < 0.5 else None,
    )


seeds = st.integers(0, 2**32)
"""A case is drawn from one: Hypothesis would draw the first of everything most of the time."""


def cases(units: int) -> st.SearchStrategy[tuple[np.ndarray, int, int, int]]:
    """Frames, frames in a unit, patches along a token, side of a patch."""
    return seeds.map(lambda seed: drawn_case(seed, units))


@both
@settings(max_examples=40)
@given(case=cases(units=3))
def test_descriptors_are_those_of_the_reference_bit_for_bit(name: str, case: tuple[np.ndarray, int, int, int]) -> None:
    frames, unit_frames, merge, side = case
    described = DESCRIPTORS[name].describe(clip_of(*case))
    assert described.dtype == torch.uint8 and described.is_contiguous()
    expected = appearance.DESCRIBE[name](cells_of(frames, unit_frames, merge * side))
    assert described.tolist() == expected.tolist()


def config_of(asked: Settings) -> EVSConfig:
    return EVSConfig(
        rate=asked.rate or None,
        threshold=asked.threshold,
        selection=asked.selection,
        min_tokens_per_unit=asked.min_tokens_per_unit,
        max_tokens=asked.max_tokens,
    )


@both
@settings(max_examples=120)
@given(case=cases(units=7), asked=seeds.map(drawn_budget), continues=st.booleans())
def test_what_stays_is_what_the_reference_keeps(
    name: str, case: tuple[np.ndarray, int, int, int], asked: Settings, continues: bool
) -> None:
    asked = replace(asked, selection=name)
    frames, unit_frames, merge, side = case
    clip = clip_of(*case)
    looks = appearance.DESCRIBE[name](cells_of(frames, unit_frames, merge * side))
    saved = None
    if continues:  # the clip again from its start, after its end
        saved = int(np.random.default_rng(looks.size).integers(looks.shape[1] + 1))
        previous = Anchors(DESCRIPTORS[name].describe(clip)[-1], clip.grid[1:], saved)
        clip, looks = clip.after(previous), np.concatenate([looks[-1:], looks])
    plan = make_plan(clip, config_of(asked))
    assert plan.kept.tolist() == plain.choose(looks, asked, saved).tolist()
    assert plan.unchanged == (continues and plain.news(looks, asked) == 0)


@both
@pytest.mark.parametrize("rate", [0.3, 0.8, 0.95])
def test_a_clip_of_several_blocks_of_units(name: str, rate: float) -> None:
    """Kept units are chosen for 32 units at a time; what stands at the end of a block goes on into the next."""
    seed = int(np.random.default_rng().integers(2**32))
    frames = drawn("moving", 70, 8, 16, seed)
    asked = Settings(rate, selection=name, min_tokens_per_unit=int(rate < 0.9))
    kept = make_plan(clip_of(frames, 1, 2, 4), config_of(asked)).kept
    assert kept.tolist() == plain.select(cells_of(frames, 1, 8), asked).tolist(), seed


def anchor_distances(looks: np.ndarray, kept: np.ndarray) -> list[int]:
    """Of every token that was dropped the distance from the last kept one at its place."""
    units, per_unit, _ = looks.shape
    stays = np.zeros(units * per_unit, dtype=bool)
    stays[kept] = True
    stays, out = stays.reshape(units, per_unit), []
    for p in range(per_unit):
        for t in range(units):
            if stays[t, p]:
                anchor = looks[t, p]
            else:
                out.append(appearance.distance(looks[t, p], anchor))
    return out


@both
@settings(max_examples=40)
@given(case=cases(units=8), threshold=st.floats(0.1, 60))
def test_nothing_dropped_differs_from_its_anchor_by_the_threshold(
    name: str, case: tuple[np.ndarray, int, int, int], threshold: float
) -> None:
    clip = clip_of(*case)
    kept = make_plan(clip, EVSConfig(threshold=threshold, selection=name)).kept
    looks = DESCRIPTORS[name].describe(clip).numpy().astype(int)
    assert max(anchor_distances(looks, kept), default=0) < threshold * DESCRIPTORS[name].unit


def scene(seed: int, height: int, width: int) -> np.ndarray:
    """A picture with shapes of several sizes: sums of coarse and fine noise."""
    rng = np.random.default_rng(seed)
    out = np.full((height, width, 3), 110.0)
    for size in (16, 8, 4):
        coarse = rng.normal(0, 28, (height // size + 1, width // size + 1, 3))
        out += coarse.repeat(size, 0).repeat(size, 1)[:height, :width]
    return out.clip(16, 239)


def getting_lighter() -> np.ndarray:
    """Brightness grows by less than a grey level a unit, contrast with it."""
    start = scene(3, 48, 64)
    return np.stack([np.round(start * (1 + t / 160)) for t in range(60)]).clip(0, 255).astype(np.uint8)


def panning() -> np.ndarray:
    """A smooth slope of light of which a frame shows a little more than the one before."""
    y, x = np.mgrid[0:48, 0:400]
    wide = 120 + 60 * np.sin(x / 22) + 40 * np.cos(y / 15 + x / 35)
    wide = np.stack([wide, wide[::-1], 240 - wide], axis=-1).clip(0, 255)
    return np.stack([np.round(wide[:, t // 2 : t // 2 + 64]) for t in range(60)]).astype(np.uint8)


@both
@pytest.mark.parametrize("make", [getting_lighter, panning])
def test_what_changes_slowly_is_kept_in_the_end(name: str, make: object) -> None:
    """Compared with the unit before, no token ever changes by as much; compared with what was last shown, it does."""
    frames = make()  # type: ignore[operator]
    clip = clip_of(frames, 1, 2, 8)
    looks = DESCRIPTORS[name].describe(clip).numpy().astype(int)
    steps = np.abs(looks[1:] - looks[:-1]).sum(axis=2)
    threshold = (float(steps.max()) + 1) / DESCRIPTORS[name].unit
    plan = make_plan(clip, EVSConfig(threshold=threshold, selection=name))
    assert plan.counts[1] == 0 and plan.num_kept > plan.tokens_per_unit
    # The paper's rule, at the lowest threshold that calls none of these steps a change.
    pixels = clip.tokens.numpy().astype(int)
    paper = float(np.abs(pixels[1:] - pixels[:-1]).mean(axis=2).max()) + 0.01
    assert make_plan(clip, EVSConfig(threshold=paper, selection="paper")).num_kept == plan.tokens_per_unit


@both
@pytest.mark.parametrize("setting", [{"rate": 0.75}, {"threshold": 10}])
def test_the_whole_scene_after_a_cut_is_kept_once(name: str, setting: dict[str, float]) -> None:
    before, after = scene(5, 48, 64), 255 - scene(6, 48, 64)
    frames = np.stack([before] * 4 + [after] * 4).astype(np.uint8)
    plan = make_plan(clip_of(frames, 1, 2, 8), EVSConfig(**setting, selection=name))
    assert plan.counts.tolist() == [12, 0, 0, 0, 12, 0, 0, 0]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@both
def test_equal_pixels_have_equal_descriptors_however_they_are_described(name: str) -> None:
    """In a longer clip, by more threads, and where torch may round products: in a training step, or by its settings."""
    frames = drawn("noise", 3, 30 * 8, 32 * 8, seed=int(np.random.default_rng().integers(2**32)))
    frames = frames[[0, 1, 0, 2, 1]]  # 960 tokens a unit, so the network takes them in several pieces
    clip, describe = clip_of(frames, 1, 2, 4), DESCRIPTORS[name].describe
    whole = describe(clip)
    assert torch.equal(whole[0], whole[2]) and torch.equal(whole[1], whole[4])
    assert not torch.equal(whole[0], whole[1])
    for units in (1, 2, 3):
        start = describe(clip_of(frames[:units], 1, 2, 4))
        assert torch.equal(start, whole[:units])
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(describe(clip), whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(describe(clip), whole)
    for lower in ("high", "medium"):
        with precision(lower):
            assert torch.equal(describe(clip), whole)


@both
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_describes_as_a_cpu_does(name: str) -> None:
    frames = drawn("noise", 3, 96, 128, seed=int(np.random.default_rng().integers(2**32)))
    clip = clip_of(frames, 1, 2, 8)
    for lower in ("highest", "high"):
        with precision(lower):
            there = DESCRIPTORS[name].describe(replace(clip, tokens=clip.tokens.cuda()))
            assert torch.equal(there.cpu(), DESCRIPTORS[name].describe(clip))


@both
def test_a_clip_that_does_not_say_where_its_pixels_are(name: str) -> None:
    """`paper` compares values one by one and needs no more; what looks at pictures does."""
    clip = clip_of(drawn("noise", 4, 16, 24, seed=1), 1, 2, 4)
    bare = Clip(clip.tokens, clip.grid)
    with pytest.raises(UnsupportedError, match=r"where in a token its pixels are \(Clip\.pixels\).*'paper'"):
        make_plan(bare, EVSConfig(rate=0.5, selection=name))
    one, other = (make_plan(c, EVSConfig(rate=0.5, selection="paper")).kept.tolist() for c in (bare, clip))
    assert one == other


def test_sums_of_the_network_stay_where_float32_is_exact() -> None:
    """Whatever the pixels: with the largest inputs and the worst signs, no sum of a layer leaves 24 bits."""
    largest = 128
    for weight, bias, _ in appearance.layers():
        assert (np.abs(weight).sum(axis=0) * largest + np.abs(bias)).max() < 2**24
        largest = 255


def test_inputs_of_the_network_are_as_small_as_that_supposes() -> None:
    for kind in KINDS:
        inputs = appearance.network_inputs(cells_of(drawn(kind, 2, 16, 24, seed=4), 1, 8))
        assert inputs.min() >= -128 and inputs.max() <= 127


def test_the_numbers_of_the_network_are_those_that_were_written() -> None:
    """Next to them stands the hash that `bench.descriptor` printed."""
    with np.load(WEIGHTS) as arrays:
        numbers = {name: arrays[name] for name in arrays.files if name != "made"}
        made = json.loads(str(arrays["made"]))
    kinds = {"weight": np.int16, "bias": np.int32, "shifts": np.int8}
    assert all(values.dtype == kinds[name.rstrip("0123456789")] for name, values in numbers.items())
    written = b"".join(numbers[name].tobytes() for name in sorted(numbers))
    assert made["sha256"] == hashlib.sha256(written).hexdigest()
