# SPDX-License-Identifier: Apache-2.0
"""Pixel rows that are made without Hugging Face's processor are its rows, and all else it returns is as it was."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evs_vllm.engine.metrics import PATHS, metrics
from evs_vllm.families import front_end, watched
from evs_vllm.testing import synthetic_clip
from tests.families.facts import Facts
from tests.families.processing import (
    check_beside_each_other,
    fields_in,
    plan_in,
    process,
    processor_for,
    prompt_for,
)
from tests.families.registry import families
from tests.reference import appearance, hf, selection

pytestmark = [pytest.mark.vllm, families(lambda facts: not facts.whole_frames)]

PIXELS = "pixel_values_videos"
SHAPES = ((5, 61, 83), (4, 150, 211), (9, 240, 130), (3, 97, 360))
"""Frames, height and width of clips, none of which fits a grid."""


def noise(frames: int, height: int, width: int) -> np.ndarray:
    """Frames with edges and with gradients."""
    rng = np.random.default_rng()
    grid = np.indices((frames, height, width)).sum(axis=0)[..., None] * rng.integers(1, 5, 3)
    speckle = rng.integers(0, 256, (frames, height, width, 3)) * (rng.random((frames, height, width, 1)) < 0.3)
    return np.where(speckle > 0, speckle, grid % 256).astype(np.uint8)


def counted(path: str) -> float:
    return float(metrics().frontend_clips.labels(path)._value.get())


def path_of(call: Callable[[], Any]) -> tuple[Any, str]:
    """What `call` returns, and who made the pixel rows of its clip."""
    before = {path: counted(path) for path in PATHS}
    result = call()
    (path,) = (path for path in PATHS if counted(path) != before[path])
    return result, path


def assert_same_fields(result: Any, stock: Any, item: int = 0) -> None:
    """All fields but the plan are those of stock vLLM; of pixel rows, those of the tokens that are computed."""
    one, other = ({k: e.data for k, e in r["mm_kwargs"]["video"][item].items()} for r in (result, stock))
    plan = front_end_plan(one)
    assert one.keys() == other.keys()
    for name, expected in other.items():
        if name == PIXELS and plan.encoder == "reuse":
            expected = expected.view(plan.num_tokens, -1, expected.shape[-1])[plan.computed].flatten(0, 1)
        if isinstance(expected, torch.Tensor):
            assert one[name].dtype == expected.dtype and torch.equal(one[name], expected), name
        else:
            assert one[name] == expected, name


def front_end_plan(fields: dict[str, Any]) -> Any:
    from evs_vllm.core.plan import RetentionPlan

    return RetentionPlan.from_array(fields.pop("evs_plan").numpy())


@pytest.mark.parametrize("encoder", ["reuse", "full"])
@pytest.mark.parametrize("chosen", ["learned", "paper"])
def test_fields_are_those_of_stock(ours: Any, stock: Any, facts: Facts, chosen: str, encoder: str) -> None:
    shapes = [shape for shape in SHAPES if shape[0] >= facts.fewest_frames]
    for shape in [*shapes, (6, *facts.frame_size)]:
        frames = noise(*shape)
        result, path = path_of(lambda: process(ours, frames, evs_encoder=encoder, evs_selection=chosen))  # noqa: B023
        assert path == "rows"
        assert_same_fields(result, process(stock, frames))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pixels_that_are_normalised_on_the_host(model: Path, dtype: str) -> None:
    options = {"mm_device_do_normalize": False, "dtype": dtype}
    on, off = processor_for(model, {"rate": 0.6}, **options), processor_for(model, None, **options)
    frames = noise(*SHAPES[2])
    result, path = path_of(lambda: process(on, frames))
    assert path == "rows" and fields_in(result)[PIXELS].dtype == getattr(torch, dtype)
    assert_same_fields(result, process(off, frames))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"size": {"shortest_edge": 784, "longest_edge": 25088}},
        {"size": {"shortest_edge": 90_000, "longest_edge": 900_000}},
        {"min_pixels": 50_000},
        {"max_pixels": 20_000},
        {"cap_pixels_per_frame": True},
        {"do_sample_frames": True},
        {"resample": 2},
        {"do_resize": False},
        {"device": "cpu"},
        {"fps": 1},
        {"num_frames": 4},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_arguments_of_the_processor(ours: Any, stock: Any, facts: Facts, kwargs: dict[str, Any]) -> None:
    for frames in noise(*SHAPES[2]), noise(8, *facts.frame_size):
        try:
            expected = process(stock, frames, **kwargs)
        except Exception:
            with pytest.raises(Exception):  # noqa: B017  (vLLM's own, whatever it is)
                process(ours, frames, **kwargs)
            continue
        result, path = path_of(lambda: process(ours, frames, **kwargs))  # noqa: B023
        assert path == ("processor" if "resample" in kwargs else "rows")
        assert_same_fields(result, expected)


def test_what_stays_is_what_the_reference_keeps_of_the_source(ours: Any, facts: Facts) -> None:
    """Whoever makes the pixel rows, of a clip that is resized."""
    frames = synthetic_clip(12, (150, 211), moving=0.2)
    for kwargs, expected in (({}, "rows"), ({"resample": 2}, "processor")):
        result, path = path_of(lambda: process(ours, frames, **kwargs))  # noqa: B023
        plan = plan_in(result)
        assert plan is not None and path == expected
        cells = appearance.source_pictures(frames, 2, *plan.grid[1:])
        for name in ("learned", "contrast"):
            plan = plan_in(process(ours, frames, evs_selection=name, **kwargs))
            assert plan is not None
            assert plan.kept.tolist() == selection.select(cells, hf.Settings(0.6, selection=name)).tolist()


def test_other_kinds_of_frames(ours: Any, stock: Any, facts: Facts) -> None:
    """Their rows are made by the processor; what stays is the same."""
    frames = noise(*SHAPES[2])
    whole = plan_in(process(ours, frames))
    assert whole is not None
    planar = torch.from_numpy(frames).permute(0, 3, 1, 2)
    for other in (planar, planar.contiguous(), planar.contiguous().numpy(), [Image.fromarray(f) for f in frames]):
        try:
            expected = process(stock, other)
        except Exception:
            with pytest.raises(Exception):  # noqa: B017
                process(ours, other)
            continue
        result, path = path_of(lambda: process(ours, other))  # noqa: B023
        plan = plan_in(result)
        assert plan is not None and plan.kept.tolist() == whole.kept.tolist()
        assert path == ("rows" if isinstance(other, list) else "processor")
        assert_same_fields(result, expected)


def test_frames_that_are_no_bytes_have_no_source(ours: Any, stock: Any) -> None:
    frames = noise(*SHAPES[2]).astype(np.float32) / 2
    result, path = path_of(lambda: process(ours, frames))
    assert path == "processor"
    assert_same_fields(result, process(stock, frames))


def test_an_unknown_processor_makes_its_own_rows(model: Path, stock: Any) -> None:
    processor = processor_for(model, {"rate": 0.6})
    video_processor = processor.info.get_hf_processor().video_processor
    known = type(video_processor)

    class Brighter(watched.stock_of(known)):  # type: ignore[misc]
        def resize(self, videos: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().resize(videos // 2, *args, **kwargs)

    frames = noise(*SHAPES[2])
    try:
        video_processor.__class__ = Brighter
        custom = type(processor)(processor.info, processor.dummy_inputs)
        assert "Brighter" in custom._evs_why_stock
        result, path = path_of(lambda: process(custom, frames))
        assert path == "processor"
        assert_same_fields(result, process(stock_of(custom, stock), frames))
        # One that claims to be known is found out.
        video_processor.__class__ = type(known.__name__, (Brighter,), {})
        assert "other pixels" in type(processor)(processor.info, processor.dummy_inputs)._evs_why_stock
    finally:
        video_processor.__class__ = known


def stock_of(processor: Any, stock: Any) -> Any:
    """vLLM's own processor with the Hugging Face processor of `processor`."""
    return type(stock)(processor.info, processor.dummy_inputs)


@families(lambda facts: not facts.whole_frames and not facts.one_clip and facts.images)
def test_clips_beside_each_other_and_an_image(ours: Any, stock: Any, model: Path) -> None:
    """In whatever order the processor cache sees them."""
    check_beside_each_other(model, stock, assert_same_fields)


def test_what_vllm_makes_for_every_request_tries_nothing_again(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat request counts its videos with a processor of its own, on the thread that serves all requests."""
    from vllm.renderers.chat_utils import MultiModalItemTracker

    tried: list[Any] = []
    monkeypatch.setattr(front_end, "_try", lambda processor, squares: tried.append(processor) or "")
    tracker = MultiModalItemTracker(ours.info.ctx.model_config)
    assert type(tracker.mm_processor) is type(ours) and tracker.mm_processor is not ours
    assert not tried


def test_a_watched_processor_is_still_itself(ours: Any, stock: Any, tmp_path: Path) -> None:
    """It is saved, copied and sent to other processes as it was."""
    processor = ours.info.get_hf_processor().video_processor
    own = type(processor)
    assert issubclass(own, watched.Watched) and own.__name__ in watched.PROVEN
    frames = noise(*SHAPES[1])

    def make(processor: Any) -> Any:
        return processor(videos=[frames], do_sample_frames=False, return_tensors="pt")

    plain = copy.deepcopy(processor)
    front_end.unwatch_processor(plain)
    assert not isinstance(plain, watched.Watched)
    for other in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert type(other) is own and other.to_dict() == processor.to_dict() == plain.to_dict()
        made = make(other)
        assert made.keys() == make(plain).keys() and torch.equal(made[PIXELS], make(plain)[PIXELS])
    processor.save_pretrained(tmp_path / "watched")
    plain.save_pretrained(tmp_path / "plain")
    one, other = (json.loads(next((tmp_path / name).iterdir()).read_text()) for name in ("watched", "plain"))
    assert one == other


def test_cells_beside_the_fields(ours: Any) -> None:
    """A processor for transformers hands on the pictures that vLLM's side judges by."""
    processor = copy.deepcopy(ours.info.get_hf_processor().video_processor)
    front_end.unwatch_processor(processor)
    plain = copy.deepcopy(processor)
    front_end.watch_processor(processor, with_cells=True)
    clips = [noise(*SHAPES[2]), noise(*SHAPES[1])]
    for videos in (clips, [torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in clips]):
        made, expected = (p(videos=videos, do_sample_frames=False, return_tensors="pt") for p in (processor, plain))
        cells = made.pop(front_end.CELLS)
        assert made.keys() == expected.keys() and torch.equal(made[PIXELS], expected[PIXELS])
        grids = [(units, height // 2, width // 2) for units, height, width in made[front_end.GRID].tolist()]
        sources = front_end.sources_of_cells(cells, grids)
        for clip, grid, source in zip(clips, grids, sources, strict=True):
            expected_cells = appearance.source_pictures(clip, 2, *grid[1:])
            blocks = source.frames.view(grid[0], grid[1], 4, grid[2], 4, 3).transpose(2, 3)
            assert source.unit_frames == 1 and blocks.tolist() == expected_cells.tolist()


def test_prompts_are_those_of_stock_with_tokens_taken_out(ours: Any, stock: Any) -> None:
    frames = noise(*SHAPES[2])
    result, unpruned = process(ours, frames), process(stock, frames)
    plan = plan_in(result)
    assert plan is not None and prompt_for(ours) == prompt_for(stock)
    missing = len(unpruned["prompt_token_ids"]) - len(result["prompt_token_ids"])
    assert missing == plan.num_tokens - plan.num_kept


@families(lambda facts: facts.whole_frames and not facts.makes_frames)
def test_other_families_with_whole_frames_are_judged_as_the_model_sees_them(model: Path, facts: Facts) -> None:
    processor = processor_for(model, {"rate": 0.5})
    result, path = path_of(lambda: process(processor, synthetic_clip(4, facts.frame_size)))
    assert path == "processor" and plan_in(result) is not None
    assert not isinstance(getattr(processor.info.get_hf_processor(), "video_processor", None), watched.Watched)
