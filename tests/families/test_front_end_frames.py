# SPDX-License-Identifier: Apache-2.0
"""Whole frames that are made without their processor are its frames, and all else it returns is as it was."""

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evs_vllm.core.plan import RetentionPlan
from evs_vllm.families import front_end, watched
from evs_vllm.families.watched_vllm import WatchedInternVL
from evs_vllm.testing import real_clip_frames, synthetic_clip
from tests.families.facts import Facts
from tests.families.processing import (
    adapter_for,
    check_beside_each_other,
    pixels_in,
    plan_in,
    process,
    processor_for,
    prompt_for,
)
from tests.families.registry import families
from tests.families.test_front_end import noise, path_of, stock_of
from tests.reference import appearance, hf, selection

pytestmark = [pytest.mark.vllm, families(lambda facts: facts.makes_frames)]

SHAPES = ((5, 61, 83), (1, 150, 211), (9, 240, 130), (3, 97, 360), (2, 40, 31), (4, 5, 700))
"""Frames, height and width of clips: smaller than the model's frames, larger, and both at once."""


def random_shapes(count: int) -> list[tuple[int, int, int]]:
    rng = np.random.default_rng()
    return [tuple(map(int, rng.integers((1, 5, 5), (9, 300, 300)))) for _ in range(count)]  # type: ignore[misc]


def part_of(processor: Any) -> Any:
    """What sees to videos in Hugging Face's processor."""
    whole = processor.info.get_hf_processor()
    return getattr(whole, "video_processor", whole)


def paths_of(processor: Any, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Who may make frames of a shape: Pillow, from version 13 on, resizes tall ones in another order than we do."""
    pillow = isinstance(part_of(processor), WatchedInternVL)
    return ("rows", "processor") if pillow and shape[1] > shape[2] else ("rows",)


def packed(frames: torch.Tensor, plan: RetentionPlan) -> torch.Tensor:
    """The blocks of the computed tokens, one after the other in as few frames as hold them, block by block."""
    _, rows, columns = plan.grid
    side = frames.shape[-1] // columns
    out = torch.zeros(-(-len(plan.computed) // (rows * columns)), *frames.shape[1:], dtype=frames.dtype)

    def block(of: torch.Tensor, token: int) -> torch.Tensor:
        frame, place = divmod(token, rows * columns)
        row, column = divmod(place, columns)
        return of[frame, :, row * side : (row + 1) * side, column * side : (column + 1) * side]

    for number, token in enumerate(plan.computed.tolist()):
        block(out, number).copy_(block(frames, token))
    return out


def assert_same_fields(result: Any, stock: Any, pixels: str, item: int = 0) -> RetentionPlan:
    """All fields but the plan are those of stock vLLM; of pixels, the blocks of the tokens that are computed."""
    one, other = ({k: e.data for k, e in r["mm_kwargs"]["video"][item].items()} for r in (result, stock))
    plan = RetentionPlan.from_array(one.pop("evs_plan").numpy())
    assert one.keys() == other.keys()
    for name, expected in other.items():
        if name == pixels and plan.encoder == "reuse":
            expected = packed(expected, plan)
        assert one[name].dtype == expected.dtype and torch.equal(one[name], expected), name
    return plan


@pytest.fixture(scope="module")
def pixels(ours: Any) -> str:
    return adapter_for(ours).pixels


@pytest.mark.parametrize("encoder", ["default", "full"])
@pytest.mark.parametrize("chosen", ["learned", "paper"])
def test_fields_are_those_of_stock(ours: Any, stock: Any, facts: Facts, pixels: str, chosen: str, encoder: str) -> None:
    for shape in [*SHAPES, *random_shapes(8), (6, *facts.frame_size)]:
        frames = noise(*shape)
        for rate in (0.6, 0.9) if encoder == "default" else (0.6,):
            kwargs = {"evs_selection": chosen, "evs_rate": rate}
            kwargs |= {"evs_encoder": "full"} if encoder == "full" else {}
            result, path = path_of(lambda: process(ours, frames, **kwargs))  # noqa: B023
            assert path in paths_of(ours, shape), shape
            plan = assert_same_fields(result, process(stock, frames), pixels)
            reuses = encoder == "default" and shape[0] > 1 and not adapter_for(ours).why_not_reuse()
            assert plan.encoder == ("reuse" if reuses else "full")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pixels_of_half_precision(model: Path, pixels: str, dtype: str) -> None:
    on, off = (processor_for(model, evs, dtype=dtype) for evs in ({"rate": 0.6}, None))
    for shape in SHAPES[:3]:
        frames = noise(*shape)
        result, path = path_of(lambda: process(on, frames))  # noqa: B023
        assert path in paths_of(on, shape) and pixels_in(result).dtype == getattr(torch, dtype)
        assert_same_fields(result, process(off, frames), pixels)


def test_frames_of_a_real_clip(ours: Any, stock: Any, pixels: str) -> None:
    frames = real_clip_frames(frames=12)
    plan = assert_same_fields(process(ours, frames), process(stock, frames), pixels)
    assert 0 < plan.num_kept < plan.num_tokens


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(model: Path, stock: Any, pixels: str, threads: int) -> None:
    processor = processor_for(model, {"rate": 0.3, "processor_threads": threads})
    frames = noise(11, 130, 170)
    result, path = path_of(lambda: process(processor, frames))
    assert path == "rows"
    assert_same_fields(result, process(stock, frames), pixels)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"resample": 2}, {"do_resize": False}, {"size": {"height": 56, "width": 56}}, {"device": "cpu"},
        {"do_center_crop": True, "crop_size": {"height": 112, "width": 112}}, {"do_sample_frames": True},
        {"num_frames": 4}, {"image_size": 56}, {"image_size": 112}, {"return_metadata": True}, {"min_pixels": 300_000},
        {"max_pixels": 250_000},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)  # fmt: skip
def test_arguments_of_the_processor(ours: Any, stock: Any, facts: Facts, pixels: str, kwargs: dict[str, Any]) -> None:
    """What is answered is right, or refused; where stock vLLM fails, so do we."""
    for frames in noise(*SHAPES[2]), noise(8, *facts.frame_size):
        try:
            expected = process(stock, frames, **kwargs)
        except Exception:
            with pytest.raises(Exception):  # noqa: B017  (vLLM's own, whatever it is)
                process(ours, frames, **kwargs)
            continue
        if pixels_in(expected).ndim == 4 and tuple(pixels_in(expected).shape[-2:]) != facts.frame_size:
            continue  # the tower takes no such frames
        assert_same_fields(process(ours, frames, **kwargs), expected, pixels)


@families(lambda facts: facts.makes_frames and facts.tokens_under is None)
def test_what_stays_is_what_the_reference_keeps_of_the_source(ours: Any, facts: Facts) -> None:
    for shape in ((150, 211), (90, 61)):
        frames = synthetic_clip(7, shape, moving=0.2)
        for name in ("learned", "contrast"):
            plan = plan_in(process(ours, frames, evs_selection=name))
            assert plan is not None and plan.grid[0] == 7
            cells = appearance.source_pictures(frames, 1, *plan.grid[1:])
            assert plan.kept.tolist() == selection.select(cells, hf.Settings(0.6, selection=name)).tolist()


def test_the_same_stays_whoever_makes_the_pixels(ours: Any, stock: Any, pixels: str, monkeypatch: Any) -> None:
    frames = noise(*SHAPES[2])
    plan = plan_in(process(ours, frames))
    monkeypatch.setattr(watched, "PROVEN", ())
    result, path = path_of(lambda: process(ours, frames))
    other = assert_same_fields(result, process(stock, frames), pixels)
    assert path == "processor" and plan is not None and other.kept.tolist() == plan.kept.tolist()


def test_other_kinds_of_frames(ours: Any, stock: Any, pixels: str) -> None:
    """Their frames are made by the processor, or here; what stays is the same."""
    frames = noise(*SHAPES[2])
    whole = plan_in(process(ours, frames))
    assert whole is not None
    planar = torch.from_numpy(frames).permute(0, 3, 1, 2)
    strided = np.repeat(frames, 2, axis=2)[:, :, ::2]
    for other in (planar, planar.contiguous(), [Image.fromarray(f) for f in frames], strided):
        try:
            expected = process(stock, other)
        except Exception:
            with pytest.raises(Exception):  # noqa: B017
                process(ours, other)
            continue
        result, _ = path_of(lambda: process(ours, other))  # noqa: B023
        assert assert_same_fields(result, expected, pixels).kept.tolist() == whole.kept.tolist()


def test_an_unknown_processor_makes_its_own_frames(model: Path, stock: Any, pixels: str) -> None:
    processor = processor_for(model, {"rate": 0.6})
    known = type(part_of(processor))
    plain = watched.stock_of(known)

    class Brighter(plain):  # type: ignore[misc,valid-type]
        """As its class, of brighter frames."""

    def brighter(self: Any, videos: Any = None, **kwargs: Any) -> Any:
        kwargs |= {} if kwargs.get("video") is None else {"video": kwargs["video"] | 1}
        return getattr(super(Brighter, self), method)(*([] if videos is None else [[v | 1 for v in videos]]), **kwargs)

    methods = ("_videos_to_pixel_values_lst", "preprocess_multidata", "_preprocess")
    method = next(name for name in methods if hasattr(plain, name))
    setattr(Brighter, method, brighter)
    get, frames = processor.info.get_hf_processor, noise(*SHAPES[2])

    def custom(*args: Any, **kwargs: Any) -> Any:
        made = copy.copy(get(*args, **kwargs))
        if hasattr(made, "video_processor"):
            made.video_processor = copy.copy(made.video_processor)
            made.video_processor.__class__ = Brighter
        else:
            made.__class__ = Brighter
        return made

    processor.info.get_hf_processor = custom
    own = type(processor)(processor.info, processor.dummy_inputs)
    assert "Brighter" in own._evs_why_stock
    result, path = path_of(lambda: process(own, frames))
    assert path == "processor"
    assert_same_fields(result, process(stock_of(own, stock), frames), pixels)
    # One that claims to be known is found out.
    Brighter.__name__ = known.__name__
    processor.info.get_hf_processor = custom
    assert "other pixels" in type(processor)(processor.info, processor.dummy_inputs)._evs_why_stock


@families(lambda facts: facts.makes_frames and not facts.one_clip)
def test_clips_beside_each_other_and_an_image(ours: Any, stock: Any, model: Path, pixels: str) -> None:
    """In whatever order the processor cache sees them."""
    check_beside_each_other(model, stock, partial(assert_same_fields, pixels=pixels))


def test_a_watched_processor_is_still_itself(ours: Any) -> None:
    """It is copied and sent to other processes as it was."""
    processor = part_of(ours)
    own = type(processor)
    assert issubclass(own, watched.Watched) and own.__name__ in watched.PROVEN
    frames = noise(*SHAPES[0])
    plain = copy.deepcopy(processor)
    front_end.unwatch_processor(plain)
    assert not isinstance(plain, watched.Watched)
    for other in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        made, expected = (front_end._made(p, frames) for p in (other, plain))
        assert type(other) is own and made.keys() == expected.keys()
        assert all(torch.equal(made[name], expected[name]) for name in made)


def test_prompts_are_those_of_stock_with_tokens_taken_out(ours: Any, stock: Any) -> None:
    frames = noise(*SHAPES[2])
    result, unpruned = process(ours, frames), process(stock, frames)
    plan = plan_in(result)
    assert plan is not None and prompt_for(ours) == prompt_for(stock)
    missing = len(unpruned["prompt_token_ids"]) - len(result["prompt_token_ids"])
    assert missing == plan.num_tokens - plan.num_kept


def test_rate_zero_is_stock(ours: Any, stock: Any) -> None:
    frames = noise(*SHAPES[2])
    result, expected = process(ours, frames, evs_rate=0), process(stock, frames)
    one, other = ({k: e.data for k, e in r["mm_kwargs"]["video"][0].items()} for r in (result, expected))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)
