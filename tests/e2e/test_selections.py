# SPDX-License-Identifier: Apache-2.0
"""The selections in vLLM: by default and by request, compared with the reference; caches; what a request may name."""

import numpy as np
import pytest

from evs_vllm.options import SELECTION_NAMES
from evs_vllm.testing import synthetic_clip
from tests.e2e.harness import MIN_GAP, ask, check_positions, recorded_positions, run_and_check
from tests.reference.hf import Settings
from tests.reference.tower import TowerReference, TowerSettings

pytestmark = pytest.mark.vllm

FAMILY = "qwen2_5_vl"
LIBERAL = {"threshold": 15, "encoder": "full", "request_overrides": "any"}
STRICT = {"rate": 0.75, "encoder": "full"}


@pytest.fixture
def ref(reference):
    return reference(FAMILY)


@pytest.fixture
def started(engines):
    """An engine with exactly these settings: the harness would ask for the paper's selection."""

    def get(evs):
        return engines.get(FAMILY, None, additional_config={"evs": evs}, enable_prefix_caching=True)

    return get


def untied(ref, settings, frames=16, size=(112, 140), **kwargs):
    """A request that the reference answers without a near tie.

    What is kept depends on the numbers in `learned.npz`, and so does which clips are nearly tied.
    """
    for seed in range(100, 120):
        request = ask(synthetic_clip(frames, size, noise=2, seed=seed), settings, **kwargs)
        request.answer = ref.generate(request.prompt, request.media, request.max_tokens)
        if request.answer.gap > MIN_GAP:
            return request
    raise AssertionError("the reference is nearly tied whatever the clip")


def check_alone(engine, ref, request):
    """One request by itself: its tokens, positions and logprobs are the reference's; returns the kept tokens."""
    engine.reset()
    with recorded_positions(engine) as seen:
        ((output, result),) = run_and_check(engine, ref, [request])
    check_positions(seen, result)
    (kept,) = result.kept
    assert output.prompt_token_ids.count(ref.video_id) == len(kept)
    return kept.tolist()


def test_a_server_that_says_nothing_selects_by_the_learned_descriptor(started, ref):
    assert SELECTION_NAMES[0] == "learned"
    engine = started(STRICT)
    kept = check_alone(engine, ref, untied(ref, Settings(0.75, selection="learned")))
    assert len(kept) == 40


def test_stricter_admits_selections_that_keep_no_more(started, ref):
    engine = started(STRICT)
    for name in SELECTION_NAMES:
        check_alone(engine, ref, untied(ref, Settings(0.75, selection=name), evs_selection=name))
    short = untied(ref, Settings(0.75, selection="paper"), frames=4, evs_selection="paper")
    assert len(check_alone(engine, ref, short)) == 20, "its stock count, where the server keeps 23"
    with pytest.raises(ValueError, match="evs_selection=paper, evs_threshold=200.*could cost more"):
        engine.generate([ask(synthetic_clip(8), evs_selection="paper", evs_threshold=200)])


def test_each_selection_by_request(started, ref):
    engine, kept = started(LIBERAL), []
    frames = synthetic_clip(16, noise=2, seed=3)
    for name in SELECTION_NAMES:
        request = untied(ref, Settings(0.5, selection=name), evs_rate=0.5, evs_selection=name)
        assert len(check_alone(engine, ref, request)) == 80
        ((out),) = engine.generate([ask(frames, evs_rate=0.5, evs_selection=name)])
        kept.append(out.outputs[0].logprobs[0])
    assert len({repr(first) for first in kept}) == 3, "of one clip they keep different tokens"


def test_thresholds(started, ref):
    engine = started(LIBERAL)
    check_alone(engine, ref, untied(ref, Settings(threshold=15.0, selection="learned")))
    counts = []
    for level in (0.5, 255.0):
        request = untied(ref, Settings(threshold=level, selection="learned"), evs_threshold=level)
        counts.append(len(check_alone(engine, ref, request)))
    assert counts[0] > counts[1] >= 20
    for settings, kwargs in (
        (Settings(threshold=40.0, selection="contrast"), {"evs_threshold": 40}),
        (Settings(threshold=6.0, max_tokens=50, selection="contrast"), {"evs_threshold": 6, "evs_max_tokens": 50}),
        (Settings(threshold=9.0, selection="paper"), {"evs_threshold": 9}),
    ):
        check_alone(engine, ref, untied(ref, settings, evs_selection=settings.selection, **kwargs))


def test_a_short_clip_is_no_still_picture(started, ref):
    """Five seconds at two frames a second: at 0.9 a tenth of the tokens is less than the first unit."""
    engine = started(LIBERAL)
    for name, count in {"learned": 20 + 4, "contrast": 20 + 4, "paper": 20}.items():
        request = untied(ref, Settings(0.9, selection=name), frames=10, evs_rate=0.9, evs_selection=name)
        kept = check_alone(engine, ref, request)
        assert len(kept) == count and kept[:20] == list(range(20)), name


def test_a_tower_that_reuses(started, model_dir):
    ref = TowerReference(model_dir(FAMILY))
    settings = TowerSettings(0.75, selection="learned")
    check_alone(started(LIBERAL), ref, untied(ref, settings, evs_rate=0.75, evs_encoder="reuse"))


def test_clips_that_are_resized(started, model_dir, monkeypatch):
    """Judged by their frames before that. Whoever makes the pixel rows, the answers are the same to the last bit."""
    from evs_vllm.engine.metrics import metrics
    from evs_vllm.engine.processor import EVSProcessorMixin

    engine, ref = started(LIBERAL), TowerReference(model_dir(FAMILY))
    apply, counters = EVSProcessorMixin.apply, metrics().frontend_clips

    def by_stock(self, *args):
        with monkeypatch.context() as patched:
            patched.setattr(self, "_evs_why_stock", "a test says so")
            return apply(self, *args)

    for encoder, kind in (("full", Settings), ("reuse", TowerSettings)):
        settings = kind(0.75, selection="learned")
        request = untied(ref, settings, 11, (97, 150), evs_rate=0.75, evs_encoder=encoder)
        made = {path: counters.labels(path)._value.get() for path in ("rows", "processor")}
        check_alone(engine, ref, request)
        (ours,) = engine.generate([request])
        engine.reset()
        with monkeypatch.context() as patched:
            patched.setattr(EVSProcessorMixin, "apply", by_stock)
            (stock,) = engine.generate([request])
        assert {path: counters.labels(path)._value.get() - n for path, n in made.items()} == {"rows": 1, "processor": 1}
        assert ours.prompt_token_ids == stock.prompt_token_ids
        assert repr(ours.outputs[0].logprobs) == repr(stock.outputs[0].logprobs)


def test_selections_do_not_share_cache_entries(started, ref):
    engine = started(LIBERAL)
    frames = np.ascontiguousarray(synthetic_clip(16, noise=2, seed=70))
    asked = [{"evs_rate": 0.75, "evs_selection": name} for name in SELECTION_NAMES]
    hits = engine.metric("vllm:mm_cache_hits")
    first = engine.generate([ask(frames, **kwargs) for kwargs in asked])
    identifiers = [feature.identifier for sent in engine.sent for feature in sent.mm_features]
    assert len(set(identifiers)) == 3 and engine.metric("vllm:mm_cache_hits") == hits
    assert all(output.num_cached_tokens < 20 for output in first), "a prefix under another selection was taken"
    again = engine.generate([ask(frames, **kwargs) for kwargs in [{"evs_rate": 0.75}, *asked[1:]]])
    assert engine.metric("vllm:mm_cache_hits") == hits + 3, "what is said and what is the default are the same"
    for one, other in zip(first, again, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


def test_a_threshold_is_not_handed_to_another_selection(started):
    engine = started(LIBERAL)
    text = "the server's threshold 15 is one of selection 'learned' and means nothing to 'contrast'"
    with pytest.raises(ValueError, match=f"Bad mm_processor_kwargs: {text}.*Set evs_threshold or evs_rate"):
        engine.generate([ask(synthetic_clip(8), evs_selection="contrast")])
