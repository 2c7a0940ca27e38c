# SPDX-License-Identifier: Apache-2.0
"""What holds for every family when its processor takes a request: prompts, what travels, cache keys, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evs_vllm.core.plan import Layout, RetentionPlan
from evs_vllm.errors import ConfigError, EVSError, RequestError
from evs_vllm.families import family_of
from evs_vllm.families.base import PIXEL_KWARGS
from evs_vllm.families.plain_vit import packed_frames
from evs_vllm.testing import synthetic_clip
from tests.families.facts import Facts
from tests.families.processing import (
    UNITS,
    WHOLE,
    adapter_for,
    arguments_for,
    clip_in,
    fields_in,
    pixels_in,
    plan_in,
    process,
    processor_for,
    prompt_for,
)
from tests.families.registry import FAMILIES, families, names_of

pytestmark = [pytest.mark.vllm, families(lambda facts: True)]


def reuses(name: str) -> bool:
    """Whether the table of families says that the tower can reuse keys and values."""
    row = family_of(FAMILIES[name].tiny.architecture)
    assert row is not None
    return row.reuse


with_reuse_of_whole_frames = pytest.mark.families([n for n in names_of(lambda f: f.whole_frames) if reuses(n)])
without_reuse = pytest.mark.families([n for n in FAMILIES if not reuses(n)])


def test_prompt_plan_and_placeholder_agree(model: Path, clip: np.ndarray, facts: Facts) -> None:
    result, stock = (process(processor_for(model, evs), clip) for evs in ({"rate": 0.75}, None))
    plan, tokens = plan_in(result), UNITS * facts.per_unit
    kept = tokens // 4
    assert plan is not None and plan.num_tokens == tokens and plan.num_kept == kept
    assert fields_in(result)["evs_plan"].dtype == torch.int64
    (placeholder,), (unpruned,) = (made["mm_placeholders"]["video"] for made in (result, stock))
    assert placeholder.get_num_embeds() == kept + facts.extra_rows
    dropped = len(stock["prompt_token_ids"]) - len(result["prompt_token_ids"])
    assert unpruned.length - placeholder.length == dropped == tokens - kept
    # One token stands for each row of the clip, and text between units stays.
    inside = np.array(stock["prompt_token_ids"])[unpruned.offset : unpruned.offset + unpruned.length]
    (pad,) = set(inside.tolist() if unpruned.is_embed is None else inside[unpruned.is_embed.numpy()].tolist())
    assert result["prompt_token_ids"].count(pad) == kept + facts.extra_rows
    text, other = ([token for token in made["prompt_token_ids"] if token != pad] for made in (stock, result))
    assert text == other


@families(lambda facts: not facts.whole_frames)
def test_patches_that_nobody_computes_do_not_travel(model: Path, whole: Any, clip: np.ndarray, facts: Facts) -> None:
    full = pixels_in(process(whole, clip))
    droppable = UNITS * facts.per_unit * 3 // 4
    for refresh in 0, 0.1, 30.5:
        processor = processor_for(model, {"rate": 0.75, "request_overrides": "any"})
        result = process(processor, clip, evs_encoder_refresh=refresh)
        plan = plan_in(result)
        assert plan is not None and plan.encoder == "reuse"
        expected = sorted({*plan.kept.tolist(), *plan.refreshed.tolist()})
        assert plan.computed.tolist() == expected
        assert len(plan.refreshed) <= droppable // 2
        if refresh < 1:
            assert bool(len(plan.refreshed)) == bool(refresh), "0 is none, and the lowest level any difference"
        assert pixels_in(result).tolist() == full.view(-1, 4, full.shape[-1])[expected].flatten(0, 1).tolist()


@with_reuse_of_whole_frames
def test_frames_that_nobody_computes_do_not_travel(model: Path, whole: Any, facts: Facts) -> None:
    frames = synthetic_clip(8, facts.frame_size, moving=0.2, seed=4)
    for options, expected in (({"encoder_refresh": 0}, 4), ({"encoder_refresh": 0.1}, 6)):
        processor = processor_for(model, {"rate": 0.5} | options)
        result = process(processor, frames)
        plan = plan_in(result)
        assert plan is not None and plan.encoder == "reuse"
        assert len(pixels_in(result)) == packed_frames(plan) <= expected
        kept = clip_in(whole, process(whole, frames)).tokens.flatten(0, 1)[torch.from_numpy(plan.computed)]
        assert torch.equal(clip_in(processor, result).tokens.flatten(0, 1)[: len(kept)], kept)


@without_reuse
def test_without_reuse_all_pixels_travel_and_reuse_is_refused(model: Path, whole: Any, clip: np.ndarray) -> None:
    result = process(processor_for(model, {"rate": 0.5}), clip)
    assert torch.equal(pixels_in(result), pixels_in(process(whole, clip)))
    with pytest.raises(ConfigError, match="not supported"):
        processor_for(model, {"rate": 0.5, "encoder": "reuse"})


def test_the_table_says_what_the_adapter_can(model: Path, whole: Any, clip: np.ndarray, family: str) -> None:
    assert (adapter_for(whole).why_not_reuse() == "") == reuses(family)
    plan = plan_in(process(processor_for(model, {"rate": 0.5, "encoder": "auto"}), clip))
    assert plan is not None and plan.encoder == ("reuse" if reuses(family) else "full")


def test_cache_keys(model: Path, clip: np.ndarray, family: str) -> None:
    """Different settings never share an entry, equal ones always do, and rate 0 is the stock key."""
    processor = processor_for(model, {"rate": 0.75, "request_overrides": "any"})

    def key(p: Any, **kwargs: Any) -> str:
        return str(process(p, clip, **kwargs)["mm_hashes"]["video"][0])

    plain = key(processor)
    assert plain == key(processor, evs_rate=0.75) == key(processor_for(model, {"rate": 0.75}))
    assert plain == key(processor, evs_positions="keep") == key(processor, evs_encoder="auto")
    assert plain == key(processor, evs_encoder_refresh=25) == key(processor, evs_selection="learned")
    other = [
        key(processor, evs_rate=0.5),
        key(processor, evs_threshold=4),
        key(processor, evs_threshold=4, evs_selection="contrast"),
        key(processor, evs_selection="contrast"),
        key(processor, evs_selection="paper"),
        key(processor, evs_positions="sequential"),
        key(processor, evs_min_tokens_per_unit=1),
        key(processor, evs_max_tokens=30),
        key(processor, evs_focus=[[0, 1, 4]]),
        key(processor, evs_focus=[[0, 1, 5]]),
    ]
    if reuses(family):
        assert plain == key(processor, evs_encoder="reuse")
        other += [
            key(processor, evs_encoder="full"),
            key(processor, evs_encoder_refresh=2),
            key(processor, evs_encoder_refresh=0),
        ]
    else:
        assert plain == key(processor, evs_encoder="full") == key(processor, evs_encoder_refresh=2)
    stock = key(processor_for(model, None))
    assert len({plain, stock, *other}) == len(other) + 2
    assert key(processor, evs_rate=0) == stock
    assert plan_in(process(processor, clip, evs_rate=0)) is None


def test_processor_cache_hit_keeps_the_pruned_prompt(model: Path, clip: np.ndarray) -> None:
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.cache.factories import processor_only_cache_from_config

    from evs_vllm.engine.metrics import metrics

    config = arguments_for(model, {"rate": 0.5}).create_engine_config()
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    cache = processor_only_cache_from_config(config)
    clips = metrics().clips.labels("learned")._value.get
    planned = metrics().planning_time.labels("learned")._sum.get
    others = metrics().clips.labels("paper")._value.get()
    before, first = clips(), process(processor, clip, cache=cache)
    time_after_first = planned()
    second = process(processor, clip, cache=cache)
    strict = process(processor, clip, cache=cache, evs_rate=0.8)
    assert second["prompt_token_ids"] == first["prompt_token_ids"]
    assert clips() - before == 3 and metrics().clips.labels("paper")._value.get() == others
    assert len(strict["prompt_token_ids"]) < len(first["prompt_token_ids"])
    third = planned()
    process(processor, clip, cache=cache, evs_rate=0.8)
    assert time_after_first < third == planned(), "two settings were planned once each, hits not at all"


def test_bad_requests_raise_before_anything_is_processed(model: Path, clip: np.ndarray) -> None:
    processor = processor_for(model, {"rate": 0.75})
    for bad in ({"evs_rate": 0.1}, {"evs_rate": 7}, {"evs_speed": 1}, {"evs_rate": 0.8, "evs_threshold": 3}):
        with pytest.raises(RequestError):
            process(processor, clip, **bad)


@families(lambda facts: facts.embeds_with is not None)
def test_video_embeddings_pass_unpruned(model: Path, facts: Facts) -> None:
    processor = processor_for(model, {"rate": 0.75}, enable_mm_embeds=True)
    config = processor.info.get_hf_config()
    levels = 1 + len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    width = config.get_text_config().hidden_size * levels
    embeds: dict[str, Any] = {"video_embeds": torch.zeros(40, width), "video_grid_thw": torch.tensor([[2, 8, 10]])}
    assert facts.embeds_with is not None
    for name, values in facts.embeds_with.items():  # one number for each clip is a tensor, several are a list
        embeds[name] = torch.tensor(values) if isinstance(values[0], float) else values
    items = processor.info.parse_mm_data({"video": embeds})
    result = processor(prompt_for(processor), items)
    assert plan_in(result) is None
    assert result["mm_placeholders"]["video"][0].get_num_embeds() == 40


@families(lambda facts: not facts.whole_frames)
def test_positions_beyond_the_rotary_cache_are_refused(whole: Any) -> None:
    """The bound is the largest ID that the model's own numbering can reach, whatever the clip's rate of frames."""
    from evs_vllm.engine.limits import RESERVE, check_positions

    adapter, model_config = adapter_for(whole), whole.info.ctx.model_config
    limit = adapter.max_position(4096)
    assert limit == 4 * whole.info.get_hf_config().get_text_config().max_position_embeddings

    def check(span: int, positions: str = "keep") -> None:
        plan = RetentionPlan((2, 5, 1), np.arange(5), positions).with_layout(Layout.contiguous(1, 10), span)
        check_positions(adapter, model_config, 100, [plan])

    most = limit - RESERVE - 1 - (100 - 5)
    check(most)
    with pytest.raises(RequestError, match="sequential"):
        check(most + 1)
    check(most + 1, "sequential")


@pytest.mark.parametrize("fps", [0.25, 1.0, 2.0, 30.0])
def test_position_span_is_what_the_model_makes(model: Path, facts: Facts, fps: float) -> None:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    from evs_vllm.engine import compat

    frames = synthetic_clip(7 * facts.unit_frames, facts.frame_size, moving=0.2)
    kwargs = {"fps": fps} if facts.fps_argument else {}
    processor, stock_processor = processor_for(model, WHOLE), processor_for(model, None)
    result, stock = (process(p, frames, fps_of_clip=fps, **kwargs) for p in (processor, stock_processor))
    (place,) = stock["mm_placeholders"]["video"]
    cls: Any = compat.stock_model_class(stock_processor.info.ctx.model_config.architecture)
    if facts.whole_frames:
        assert not hasattr(cls, "get_mrope_input_positions")
        positions = np.arange(len(stock["prompt_token_ids"]))
    else:
        stock_model = cls.__new__(cls)  # without its weights
        torch.nn.Module.__init__(stock_model)
        stock_model.config = stock_processor.info.get_hf_config()
        feature = MultiModalFeatureSpec(stock["mm_kwargs"]["video"][0], "video", "x", place)
        positions = stock_model.get_mrope_input_positions(stock["prompt_token_ids"], [feature])[0][0]
    after = int(positions[place.offset + place.length]) - int(positions[place.offset])
    after -= place.length - place.get_num_embeds()  # text between units stands in the pruned prompt, too
    plan = plan_in(result)
    assert plan is not None
    span = adapter_for(processor).position_span(fields_in(result), plan.grid)
    assert plan.position_span == span == after - facts.extra_rows


def test_memory_is_profiled_unpruned(model: Path, clip: np.ndarray) -> None:
    on, off = (processor_for(model, evs, limit_mm_per_prompt={"video": 1}) for evs in ({"rate": 0.8}, None))
    one, other = (p.get_dummy_mm_inputs({"video": 1}) for p in (on, off))
    assert one["mm_placeholders"]["video"][0].length == other["mm_placeholders"]["video"][0].length
    assert plan_in(one) is None
    assert plan_in(process(on, clip)) is not None, "off only while profiling"


def test_off_is_stock(model: Path, whole: Any, clip: np.ndarray, facts: Facts) -> None:
    from evs_vllm.engine.compat import stock_model_class

    stock, off = processor_for(model, None), processor_for(model, {"rate": 0})
    config, on = stock.info.ctx.model_config, off.info.ctx.model_config
    assert on.hf_text_config.to_dict() == config.hf_text_config.to_dict(), "another language model would be built"
    if facts.whole_frames:
        assert not config.uses_mrope and not hasattr(config.hf_config, "mrope_section")
        assert on.uses_mrope and on.hf_config.mrope_section[1:] == [0, 0]
    factory = stock_model_class(config.architecture)._processor_factory
    assert type(stock) is factory.processor is not type(whole)
    one, other = process(stock, clip), process(off, clip)
    for part in "prompt_token_ids", "mm_hashes":
        assert one[part] == other[part]
    assert fields_in(one).keys() == fields_in(other).keys() and torch.equal(pixels_in(one), pixels_in(other))


@families(lambda facts: facts.embeds_with is not None)
def test_a_clip_without_pixels_or_embeddings_is_refused(model: Path, facts: Facts) -> None:
    """An encoder-cache or KV consumer takes requests that hold the grid alone, and cannot know what is kept of it."""
    evs = {"rate": 0.75, "request_overrides": "any"}
    processor = processor_for(model, evs, enable_mm_embeds=True)
    processor.info.ctx.model_config.multimodal_config.allow_missing_mm_embeddings = True
    # The parser reads it when a processor is made.
    consumer = type(processor)(type(processor.info)(processor.info.ctx), processor.dummy_inputs)
    described = {"video_grid_thw": torch.tensor([[2, 8, 10]])}
    described |= {name: torch.tensor(x) if name != "timestamps" else x for name, x in (facts.embeds_with or {}).items()}
    items = consumer.info.parse_mm_data({"video": described})
    with pytest.raises(RequestError, match="without its pixels"):
        consumer(prompt_for(consumer), items)
    unpruned = consumer(prompt_for(consumer), items, hf_processor_mm_kwargs={"evs_rate": 0})
    assert unpruned["mm_placeholders"]["video"][0].get_num_embeds() == 40


PROCESSOR_KWARGS = [
    {"merge_size": 1}, {"merge_size": 3}, {"patch_size": 7}, {"patch_size": 28}, {"temporal_patch_size": 1},
    {"temporal_patch_size": 4}, {"min_pixels": 784}, {"max_pixels": 3136}, {"do_resize": False},
    {"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1}, {"image_mean": [0.1, 0.2, 0.3]},
    {"image_std": [1, 1, 1]}, {"size": {"shortest_edge": 784, "longest_edge": 25088}}, {"device": "cpu"},
    {"return_tensors": None}, {"do_center_crop": True, "crop_size": 56}, {"input_data_format": "channels_last"},
    {"do_sample_frames": True}, {"resample": 0}, {"do_pad": True}, {"fps": 1}, {"num_frames": 4},
    {"videos_kwargs": {"merge_size": 1}},
]  # fmt: skip


def test_arguments_of_the_processor_prune_rightly_or_are_refused(model: Path, facts: Facts) -> None:
    """What stock vLLM answers, we answer too, or refuse with a ``ValueError`` of ours, which is HTTP 400."""
    on, off = processor_for(model, {"rate": 0.5, "encoder": "full"}), processor_for(model, None)
    frames = synthetic_clip(8, facts.frame_size, moving=0.3)
    refused, changes_size = set(), {"size", "min_pixels", "max_pixels", "do_center_crop", "do_resize", "resample"}
    for kwargs in PROCESSOR_KWARGS:
        try:
            stock = process(off, frames, **kwargs)
        except Exception:
            with pytest.raises(Exception):  # noqa: B017  (vLLM's own, whatever it is)
                process(on, frames, **kwargs)
            continue
        try:
            result = process(on, frames, **kwargs)
        except EVSError as error:
            name = next(iter(kwargs.get("videos_kwargs", kwargs)))
            assert name in str(error), "the text names the argument"
            refused.add(name)
            continue
        plan = plan_in(result)
        assert plan is not None, kwargs
        (before,), (after,) = (r["mm_placeholders"]["video"] for r in (stock, result))
        assert before.get_num_embeds() - after.get_num_embeds() == plan.num_tokens - plan.num_kept, kwargs
        shown = adapter_for(on).frames(fields_in(result))
        assert shown.std() > 20, f"{kwargs}: the pixels that are judged are not the clip's"
        if not changes_size & kwargs.keys():
            assert (shown == frames).all(), f"{kwargs}: the pixels that are judged are not the clip's"
    assert refused <= {*PIXEL_KWARGS, "do_center_crop"}
