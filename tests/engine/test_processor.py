# SPDX-License-Identifier: Apache-2.0
"""The processor and model hooks without an engine: scores see the right pixels, cache keys and fields are right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.positions import RESERVE
from evs_vllm.core.scorers import pixel_change
from evs_vllm.errors import RequestError
from evs_vllm.families import family_of
from evs_vllm.families.base import FamilyAdapter
from evs_vllm.testing import FAMILIES as TINY
from evs_vllm.testing import synthetic_clip

pytestmark = pytest.mark.vllm


def processor_for(model: Path, evs: dict[str, Any] | None, **kwargs: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from evs_vllm.engine.plugin import register

    register()
    extra = {} if evs is None else {"evs": evs}
    # float32 pixels, so that what vLLM normalises on the host can be undone exactly.
    args = EngineArgs(model=str(model), additional_config=extra, max_model_len=4096, dtype="float32", **kwargs)
    return MULTIMODAL_REGISTRY.create_processor(args.create_model_config())


def prompt_for(processor: Any) -> str:
    return str(processor.dummy_inputs.get_dummy_text({"video": 1})) + "What moves?"


def process(processor: Any, frames: np.ndarray, cache: Any = None, fps_of_clip: float = 2.0, **mm_kwargs: Any) -> Any:
    count = len(frames)
    metadata = {
        "fps": fps_of_clip,
        "duration": count / fps_of_clip,
        "total_num_frames": count,
        "frames_indices": list(range(count)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    items = processor.info.parse_mm_data({"video": [(frames, metadata)]})
    return processor(prompt_for(processor), items, hf_processor_mm_kwargs=mm_kwargs, cache=cache)


def fields(result: Any) -> dict[str, Any]:
    return {key: elem.data for key, elem in result["mm_kwargs"]["video"][0].items()}


def plan_in(result: Any) -> RetentionPlan | None:
    array = fields(result).get("evs_plan")
    return None if array is None else RetentionPlan.from_array(array.numpy())


@pytest.fixture(
    params=["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_5", "glm4v", "glm46v", "qwen2_5_omni", "qwen3_omni_moe"]
)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str, model_dir: Callable[[str], Path]) -> Path:
    return model_dir(family)


@pytest.fixture
def side(family: str) -> int:
    """Of a token, in pixels."""
    return 2 * TINY[family].patch


@pytest.fixture
def size(side: int) -> tuple[int, int]:
    """Of a frame: 4 x 5 tokens."""
    return 4 * side, 5 * side


@pytest.fixture
def adapter(model: Path) -> FamilyAdapter:
    family = family_of(json.loads((model / "config.json").read_text())["architectures"][0])
    assert family is not None
    return family.load_adapter()


def test_a_painted_token_changes_its_score_and_no_other(
    model: Path, adapter: FamilyAdapter, side: int, size: tuple[int, int]
) -> None:
    """Through the real Hugging Face processor: the rows we score are the pixels of that token, at that place."""
    processor = processor_for(model, {"rate": 0.5, "encoder": "full"})
    frames = np.full((8, *size, 3), 100, dtype=np.uint8)
    grid = (4, 4, 5)
    rng = np.random.default_rng()
    for _ in range(8):
        t, row, column = (int(rng.integers(1, grid[0])), int(rng.integers(grid[1])), int(rng.integers(grid[2])))
        painted = frames.copy()
        top, left = row * side + int(rng.integers(side)), column * side + int(rng.integers(side))
        painted[2 * t + int(rng.integers(2)), top, left, int(rng.integers(3))] = 137
        item = fields(process(processor, painted))
        stats = adapter.pixel_stats(processor.info.get_hf_processor())
        clip = adapter.clip(item, processor.info.get_hf_config(), stats)
        assert clip is not None and clip.grid == grid
        expected = np.zeros(grid, dtype=np.int64)
        expected[t, row, column] = 37
        if t + 1 < grid[0]:
            expected[t + 1, row, column] = 37
        assert pixel_change(clip.tokens).view(grid).tolist() == expected.tolist()


def test_frames_come_back_as_they_went_in(model: Path, adapter: FamilyAdapter, size: tuple[int, int]) -> None:
    processor = processor_for(model, {"rate": 0.5, "encoder": "full"})
    frames = synthetic_clip(frames=6, size=size, moving=0.2)
    item = fields(process(processor, frames))
    stats = adapter.pixel_stats(processor.info.get_hf_processor())
    shown = adapter.frames(item, processor.info.get_hf_config(), stats)
    assert shown.shape == frames.shape and (shown == frames).all()


def test_host_normalised_pixels_give_the_same_plan(model: Path, size: tuple[int, int]) -> None:
    frames = synthetic_clip(frames=9, size=size, moving=0.2)
    raw = process(processor_for(model, {"rate": 0.75}), frames)
    normalised = process(processor_for(model, {"rate": 0.75}, mm_device_do_normalize=False), frames)
    # vLLM has the tower of the Omni models take normalised pixels only.
    assert fields(raw)["pixel_values_videos"].dtype == (torch.float32 if "omni" in str(model) else torch.uint8)
    assert fields(normalised)["pixel_values_videos"].dtype == torch.float32
    one, other = plan_in(raw), plan_in(normalised)
    assert one is not None and other is not None and one.kept.tolist() == other.kept.tolist()


def test_prompt_plan_and_placeholder_agree(model: Path, size: tuple[int, int]) -> None:
    processor = processor_for(model, {"rate": 0.75})
    result = process(processor, synthetic_clip(frames=16, size=size, moving=0.2))
    plan = plan_in(result)
    assert plan is not None and plan.num_tokens == 8 * 20 and plan.num_kept == 40
    (placeholder,) = result["mm_placeholders"]["video"]
    config = processor.info.get_hf_config()
    pad = config.image_token_id if "glm" in str(model) else config.video_token_id
    assert result["prompt_token_ids"].count(pad) == placeholder.get_num_embeds() == 40
    stock = process(processor_for(model, None), synthetic_clip(frames=16, size=size, moving=0.2))
    (unpruned,) = stock["mm_placeholders"]["video"]
    assert (
        unpruned.length - placeholder.length == len(stock["prompt_token_ids"]) - len(result["prompt_token_ids"]) == 120
    )
    text = [token for token in stock["prompt_token_ids"] if token != pad]
    assert [token for token in result["prompt_token_ids"] if token != pad] == text, "text between units stays"
    assert fields(result)["evs_plan"].dtype == torch.int64


def test_pixels_that_nobody_computes_do_not_travel(model: Path, size: tuple[int, int]) -> None:
    frames = synthetic_clip(frames=16, size=size, moving=0.2)
    full = fields(process(processor_for(model, {"rate": 0.75, "encoder": "full"}), frames))["pixel_values_videos"]
    for refresh in 0, 8, 3:
        processor = processor_for(model, {"rate": 0.75, "request_overrides": "any"})
        result = process(processor, frames, evs_encoder_refresh=refresh)
        plan, pixels = plan_in(result), fields(result)["pixel_values_videos"]
        assert plan is not None and plan.encoder == "reuse"
        expected = sorted({*plan.kept.tolist(), *plan.refreshed.tolist()})
        assert plan.computed.tolist() == expected
        assert len(plan.refreshed) <= (120 // refresh if refresh else 0)
        assert bool(len(plan.refreshed)) == bool(refresh)
        assert pixels.tolist() == full.view(-1, 4, full.shape[-1])[expected].flatten(0, 1).tolist()


def test_cache_keys(model: Path, size: tuple[int, int]) -> None:
    """Different settings never share an entry, equal ones always do, and rate 0 is the stock key."""
    frames = synthetic_clip(frames=8, size=size, moving=0.2)
    server = {"rate": 0.75, "request_overrides": "any"}
    processor = processor_for(model, server)

    def key(p: Any, **kwargs: Any) -> str:
        return str(process(p, frames, **kwargs)["mm_hashes"]["video"][0])

    plain = key(processor)
    assert plain == key(processor, evs_encoder="reuse") == key(processor, evs_encoder="auto")
    assert plain == key(processor, evs_rate=0.75) == key(processor_for(model, {"rate": 0.75}))
    assert plain == key(processor, evs_positions="keep") == key(processor, evs_encoder_refresh=8)
    other = [
        key(processor, evs_rate=0.5),
        key(processor, evs_threshold=4),
        key(processor, evs_positions="sequential"),
        key(processor, evs_min_tokens_per_unit=1),
        key(processor, evs_max_tokens=30),
        key(processor, evs_encoder="full"),
        key(processor, evs_encoder_refresh=2),
        key(processor, evs_encoder_refresh=0),
    ]
    stock = key(processor_for(model, None))
    assert len({plain, stock, *other}) == len(other) + 2
    assert key(processor, evs_rate=0) == stock
    assert plan_in(process(processor, frames, evs_rate=0)) is None


def test_processor_cache_hit_keeps_the_pruned_prompt(model: Path, size: tuple[int, int]) -> None:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.cache.factories import processor_only_cache_from_config

    from evs_vllm.engine.metrics import metrics

    args = EngineArgs(model=str(model), additional_config={"evs": {"rate": 0.5}}, max_model_len=4096, dtype="float32")
    config: VllmConfig = args.create_engine_config()
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    cache = processor_only_cache_from_config(config)
    frames = synthetic_clip(frames=8, size=size, moving=0.2)
    clips = metrics().clips._value.get
    planned = metrics().planning_time._sum.get
    before, first = clips(), process(processor, frames, cache=cache)
    time_after_first = planned()
    second = process(processor, frames, cache=cache)
    strict = process(processor, frames, cache=cache, evs_rate=0.9)
    assert second["prompt_token_ids"] == first["prompt_token_ids"]
    assert clips() - before == 3
    assert len(strict["prompt_token_ids"]) < len(first["prompt_token_ids"])
    third = planned()
    process(processor, frames, cache=cache, evs_rate=0.9)
    assert time_after_first < third == planned(), "two settings were planned once each, hits not at all"


def test_bad_requests_raise_before_anything_is_processed(model: Path, size: tuple[int, int]) -> None:
    processor = processor_for(model, {"rate": 0.75})
    frames = synthetic_clip(frames=4, size=size, moving=0.2)
    for bad in ({"evs_rate": 0.1}, {"evs_rate": 7}, {"evs_speed": 1}, {"evs_rate": 0.8, "evs_threshold": 3}):
        with pytest.raises(RequestError):
            process(processor, frames, **bad)


def test_video_embeddings_pass_unpruned(model: Path) -> None:
    if "glm" in str(model) or "qwen3_omni" in str(model):
        pytest.skip("vLLM itself takes no precomputed video embeddings for this model")
    processor = processor_for(model, {"rate": 0.75}, enable_mm_embeds=True)
    config = processor.info.get_hf_config()
    levels = 1 + len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    width = config.get_text_config().hidden_size * levels
    embeds: dict[str, Any] = {"video_embeds": torch.zeros(40, width), "video_grid_thw": torch.tensor([[2, 8, 10]])}
    if "qwen2_5" in str(model):
        embeds["second_per_grid_ts"] = torch.tensor([1.0])
    if "qwen3" in str(model):
        embeds["timestamps"] = [[0.5, 1.5]]
    items = processor.info.parse_mm_data({"video": embeds})
    result = processor(prompt_for(processor), items)
    assert plan_in(result) is None
    assert result["mm_placeholders"]["video"][0].get_num_embeds() == 40


def test_positions_beyond_the_rotary_cache_are_refused(model: Path, adapter: FamilyAdapter) -> None:
    """The bound is the largest ID that the model's own numbering can reach, whatever the clip's rate of frames."""
    from evs_vllm.engine.processor import PrunedUpdateDetails

    processor = processor_for(model, {"rate": 0.75, "encoder": "full"})
    config = processor.info.get_hf_config()
    limit = adapter.max_position(config, 4096)
    assert limit == 4 * config.get_text_config().max_position_embeddings

    def check(span: int, positions: str = "keep") -> None:
        plan = RetentionPlan((2, 5, 1), np.arange(5), positions)
        processor._check_positions(100, [PrunedUpdateDetails([], None, plan, span)])

    most = limit - RESERVE - 1 - (100 - 5)
    check(most)
    with pytest.raises(RequestError, match="sequential"):
        check(most + 1)
    check(most + 1, "sequential")


@pytest.mark.parametrize("fps", [0.25, 1.0, 2.0, 30.0])
def test_position_span_is_what_the_model_makes(
    model: Path, adapter: FamilyAdapter, fps: float, size: tuple[int, int]
) -> None:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    from evs_vllm.engine import compat

    processor = processor_for(model, {"rate": 0.75, "encoder": "full"})
    frames = synthetic_clip(frames=14, size=size, moving=0.2)
    kwargs = {"fps": fps} if "omni" in str(model) else {}  # their processor reads no metadata
    result = process(processor, frames, fps_of_clip=fps, evs_rate=0.75, **kwargs)
    stock_processor = processor_for(model, None)
    stock = process(stock_processor, frames, fps_of_clip=fps, **kwargs)
    feature = MultiModalFeatureSpec(stock["mm_kwargs"]["video"][0], "video", "x", stock["mm_placeholders"]["video"][0])
    config = processor.info.get_hf_config()
    cls: Any = compat.stock_model_class(stock_processor.info.ctx.model_config.architecture)
    stock_model = cls.__new__(cls)  # without its weights
    torch.nn.Module.__init__(stock_model)
    stock_model.config = config
    positions, _ = stock_model.get_mrope_input_positions(stock["prompt_token_ids"], [feature])
    place = feature.mm_position
    after = int(positions[0, place.offset + place.length]) - int(positions[0, place.offset])
    after -= place.length - place.get_num_embeds()  # text between units stands in the pruned prompt, too
    plan = plan_in(result)
    assert plan is not None
    assert adapter.position_span(fields(result), plan.grid, config) == after


@pytest.fixture(params=["qwen2_5_omni", "qwen3_omni_moe"])
def omni(request: pytest.FixtureRequest, model_dir: Callable[[str], Path]) -> Path:
    return model_dir(request.param)


def test_audio_in_video_is_refused_where_the_clip_would_be_pruned(omni: Path) -> None:
    from evs_vllm.errors import UnsupportedError

    def ask(processor: Any, audio: bool = True, video: bool = True, **mm_kwargs: Any) -> Any:
        clip = synthetic_clip(frames=8, size=(112, 140), moving=0.2)
        samples = (np.random.default_rng(1).standard_normal(20000) / 10).astype(np.float32)
        media = {"video": [clip]} if video else {}
        if audio:
            media["audio"] = [(samples, 16000)]
        text = "<|vision_start|><|video_pad|><|vision_end|>" if video else "<|audio_start|><|audio_pad|><|audio_end|>"
        items = processor.info.parse_mm_data(media)
        return processor(text + "What is that?", items, hf_processor_mm_kwargs=mm_kwargs)

    on, off = processor_for(omni, {"rate": 0.75, "request_overrides": "any"}), processor_for(omni, None)
    with pytest.raises(RequestError, match="use_audio_in_video"):
        ask(on, use_audio_in_video=True)
    assert plan_in(ask(on, audio=False, use_audio_in_video=False)) is not None
    ask(on, video=False, use_audio_in_video=True)  # without a clip it means nothing

    # Not pruned, it is vLLM's: audio and clip share their place in the prompt, in turns.
    one, other = ask(on, use_audio_in_video=True, evs_rate=0), ask(off, use_audio_in_video=True)
    assert one["prompt_token_ids"] == other["prompt_token_ids"] and one["mm_hashes"] == other["mm_hashes"]
    assert plan_in(one) is None and fields(one)["use_audio_in_video"]
    for kind in "video", "audio":
        (a,), (b,) = one["mm_placeholders"][kind], other["mm_placeholders"][kind]
        assert (a.offset, a.length) == (b.offset, b.length) and a.is_embed.tolist() == b.is_embed.tolist()

    with pytest.raises(UnsupportedError, match="use_audio_in_video"):
        processor_for(omni, {"rate": 0.75}, mm_processor_kwargs={"use_audio_in_video": True})


def test_memory_is_profiled_unpruned(model: Path, size: tuple[int, int]) -> None:
    on, off = (processor_for(model, evs, limit_mm_per_prompt={"video": 1}) for evs in ({"rate": 0.9}, None))
    one, other = (p.get_dummy_mm_inputs({"video": 1}) for p in (on, off))
    assert one["mm_placeholders"]["video"][0].length == other["mm_placeholders"]["video"][0].length
    assert plan_in(one) is None
    assert plan_in(process(on, synthetic_clip(frames=8, size=size, moving=0.2))) is not None, "off only while profiling"
