# SPDX-License-Identifier: Apache-2.0
"""Engine sessions in the processor: each prompt has its own videos alone, and says which one its first goes on from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evs_vllm.engine.streams import StreamStore
from evs_vllm.errors import RequestError
from tests.families.facts import Facts
from tests.families.processing import arguments_for
from tests.families.test_streams import ask, pieces, placeholders, plans_in

pytestmark = [pytest.mark.vllm]

one_family = pytest.mark.families(["qwen2_5_vl"])


def session(processor: Any, clips: Sequence[np.ndarray], cache: Any = None, **kwargs: Any) -> list[Any]:
    """Each clip in a prompt of its own that goes on from the one before, as in an engine session."""
    before: str | None = None
    results: list[Any] = []
    for clip in clips:
        results.append(ask(processor, [clip], cache, evs_after=before, **kwargs))
        before = results[-1]["mm_hashes"]["video"][-1]
    return results


def test_a_session_keeps_what_one_request_would(model: Path, facts: Facts) -> None:
    """Also of families that take one video a prompt, and whatever caches hold."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.cache.factories import processor_only_cache_from_config

    config = arguments_for(model, {"rate": 0.6}).create_engine_config()
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    cache, clips = processor_only_cache_from_config(config), pieces(facts)
    first = session(processor, clips)
    for again in (session(processor, clips, cache), session(processor, clips, cache)):
        for one, other in zip(first, again, strict=True):
            assert one["mm_hashes"] == other["mm_hashes"]
            assert plans_in(one)[0].to_array().tolist() == plans_in(other)[0].to_array().tolist()
            (place,), (plan,) = other["mm_placeholders"]["video"], plans_in(other)
            assert place.extra_positions == plan.extra_positions
    plans = [plans_in(result)[0] for result in first]
    assert plans[1].num_kept == 1 and plans[1].unchanged and not plans[2].unchanged
    if facts.one_clip:
        return
    whole = ask(processor, clips)
    assert [hash for result in first for hash in result["mm_hashes"]["video"]] == whole["mm_hashes"]["video"]
    for plan, other in zip(plans, plans_in(whole), strict=True):
        assert plan.to_array().tolist() == other.to_array().tolist()
    # Two in one prompt, after another one.
    pair = ask(processor, clips[1:3], evs_after=whole["mm_hashes"]["video"][0])
    assert pair["mm_hashes"]["video"] == whole["mm_hashes"]["video"][1:3]


@one_family
def test_a_session_whose_past_is_gone_is_refused(model: Path, facts: Facts) -> None:
    """Evicted, planned with other settings, or never seen: never planned as if it stood alone."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.cache.factories import processor_only_cache_from_config

    config = arguments_for(model, {"rate": 0.6, "request_overrides": "any"}).create_engine_config()
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    clips, gone = pieces(facts), "what it left for the videos after it is not at hand"
    for memory in (None, processor_only_cache_from_config(config)):
        results = session(processor, clips[:3], memory)
        name = results[-1]["mm_hashes"]["video"][0]
        for kwargs in ({"evs_rate": 0.5}, {"evs_selection": "paper"}, {"evs_after": "nobody"}):
            with pytest.raises(RequestError, match=gone):
                ask(processor, [clips[3]], memory, **{"evs_after": name, **kwargs})
        expected = placeholders(ask(processor, [clips[3]], evs_after=name))
        store, processor._evs_store = processor._evs_store, StreamStore(1 << 20)
        if memory is not None:  # of a video that vLLM's cache has, nothing has to be planned
            assert placeholders(ask(processor, [clips[2]], memory, evs_after=results[1]["mm_hashes"]["video"][0])) == (
                placeholders(results[2])
            )
        with pytest.raises(RequestError, match=gone):
            ask(processor, [clips[3]], memory, evs_after=name)
        processor._evs_store = store
        assert placeholders(ask(processor, [clips[3]], memory, evs_after=name)) == expected
