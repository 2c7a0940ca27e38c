# SPDX-License-Identifier: Apache-2.0
"""The videos of a request as one stream, in vLLM's processor: with caches and without, whatever they hold."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evs_vllm.core.plan import Layout, RetentionPlan
from evs_vllm.engine.limits import check_positions
from evs_vllm.engine.metrics import NEWS, metrics
from evs_vllm.engine.streams import StreamStore, cache_identity, chain
from evs_vllm.errors import RequestError
from evs_vllm.testing import synthetic_clip
from tests.families.facts import Facts
from tests.families.processing import arguments_for, metadata_for, processor_for
from tests.families.registry import families
from tests.reference import appearance, selection
from tests.reference.hf import Settings

pytestmark = [pytest.mark.vllm]

several_clips = families(lambda facts: not facts.one_clip)
one_family = pytest.mark.families(["qwen2_5_vl"])

STREAM = {"evs_stream": True}


def ask(
    processor: Any,
    clips: Sequence[np.ndarray | None],
    cache: Any = None,
    uuids: Sequence[str | None] | None = None,
    images: Sequence[Any] = (),
    **kwargs: Any,
) -> Any:
    media: dict[str, Any] = {"video": [None if clip is None else (clip, metadata_for(clip)) for clip in clips]}
    media |= {"image": list(images)} if images else {}
    text = processor.dummy_inputs.get_dummy_text({"video": len(clips), "image": len(images)})
    items = processor.info.parse_mm_data(media)
    ids = None if uuids is None else {"video": list(uuids)}
    return processor(str(text), items, mm_uuid_items=ids, hf_processor_mm_kwargs=STREAM | kwargs, cache=cache)


def placeholders(result: Any) -> list[int]:
    """Embedding rows of every clip in the prompt: the plans' numbers, of clips from the cache, too."""
    return [place.get_num_embeds() for place in result["mm_placeholders"]["video"]]


def plans_in(result: Any) -> list[RetentionPlan]:
    return [RetentionPlan.from_array(item["evs_plan"].data.numpy()) for item in result["mm_kwargs"]["video"]]


def pieces(facts: Facts, seed: int = 0) -> list[np.ndarray]:
    """A stream of four clips: a still scene, the same, other pictures that move, and those of the beginning."""
    moving = synthetic_clip(8, facts.frame_size, moving=0.2, seed=seed)
    still = np.repeat(moving[:1], 4, axis=0)
    return [still, still, 255 - moving[4:], moving[:4]]


@several_clips
def test_every_turn_keeps_what_went_before(model: Path, facts: Facts) -> None:
    """A conversation turn by turn, with vLLM's cache, is what its last turn is without; what stays is what is new."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.cache.factories import processor_only_cache_from_config

    config = arguments_for(model, {"rate": 0.6}).create_engine_config()
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    cache, clips = processor_only_cache_from_config(config), pieces(facts)
    whole = ask(processor, clips)
    plans = plans_in(whole)
    for turn in range(1, 5):
        result = ask(processor, clips[:turn], cache)
        assert placeholders(result) == placeholders(whole)[:turn]
        assert result["mm_hashes"]["video"] == whole["mm_hashes"]["video"][:turn]
        for own, other in zip(plans_in(result), plans, strict=False):
            assert own.to_array().tolist() == other.to_array().tolist()
    alone = plans_in(ask(processor, clips, evs_stream=False))
    assert plans[0].kept.tolist() == alone[0].kept.tolist(), "the first one stands alone"
    assert plans[1].num_kept == 1 and plans[1].unchanged and not plans[2].unchanged
    assert all(one.num_kept <= other.num_kept for one, other in zip(plans, alone, strict=True))
    keys = {*whole["mm_hashes"]["video"], *ask(processor, clips, evs_stream=False)["mm_hashes"]["video"]}
    assert len(keys) == 7, "clips 0 and 1 have the same frames, and another past"


@several_clips
def test_it_is_the_reference(model: Path, facts: Facts) -> None:
    """With both selections that look at pictures, of frames that the processor resizes."""
    if facts.whole_frames:
        pytest.skip("they are judged as the model sees them; tests of the core compare those")
    height, width = facts.frame_size
    first = synthetic_clip(10, (height + 21, width + 40), moving=0.3, seed=2)
    clips = [first[:4], first[4:8], np.repeat(first[-1:], 2, axis=0), first[:4]]
    processor = processor_for(model, {"rate": 0.6})
    for name in ("learned", "contrast"):
        plans = plans_in(ask(processor, clips, evs_selection=name))
        described = [
            (plan.grid[1:], appearance.DESCRIBE[name](appearance.source_pictures(clip, 2, *plan.grid[1:])))
            for plan, clip in zip(plans, clips, strict=True)
        ]
        expected = selection.stream(described, Settings(0.6, selection=name))
        assert [(plan.kept.tolist(), plan.unchanged) for plan in plans] == expected


@several_clips
def test_pictures_between_do_not_matter(model: Path, facts: Facts) -> None:
    if not facts.images:
        pytest.skip("vLLM takes no images here")
    processor, clips = processor_for(model, {"rate": 0.6}), pieces(facts)
    picture = Image.fromarray(synthetic_clip(1, facts.frame_size, seed=9)[0])
    one, other = ask(processor, clips), ask(processor, clips, images=[picture])
    assert one["mm_hashes"]["video"] == other["mm_hashes"]["video"]
    assert placeholders(one) == placeholders(other)


@one_family
def test_another_size_starts_anew_and_a_dropped_clip_does(model: Path, facts: Facts) -> None:
    processor = processor_for(model, {"rate": 0.75})
    small = synthetic_clip(4, (56, 84), moving=0.2, seed=1)
    clips = pieces(facts)
    plans = plans_in(ask(processor, [clips[0], small, clips[0]]))
    alone = [plans_in(ask(processor, [clip]))[0] for clip in (clips[0], small)]
    assert [plan.kept.tolist() for plan in plans] == [alone[i].kept.tolist() for i in (0, 1, 0)]
    # A client that drops its oldest clips has another stream, which begins with the first that it sends.
    whole, dropped = ask(processor, clips), ask(processor, clips[2:])
    fresh = plans_in(ask(processor, clips[2:3]))[0]
    assert plans_in(dropped)[0].kept.tolist() == fresh.kept.tolist() and fresh.counts[0] == fresh.tokens_per_unit
    assert not set(whole["mm_hashes"]["video"]) & set(dropped["mm_hashes"]["video"])


@one_family
def test_what_was_evicted_is_made_again(model: Path, facts: Facts) -> None:
    """Whichever of vLLM's cache and the store has lost what; and with no store at all."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.cache.factories import processor_only_cache_from_config

    config = arguments_for(model, {"rate": 0.6}).create_engine_config()
    clips, none = pieces(facts), arguments_for(model, {"rate": 0.6, "stream_cache_gb": 0}).create_engine_config()
    for settings, of_store in ((config, 4), (none, 0)):
        processor = MULTIMODAL_REGISTRY.create_processor(settings.model_config)
        expected = placeholders(ask(processor, clips))
        assert len(processor._evs_store) == of_store
        cache, rebuilt = processor_only_cache_from_config(config), metrics().stream_chunks.labels("rebuilt")._value.get
        ask(processor, clips[:3], cache)
        before = rebuilt()
        processor._evs_store = StreamStore(processor._evs_store.capacity)
        assert placeholders(ask(processor, clips, cache)) == expected
        assert rebuilt() - before == 3, "its three predecessors were cached, and their pixels were looked at again"
        assert placeholders(ask(processor, clips, cache)) == expected and rebuilt() - before == 3


@one_family
def test_clips_without_their_data(model: Path, facts: Facts) -> None:
    """A client may name clips that it sent before. What they left has to be there still."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.cache.factories import processor_only_cache_from_config

    config = arguments_for(model, {"rate": 0.6}).create_engine_config()
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    cache, clips, names = processor_only_cache_from_config(config), pieces(facts), ["a", "b", "c", "d"]
    expected = placeholders(ask(processor, clips, uuids=names))
    ask(processor, clips[:2], cache, names[:2])
    assert placeholders(ask(processor, [None, None, clips[2]], cache, names[:3])) == expected[:3]
    processor._evs_store = StreamStore(1 << 20)
    with pytest.raises(RequestError, match=r"Video 3 of this stream came as an identifier.*Send the data of all"):
        ask(processor, [None, None, None, clips[3]], cache, names)
    # Of the last one before, the data are enough if what stands before that is there.
    ask(processor, clips[:2], uuids=names[:2])
    assert placeholders(ask(processor, [None, None, clips[2], clips[3]], cache, names)) == expected
    with pytest.raises(ValueError, match="data is not provided"):
        ask(processor, [None], cache, ["x"])


@cache
def reference_of(clips: tuple[bytes, ...], shapes: tuple[tuple[int, ...], ...]) -> list[tuple[list[int], bool]]:
    """What `selection.stream` says of clips of tokens of 28 x 28 pixels."""
    described = []
    for data, shape in zip(clips, shapes, strict=True):
        grid = shape[1] // 28, shape[2] // 28
        described.append((grid, described_of(data, shape, grid)))
    return selection.stream(described, Settings(0.75, selection="learned"))


@cache
def described_of(data: bytes, shape: tuple[int, ...], grid: tuple[int, int]) -> Any:
    frames = np.frombuffer(data, dtype=np.uint8).reshape(shape)
    return appearance.DESCRIBE["learned"](appearance.source_pictures(frames, 2, *grid))


@one_family
def test_two_hundred_streams(model: Path, facts: Facts) -> None:
    """Clients that begin, go on, drop their oldest clips, send in another order and come back, beside caches that are
    small, cleared and gone with a server: every plan is that of the reference, and the store stays within its bound."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.cache.factories import processor_only_cache_from_config

    seed = int(np.random.default_rng().integers(2**32))
    rng = np.random.default_rng(seed)
    config = arguments_for(model, {"rate": 0.75}, mm_processor_cache_gb=0.0005).create_engine_config()
    pool = [synthetic_clip(2 * int(rng.integers(1, 4)), (56, 56), moving=0.3, seed=i) for i in range(5)]
    pool += [np.repeat(pool[0][-1:], 4, axis=0), np.repeat(pool[1][:1], 2, axis=0)]
    pool += [synthetic_clip(4, (56, 84), moving=0.3, seed=7)]
    streams: list[list[int]] = [[] for _ in range(200)]
    seen: dict[tuple[int, ...], list[str]] = {}
    capacity = 40 * (4 * 32 + 512)

    def new_server() -> tuple[Any, Any]:
        processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
        processor._evs_store = StreamStore(capacity)
        return processor, processor_only_cache_from_config(config)

    processor, memory = new_server()
    for number in rng.permutation(np.repeat(np.arange(200), 3)).tolist():
        event, mine = rng.random(), streams[number]
        if event < 0.1:
            mine[:] = mine[len(mine) // 2 :]  # drops its oldest
        elif event < 0.15:
            rng.shuffle(mine)
        elif event < 0.2:
            mine.clear()
        mine += rng.integers(0, len(pool), int(rng.integers(1, 3))).tolist()
        if rng.random() < 0.01:
            processor, memory = new_server()
        if rng.random() < 0.02:
            memory.clear_cache()
        if rng.random() < 0.02:
            processor._evs_store = StreamStore(capacity)
        clips = [pool[i] for i in mine]
        for cache_used in (memory, None) if rng.random() < 0.1 else (memory,):
            result = ask(processor, clips, cache_used)
            expected = reference_of(tuple(c.tobytes() for c in clips), tuple(c.shape for c in clips))
            assert placeholders(result) == [len(kept) for kept, _ in expected], (seed, mine)
            for item, (kept, unchanged) in zip(result["mm_kwargs"]["video"], expected, strict=True):
                plan = RetentionPlan.from_array(item["evs_plan"].data.numpy())
                assert (plan.kept.tolist(), plan.unchanged) == (kept, unchanged), (seed, mine)
            hashes = result["mm_hashes"]["video"]
            for length in range(1, len(mine) + 1):
                assert seen.setdefault(tuple(mine[:length]), hashes[:length]) == hashes[:length], (seed, mine)
        store = processor._evs_store
        assert store.size <= capacity and store.size >= len(store) * 512
        assert store.size == sum(anchors.looks.numel() + 512 for anchors in store._entries.values())
    # Equal identities mean equal pasts: as many as there are different beginnings.
    assert len({hashes[-1] for hashes in seen.values()}) == len(seen)
    assert len(seen) > 200, "streams do differ"


@one_family
def test_news_is_counted_once(model: Path, facts: Facts) -> None:
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.cache.factories import processor_only_cache_from_config

    config = arguments_for(model, {"rate": 0.6}).create_engine_config()
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    cache, clips = processor_only_cache_from_config(config), pieces(facts, seed=5)

    def counts() -> list[float]:
        return [metrics().stream_chunks.labels(news)._value.get() for news in NEWS]

    before = np.array(counts())
    for turn in (1, 2, 3, 4, 4):
        ask(processor, clips[:turn], cache)
    assert (np.array(counts()) - before).tolist() == [1, 2, 1, 0]
    ask(processor, clips, cache, evs_stream=False)
    assert (np.array(counts()) - before).tolist() == [1, 2, 1, 0], "those are no stream"


@one_family
@pytest.mark.parametrize("known", [True, False])
def test_a_stream_that_has_run_out_of_positions(model: Path, known: bool) -> None:
    """The answer says how much of it fits, and that does fit."""
    processor = processor_for(model, {"rate": 0.75})
    limit, model_config = processor._evs.max_position(4096), processor.info.ctx.model_config
    span = limit // 10
    plan = RetentionPlan((2, 5, 1), np.arange(5)).with_layout(Layout.contiguous(1, 10), span)

    def check(count: int, positions: str = "keep") -> None:
        plans = [replace(plan, positions=positions)] * count
        prompt_tokens = 5 * count + 40
        check_positions(processor._evs, model_config, prompt_tokens, plans, [2.5 if known else None] * count)

    check(9)
    with pytest.raises(RequestError) as error:
        check(14)
    words = str(error.value)
    assert words.startswith(f"The 14 (35 s) videos of this stream take up {14 * span} " if known else "The 14 videos ")
    assert (
        f"The newest {'9 (22.5 s)' if known else '9'} would fit: drop older ones" in words and "'sequential'" in words
    )
    with pytest.raises(RequestError, match="The newest 9 "):
        check(10)
    check(14, "sequential")
    alone = replace(plan, position_span=2 * limit)
    with pytest.raises(RequestError, match="Begin a new session"):
        check_positions(processor._evs, model_config, 50, [plan, alone], [1.0, 1.0])
    with pytest.raises(RequestError, match="Send fewer frames or a shorter video"):
        check_positions(processor._evs, model_config, 50, [alone], [1.0])


@one_family
def test_how_long_videos_are_is_read_from_the_loader(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evs_vllm.engine import processor as module

    seen = []
    monkeypatch.setattr(module, "check_positions", lambda *args: seen.append(args[-1]))
    processor = processor_for(model, {"rate": 0.75})
    frames = synthetic_clip(6, (56, 56), moving=0.2, seed=1)
    ask(processor, [frames, frames[:4]])
    ask(processor, [frames], evs_stream=False)
    assert seen == [[3.0, 2.0], None]


def test_the_chain_and_the_store() -> None:
    import torch

    from evs_vllm.core.clip import Anchors

    links = chain(["a", "bc"], "x")
    assert len(set(links)) == 3 and links[:2] == chain(["a"], "x") and links != chain(["ab", "c"], "x")
    assert not set(links) & set(chain(["a", "bc"], "y"))
    # Cut anywhere, the rest goes on from the identity of the last one before.
    assert chain(["bc"], "x", cache_identity("a", links[0])) == links[1:]
    assert not set(chain(["bc"], "y", cache_identity("a", links[0]))) & set(links)

    def anchors(size: int) -> Anchors:
        return Anchors(torch.zeros(1, size, dtype=torch.uint8), (1, 1))

    store = StreamStore(3 * 612)
    for name in "abc":
        store.put(name, anchors(100))
    assert store.get("a") is not None  # so that b is the oldest
    store.put("d", anchors(100))
    assert [store.get(name) is not None for name in "abcd"] == [True, False, True, True]
    store.put("a", anchors(3 * 612))
    assert store.get("a") is None and store.size == 2 * 612, "one that can never fit pushes out no other"
    store.put("c", anchors(200))
    assert store.size == 612 + 712 and len(store) == 2
