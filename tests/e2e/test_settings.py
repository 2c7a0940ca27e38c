# SPDX-License-Identifier: Apache-2.0
"""The server's own settings through `LLM`, what a request may override, and what is refused at start-up."""

import pytest

from evs_vllm.testing import synthetic_clip
from tests.e2e.harness import VIDEO, Request, ask, chat, run_and_check, start_engine
from tests.reference.hf import Clip, Settings

pytestmark = pytest.mark.vllm

FRAMES = synthetic_clip(16, noise=2, seed=100)
FAMILY = "qwen2_5_vl"

SERVERS = {
    "rate": ({"rate": 0.9}, Settings(0.9)),
    "threshold": ({"threshold": 6.5}, Settings(threshold=6.5)),
    "sequential": ({"rate": 0.6, "positions": "sequential"}, Settings(0.6, positions="sequential")),
    "minimum": ({"rate": 0.9, "min_tokens_per_unit": 3}, Settings(0.9, min_tokens_per_unit=3)),
    "maximum only": ({"max_tokens": 70}, Settings(max_tokens=70)),
}


@pytest.fixture
def ref(reference):
    return reference(FAMILY)


@pytest.mark.parametrize("name", SERVERS)
def test_settings_of_the_server(engines, ref, name):
    options, settings = SERVERS[name]
    engine = engines.get(FAMILY, options)
    long = Request(chat(VIDEO, "Why?"), [Clip(synthetic_clip(24, (56, 84), noise=2, seed=103), settings=settings)])
    run_and_check(engine, ref, [ask(FRAMES, settings), long])


def refused(engine, *words, **kwargs):
    with pytest.raises(ValueError) as error:
        engine.generate([ask(FRAMES, **kwargs)])
    for word in words:
        assert word in str(error.value)


def test_stricter_is_the_default(engines, ref):
    engine = engines.get(FAMILY, {"rate": 0.5})
    refused(engine, "evs_rate=0.4", "--evs-request-overrides any", evs_rate=0.4)
    refused(engine, "cost more", evs_rate=0)
    refused(engine, "cost more", evs_threshold=200)
    refused(engine, "cost more", evs_min_tokens_per_unit=1)
    refused(engine, "evs_selection=learned", "cost more", "selection paper", evs_selection="learned")
    settings = Settings(0.8, positions="sequential", max_tokens=25)
    run_and_check(engine, ref, [ask(FRAMES, settings, evs_rate=0.8, evs_positions="sequential", evs_max_tokens=25)])
    run_and_check(engine, ref, [ask(FRAMES, Settings(0.5))])


def test_none_takes_no_keys(engines, ref):
    engine = engines.get(FAMILY, {"rate": 0.5, "request_overrides": "none"})
    refused(engine, "takes no evs_* keys", evs_rate=0.9)
    run_and_check(engine, ref, [ask(FRAMES, Settings(0.5))])


def test_malformed_keys(engines, ref):
    engine = engines.get(FAMILY, {"rate": 0.5, "request_overrides": "any"})
    for key, value in {
        "evs_rate": 1, "evs_threshold": -1, "evs_positions": "kept", "evs_selection": "best",
        "evs_min_tokens_per_unit": 1.5, "evs_max_tokens": 0, "evs_ratio": 0.5, "evs_": 1,
        "evs_request_overrides": "any",
    }.items():  # fmt: skip
        refused(engine, key, **{key: value})
    refused(engine, "contradict", evs_rate=0.5, evs_threshold=3)
    run_and_check(engine, ref, [ask(FRAMES, Settings(0.5))])


def test_precomputed_embeddings_pass_unpruned(engines, ref):
    engine = engines.get(FAMILY, {"rate": 0.5}, enable_mm_embeds=True)
    embeds = ask(FRAMES)
    embeds.precomputed = ref
    pixels = Request(chat(VIDEO, "Why?"), [Clip(FRAMES, settings=Settings(0.5))])
    ((output, _), _) = run_and_check(engine, ref, [embeds, pixels])
    assert output.prompt_token_ids.count(ref.video_id) == 160


def test_a_server_that_lets_requests_turn_it_on(engines, ref):
    engine = engines.get(FAMILY, {"rate": 0, "request_overrides": "any"})
    requests = [ask(FRAMES), ask(FRAMES, Settings(0.9), evs_rate=0.9), ask(FRAMES, Settings(0.5), evs_rate=0.5)]
    outputs = run_and_check(engine, ref, requests)
    assert [output.prompt_token_ids.count(ref.video_id) for output, _ in outputs] == [160, 20, 80]


@pytest.mark.parametrize(
    "evs, options, word",
    [
        ({"rate": 1.0}, {}, "rate"),
        ({"rate": "0.5"}, {}, "rate"),
        ({"ratio": 0.5}, {}, "ratio"),
        ({"rate": 0.5, "threshold": 3}, {}, "contradict"),
        ({"rate": 0.5, "positions": "kept"}, {}, "positions"),
        ([0.5], {}, "mapping"),
        ({"rate": 0.5}, {"video_pruning_rate": 0.5}, "video-pruning-rate"),
        ({"rate": 0.5}, {"mm_processor_kwargs": {"evs_rate": 0.5}}, "evs_rate"),
    ],
    ids=str,
)
def test_refused_at_start_up(engines, model_dir, evs, options, word):
    engines.close()
    with pytest.raises(ValueError) as error:
        start_engine(model_dir(FAMILY), evs, **options)
    assert word in str(error.value)
