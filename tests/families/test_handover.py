# SPDX-License-Identifier: Apache-2.0
"""A clip that one engine encodes and another one answers about: the plan comes with the request, in place of pixels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evs_vllm.errors import RequestError
from tests.families.facts import Facts
from tests.families.processing import fields_in, plan_in, process, processor_for, prompt_for
from tests.families.registry import families

pytestmark = [pytest.mark.vllm, families(lambda facts: facts.embeds_with is not None)]

EVS = {"rate": 0.75, "request_overrides": "any"}


@pytest.fixture(scope="module")
def producer(model: Path) -> Any:
    return processor_for(model, EVS)


@pytest.fixture(scope="module")
def consumer(model: Path) -> Any:
    """A processor of an engine that is sent requests without pixels."""
    processor = processor_for(model, EVS, enable_mm_embeds=True)
    # As VllmConfig does for a consumer; the parser reads it when the processor is built.
    processor.info.ctx.model_config.multimodal_config.allow_missing_mm_embeddings = True
    return type(processor)(type(processor.info)(processor.info.ctx), processor.dummy_inputs)


def answered(producer: Any, results: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    """Identifier and fields of each clip, as vLLM's connectors answer them, after a way through JSON."""
    from vllm.distributed.ec_transfer.ec_connector.utils import PlaceholderMetadataResolver, collect_ec_item_metadata
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    features = [
        MultiModalFeatureSpec(
            data=result["mm_kwargs"]["video"][0],
            modality="video",
            identifier=result["mm_hashes"]["video"][0],
            mm_position=result["mm_placeholders"]["video"][0],
        )
        for result in results
    ]
    resolver = PlaceholderMetadataResolver(producer.info.ctx.model_config)
    items = json.loads(json.dumps(collect_ec_item_metadata(features, resolver)))
    return [(identifier, item["metadata"]) for identifier, item in items.items()]


def consume(consumer: Any, clips: list[tuple[str | None, dict[str, Any]]], **mm_kwargs: Any) -> Any:
    """What the processor makes of a prompt with these clips, parsed as in a chat request."""
    from vllm.renderers.chat_utils import _get_embeds_data

    items = consumer.info.parse_mm_data({"video": _get_embeds_data("video", [each for _, each in clips], consumer)})
    uuids = {"video": [identifier for identifier, _ in clips]}
    prompt = " ".join(prompt_for(consumer) for _ in clips)
    return consumer(prompt, items, mm_uuid_items=uuids, hf_processor_mm_kwargs=mm_kwargs)


@pytest.mark.parametrize("mm_kwargs", [{}, {"evs_rate": 0.9, "evs_positions": "sequential"}, {"evs_rate": 0}], ids=str)
def test_a_consumer_lays_out_the_encoders_prompt(
    producer: Any, consumer: Any, clip: np.ndarray, mm_kwargs: dict[str, Any]
) -> None:
    made = process(producer, clip, fps_of_clip=3.0, **mm_kwargs)
    got = consume(consumer, answered(producer, [made]), **mm_kwargs)
    assert got["prompt_token_ids"] == made["prompt_token_ids"]
    assert got["mm_hashes"] == made["mm_hashes"]
    (here,), (there,) = (each["mm_placeholders"]["video"] for each in (got, made))
    assert (here.offset, here.length, here.get_num_embeds()) == (there.offset, there.length, there.get_num_embeds())
    assert (here.is_embed is None) == (there.is_embed is None)
    assert here.is_embed is None or torch.equal(here.is_embed, there.is_embed)
    plan, original = plan_in(got), plan_in(made)
    if mm_kwargs.get("evs_rate") == 0:
        assert plan is original is None
    else:
        assert plan is not None and (plan.to_array() == original.to_array()).all()  # type: ignore[union-attr]
    assert not [name for name in fields_in(got) if "pixel" in name]


def test_two_clips_of_different_plans(producer: Any, consumer: Any, clip: np.ndarray) -> None:
    made = [process(producer, frames) for frames in (clip, clip[: len(clip) // 2])]
    got = consume(consumer, answered(producer, made))
    assert got["mm_hashes"]["video"] == [each["mm_hashes"]["video"][0] for each in made]
    counts = [each["mm_placeholders"]["video"][0].get_num_embeds() for each in made]
    assert counts[0] != counts[1]
    assert [each.get_num_embeds() for each in got["mm_placeholders"]["video"]] == counts


def test_what_a_consumer_refuses(producer: Any, consumer: Any, clip: np.ndarray, facts: Facts) -> None:
    ((identifier, fields),) = answered(producer, [process(producer, clip)])

    def refused(words: str, given: dict[str, Any], name: str | None = identifier) -> None:
        with pytest.raises(RequestError, match=words):
            consume(consumer, [(name, given)])

    refused("needs its identifier", fields, None)
    without = {name: value for name, value in fields.items() if name != "evs_plan"}
    refused("without its pixels", without)
    plan = fields["evs_plan"]
    for damaged in ([], [1], plan[:-1], [plan[0] + 1, *plan[1:]], [*plan[:-1], -5], [*plan[:-1], 2**60]):
        refused("evs_plan", {**fields, "evs_plan": damaged})
    refused("list of integers", {**fields, "evs_plan": [float(value) for value in plan[:-1]] + [0.5]})
    # A plan of another clip: every part of it is sound, but it is for another prompt.
    ((_, shorter),) = answered(producer, [process(producer, clip[: len(clip) // 2])])
    refused("another prompt|prompt of more", {**shorter, "evs_plan": plan})
    refused("another prompt|prompt of more", {**fields, "evs_plan": shorter["evs_plan"]})
    whole = consume(consumer, [(identifier, fields)])
    assert whole["mm_placeholders"]["video"][0].get_num_embeds() == plan_in(whole).num_kept + facts.extra_rows  # type: ignore[union-attr]


def test_any_change_of_a_plan_is_noticed_or_sound(producer: Any, consumer: Any, clip: np.ndarray) -> None:
    """Whatever integer is changed: refused with a RequestError, or a plan whose counts are those of the prompt."""
    ((identifier, fields),) = answered(producer, [process(producer, clip)])
    rng = np.random.default_rng(0)
    for _ in range(30):
        changed = list(fields["evs_plan"])
        changed[rng.integers(len(changed))] = int(rng.choice([-1, 0, 1, 2, 7, 10**6, 2**62]))
        try:
            got = consume(consumer, [(identifier, {**fields, "evs_plan": changed})])
        except RequestError:
            continue
        plan, (place,) = plan_in(got), got["mm_placeholders"]["video"]
        assert plan is not None and place.get_num_embeds() == plan.num_kept


def test_an_engine_that_is_no_consumer_takes_no_plan(producer: Any, clip: np.ndarray) -> None:
    clips = answered(producer, [process(producer, clip)])
    with pytest.raises(RequestError, match="Send it to a consumer"):
        consume(producer, clips)  # type: ignore[arg-type]


def test_without_evs_nothing_changes(model: Path, producer: Any) -> None:
    """The parser of a server that does not know the settings is vLLM's own."""
    stock, ours = processor_for(model, None), producer
    assert "evs_plan" not in stock.info.data_parser.placeholder_metadata_fields("video")
    assert type(stock.info.data_parser).__mro__ == type(ours.info.data_parser).__mro__[2:]
    assert ours.info.data_parser.embedding_field_sets("video") == stock.info.data_parser.embedding_field_sets("video")
    assert ours.info.data_parser.placeholder_metadata_fields("image") == (
        stock.info.data_parser.placeholder_metadata_fields("image")
    )
