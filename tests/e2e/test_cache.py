# SPDX-License-Identifier: Apache-2.0
"""Cache identity: the same video with other settings never shares an entry, with the same settings always does."""

import numpy as np
import pytest

from evs_vllm.testing import synthetic_clip
from tests.e2e.harness import IMAGE, VIDEO, Request, ask, chat, run_and_check
from tests.reference.hf import Clip, Picture, Settings

pytestmark = pytest.mark.vllm

FRAMES = synthetic_clip(16, noise=2, seed=70)

# Every setting that shapes a clip, and what the server keeps by default.
VARIANTS = {
    "server": ({}, Settings(0.75)),
    "off": ({"evs_rate": 0}, Settings(0)),
    "rate 0.5": ({"evs_rate": 0.5}, Settings(0.5)),
    "sequential": ({"evs_positions": "sequential"}, Settings(0.75, positions="sequential")),
    "minimum": ({"evs_min_tokens_per_unit": 2}, Settings(0.75, min_tokens_per_unit=2)),
    "maximum": ({"evs_max_tokens": 30}, Settings(0.75, max_tokens=30)),
    "contrast": ({"evs_selection": "contrast"}, Settings(0.75, selection="contrast")),
    "threshold 2": ({"evs_threshold": 2}, Settings(threshold=2.0)),
    "threshold 9": ({"evs_threshold": 9}, Settings(threshold=9.0)),
}


@pytest.fixture
def engine(engines, family):
    return engines.get(family, {"rate": 0.75, "request_overrides": "any"}, enable_prefix_caching=True)


@pytest.fixture
def ref(reference, family):
    return reference(family)


def identifiers(engine):
    return [feature.identifier for sent in engine.sent for feature in sent.mm_features]


def processor_hits(engine):
    return engine.metric("vllm:mm_cache_hits")


def test_every_setting_has_its_own_entry(engine, ref):
    requests = [ask(FRAMES, settings, **kwargs) for kwargs, settings in VARIANTS.values()]
    before = processor_hits(engine)
    run_and_check(engine, ref, requests)
    assert len(set(identifiers(engine))) == len(VARIANTS)
    assert processor_hits(engine) == before, "a clip was taken from the cache under other settings"

    # Again, in another order, now all from the caches: still the right answers.
    engine.sent.clear()
    run_and_check(engine, ref, requests[::-1])
    assert processor_hits(engine) == before + len(VARIANTS)
    run_and_check(engine, ref, requests)
    assert len(set(identifiers(engine))) == len(VARIANTS)


SAME = [
    ({}, {"evs_rate": 0.75}),
    ({}, {"evs_positions": "keep"}),
    ({}, {"evs_rate": 0.75, "evs_positions": "keep", "evs_min_tokens_per_unit": 0}),
    ({"evs_rate": 0.5}, {"evs_rate": 5e-1}),
    ({"evs_threshold": 9}, {"evs_threshold": 9.0}),
    ({"evs_rate": 0}, {"evs_rate": 0.0}),
]


@pytest.mark.parametrize("one, other", SAME)
def test_the_same_settings_share_the_entry(engine, one, other):
    before = processor_hits(engine)
    first, second = engine.generate([ask(FRAMES, **one)]), engine.generate([ask(FRAMES, **other)])
    assert len(set(identifiers(engine))) == 1
    assert processor_hits(engine) == before + 1
    assert first[0].outputs[0].token_ids == second[0].outputs[0].token_ids
    assert second[0].num_cached_tokens is not None


def test_images_do_not_care(engine, ref):
    picture = Picture(synthetic_clip(1, (84, 112), "noise", seed=71)[0])
    for rate in (0.5, 0.9):
        clip = Clip(FRAMES, settings=Settings(rate))
        run_and_check(engine, ref, [Request(chat(IMAGE, VIDEO, "Why?"), [picture, clip], {"evs_rate": rate})])
    seen = [(f.modality, f.identifier) for sent in engine.sent for f in sent.mm_features]
    assert len({i for m, i in seen if m == "video"}) == 2


def test_two_clips_of_one_request_are_told_apart(engine, ref):
    clips = [Clip(np.ascontiguousarray(f), settings=Settings(0.75)) for f in (FRAMES, FRAMES[::-1])]
    run_and_check(engine, ref, [Request(chat(VIDEO, VIDEO, "Compare."), clips)])
    assert len(set(identifiers(engine))) == 2


def test_one_clip_cached_and_one_new(engine, ref):
    old, new = (Clip(synthetic_clip(12, noise=2, seed=72 + i), settings=Settings(0.75)) for i in range(2))
    run_and_check(engine, ref, [Request(chat(VIDEO, "Why?"), [old])])
    before = processor_hits(engine)
    run_and_check(engine, ref, [Request(chat(VIDEO, VIDEO, "Compare."), media) for media in ([new, old], [old, new])])
    assert processor_hits(engine) == before + 3


def test_ids_given_by_the_user(engine, ref):
    # A request may name its media; vLLM then hashes nothing, and the settings must still be told apart.
    for kwargs, settings in (VARIANTS["server"], VARIANTS["rate 0.5"], VARIANTS["off"]):
        request = ask(FRAMES, settings, **kwargs)
        request.uuids = {"video": ["my-clip"]}
        run_and_check(engine, ref, [request])
    assert len(set(identifiers(engine))) == 3


def test_without_processor_cache(engines, ref, family):
    engine = engines.get(family, {"rate": 0.75, "request_overrides": "any"}, mm_processor_cache_gb=0)
    requests = [ask(FRAMES, settings, **kwargs) for kwargs, settings in VARIANTS.values()]
    run_and_check(engine, ref, requests)
    run_and_check(engine, ref, requests)
    assert len(set(identifiers(engine))) >= len(VARIANTS)
