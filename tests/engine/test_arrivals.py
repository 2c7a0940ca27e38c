# SPDX-License-Identifier: Apache-2.0
"""What is refused leaves the server as it was: its caches, its other requests, and what it has said."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from evs_vllm.core.plan import Layout, RetentionPlan
from evs_vllm.engine.limits import check_positions
from evs_vllm.errors import PlanError, RequestError
from evs_vllm.testing import synthetic_clip
from tests.families.processing import arguments_for, metadata_for, plan_in, process, processor_for, prompt_for

pytestmark = pytest.mark.vllm


def test_after_a_refusal_for_positions_its_clips_are_sent(qwen2_5_vl: Path) -> None:
    """The engine core never had them, so vLLM's sender cache must not take them for sent."""
    from vllm.multimodal.cache.lru import LruKeyReplicatedReceiverCache, LruKeyReplicatedSenderCache

    config = arguments_for(qwen2_5_vl, {"rate": 0.75}).create_engine_config()
    processor = processor_for(qwen2_5_vl, {"rate": 0.75})
    sender = LruKeyReplicatedSenderCache(config.model_config)
    receiver = LruKeyReplicatedReceiverCache(config.model_config)
    clips = [synthetic_clip(8, (56, 84), moving=0.2, seed=seed) for seed in (1, 2)]

    def ask(clips: list[np.ndarray], fps: float) -> Any:
        items = processor.info.parse_mm_data({"video": [(clip, metadata_for(clip, fps)) for clip in clips]})
        text = str(processor.dummy_inputs.get_dummy_text({"video": len(clips)}))
        return processor(text, items, cache=sender)

    # So slow that a clip ends far behind the rotary table.
    with pytest.raises(RequestError, match="position IDs"):
        ask(clips, 0.0002)
    result = ask(clips[:1], 2.0)
    item, name = result["mm_kwargs"]["video"][0], result["mm_hashes"]["video"][0]
    assert item is not None
    receiver.get_and_update_item(item, name)
    assert ask(clips[:1], 2.0)["mm_kwargs"]["video"][0] is None, "it is sent once"


def test_a_plan_that_cannot_be_read_ends_its_request(monkeypatch: pytest.MonkeyPatch, qwen2_5_vl: Path) -> None:
    """Where vLLM catches what is wrong with one request, and not in the scheduler, which would end the engine."""
    from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem
    from vllm.v1.engine import core

    arguments_for(qwen2_5_vl, {"rate": 0.75}).create_engine_config()
    plan = RetentionPlan((2, 4, 1), np.arange(4)).with_layout(Layout.contiguous(1, 8), 8)
    settings = arguments_for(qwen2_5_vl, {"rate": 0.75}).create_model_config()
    stock = arguments_for(qwen2_5_vl, None).create_model_config()

    def arrive(array: torch.Tensor | None, model_config: Any) -> Any:
        item = MultiModalKwargsItem({})
        if array is not None:
            item["evs_plan"] = MultiModalFieldElem(array, MultiModalBatchedField(keep_on_cpu=True))
        request = SimpleNamespace(
            mm_features=[SimpleNamespace(data=item), SimpleNamespace(data=None)],
            use_structured_output=False,
            current_wave=3,
        )
        monkeypatch.setattr(core.Request, "from_engine_core_request", lambda request, hasher: request)
        engine = SimpleNamespace(
            mm_receiver_cache=None,
            request_block_hasher=None,
            vllm_config=SimpleNamespace(model_config=model_config),
        )
        return core.EngineCore.preprocess_add_request(engine, request)  # type: ignore[arg-type]

    good, damaged = torch.from_numpy(plan.to_array()), torch.tensor([4] + [1] * 20)
    assert arrive(good, settings)[1] == 3 and arrive(None, settings)[1] == 3
    with pytest.raises(PlanError, match="Not a retention plan of this evs-vllm version"):
        arrive(damaged, settings)
    assert arrive(damaged, stock)[1] == 3, "without EVS nobody looks"


@pytest.mark.parametrize("cache", ["lru", "shm"])
def test_what_is_said_to_fit_fits(qwen2_5_vl: Path, cache: str) -> None:
    """Where the scheduler does not see plans, a prompt counts as the whole context."""
    processor = processor_for(qwen2_5_vl, {"rate": 0.5}, mm_processor_cache_type=cache, max_model_len=32768)
    plan = RetentionPlan((2, 4000, 1), np.arange(1000)).with_layout(Layout.contiguous(1, 8000), 8000)

    def check(count: int) -> None:
        model_config = processor.info.ctx.model_config
        check_positions(processor._evs, model_config, 1000 * count + 40, [plan] * count, [1.0] * count)

    for count in (20, 30, 100):
        with pytest.raises(RequestError) as error:
            check(count)
        found = re.search(r"The newest (\d+) ", str(error.value))
        assert found is not None
        check(int(found[1]))
        with pytest.raises(RequestError):
            check(int(found[1]) + 1)


def test_no_name_is_that_of_a_pruned_clip(qwen2_5_vl: Path) -> None:
    """A client names its videos as it likes, but not as something that was made of another one."""
    from vllm.multimodal.cache.factories import processor_only_cache_from_config

    settings = {"rate": 0.75, "request_overrides": "any"}
    cache = processor_only_cache_from_config(arguments_for(qwen2_5_vl, settings).create_engine_config())
    processor = processor_for(qwen2_5_vl, settings)
    one, other = (synthetic_clip(8, (56, 84), moving=0.2, seed=seed) for seed in (1, 2))

    def ask(clip: np.ndarray, name: str, **kwargs: Any) -> Any:
        items = processor.info.parse_mm_data({"video": [(clip, metadata_for(clip))]})
        return processor(
            prompt_for(processor), items, mm_uuid_items={"video": [name]}, cache=cache, hf_processor_mm_kwargs=kwargs
        )

    (name,) = ask(one, "cam")["mm_hashes"]["video"]
    assert name.startswith("cam-evs")
    with pytest.raises(RequestError, match="names that end like this are those of pruned videos"):
        ask(other, name, evs_rate=0)
    assert plan_in(ask(other, "cam-evs", evs_rate=0)) is None
    again = ask(other, name)
    fresh = plan_in(process(processor, other))
    assert again["mm_hashes"]["video"] != [name] and fresh is not None
    assert plan_in(again).kept.tolist() == fresh.kept.tolist()  # type: ignore[union-attr]
