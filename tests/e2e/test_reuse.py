# SPDX-License-Identifier: Apache-2.0
"""The encoder "reuse" in vLLM: what reaches the tower, what comes out of it, and the answers of the reference."""

import numpy as np
import pytest
import torch

from evs_vllm.core.plan import RetentionPlan
from evs_vllm.engine.plan_field import PLAN_FIELD, plan_of
from evs_vllm.testing import real_clip_frames, synthetic_clip
from tests.e2e.harness import (
    AUDIO,
    IMAGE,
    TOLERANCE,
    VIDEO,
    EnginePool,
    Request,
    ask,
    chat,
    check,
    check_positions,
    expected,
    recorded_positions,
    run_and_check,
    sized,
)
from tests.families.registry import (
    engine_with_audio,
    engine_with_patch_rows,
    families,
    make_model,
    most_engine_tests,
)
from tests.reference.hf import Clip, Picture, Settings, Sound
from tests.reference.tower import TowerReference, TowerSettings

pytestmark = pytest.mark.vllm

EVS = {"rate": 0.75, "encoder": "auto", "request_overrides": "any"}
CACHED = {"block_size": 32, "enable_prefix_caching": True}
REUSE = TowerSettings(0.75)
PIXELS = "pixel_values_videos"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with a deeper tower than the other tests use, so that stale keys pass through several layers."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = make_model(tmp_path_factory.mktemp("deep") / family, family, vision_layers=4)
        return made[family]

    return get


@pytest.fixture(scope="module")
def pool(engines, folders):
    engines.close()
    pool = EnginePool(folders)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def ref(folders, family):
    return TowerReference(folders(family))


@pytest.fixture
def engine(pool, family):
    return pool.get(family, EVS, **CACHED)


class Recorder:
    """What the engine's `embed_multimodal` was given and gave, and how many patch rows the tower embedded."""

    def __init__(self, engine):
        self.model, self.calls, self.rows = engine.runner.model, [], []

    def __enter__(self):
        embed = self.model.embed_multimodal

        def recording(**kwargs):
            out = embed(**kwargs)
            self.calls.append((kwargs, [x.clone() for x in out]))
            return out

        self.model.embed_multimodal = recording
        # Not a hook: vLLM calls the forward of some modules directly.
        patch_embed = self.model.visual.patch_embed
        forward = patch_embed.forward

        def counting(pixels):
            self.rows.append(len(pixels))
            return forward(pixels)

        patch_embed.forward = counting
        return self

    def __exit__(self, *error):
        del self.model.embed_multimodal, self.model.visual.patch_embed.forward

    @property
    def plans(self):
        return [RetentionPlan.from_array(a.numpy()) for kwargs, _ in self.calls for a in kwargs.get(PLAN_FIELD, [])]


@pytest.fixture
def clip(family):
    """Draws clips that reach the model without resizing; `size` is that for tokens of 28 x 28 pixels."""

    def make(seed=0, frames=16, size=(112, 140), noise=2, **kwargs):
        return synthetic_clip(frames, sized(family, size), seed=seed, noise=noise, **kwargs)

    return make


def embeddings(engine, request):
    """The embedding rows of a request's only clip."""
    engine.reset()
    with Recorder(engine) as seen:
        engine.generate([request])
    ((_, (rows,)),) = seen.calls
    return rows


def computed_by(ref, request):
    """Flat indices of the tokens that the reference computes of a request's only clip."""
    (media,) = request.media
    _, grid, pixels = ref._see_clip(media)
    return np.flatnonzero(ref.computed(media, grid, pixels)).tolist()


# First in the module: it starts an engine of its own, the others share one.
@families(most_engine_tests)
def test_rate_zero_is_the_stock_tower_bit_for_bit(pool, family, clip):
    frames = {
        "synthetic": clip(1),
        "odd": clip(2, 7, size=(84, 140)),
        "real": real_clip_frames("carphone_pristine", 12),
    }
    picture = Picture(clip(3, 1, kind="noise", size=(84, 112))[0])

    def requests(**kwargs):
        asked = [ask(f, Settings(0), **kwargs) for f in frames.values()]
        return [*asked, Request(chat(IMAGE, VIDEO, "Why?"), [picture, Clip(frames["odd"])], kwargs or None)]

    def answers(engine, **kwargs):
        with Recorder(engine) as seen:
            outputs = [engine.generate([request])[0] for request in requests(**kwargs)]
        steps = [
            [sorted((token, entry.logprob) for token, entry in step.items()) for step in out.outputs[0].logprobs]
            for out in outputs
        ]
        return [row for _, rows in seen.calls for row in rows], steps, seen.rows, seen.plans

    stock_embeds, stock_steps, stock_rows, _ = answers(pool.get(family, None, **CACHED))
    embeds, steps, rows, plans = answers(pool.get(family, EVS, **CACHED), evs_rate=0)
    assert plans == [], "a clip that loses nothing carries a plan"
    assert rows == stock_rows
    assert len(embeds) == len(stock_embeds) == 4, "three clips and a picture; the last clip is known"
    assert all(torch.equal(a, b) for a, b in zip(embeds, stock_embeds, strict=True))
    assert steps == stock_steps


@families(engine_with_patch_rows)
@pytest.mark.parametrize("rate", [0.5, 0.75, 0.9, 0.99])
def test_one_request(engine, ref, clip, rate):
    request = ask(clip(5), TowerSettings(rate), evs_rate=rate)
    with Recorder(engine) as seen:
        ((output, result),) = run_and_check(engine, ref, [request])
    (plan,) = seen.plans
    assert plan.encoder == "reuse" and plan.kept.tolist() == result.kept[0].tolist()
    assert plan.computed.tolist() == computed_by(ref, request)
    assert seen.rows == [4 * len(plan.computed)]
    assert output.prompt_token_ids.count(ref.clip_id) == plan.num_kept


@families(most_engine_tests)
@pytest.mark.parametrize("name", ["bikes", "carphone_pristine", "bigbuckbunny"])
def test_real_video(engine, ref, name):
    run_and_check(engine, ref, [ask(real_clip_frames(name, 16), REUSE)])


@families(most_engine_tests)
@pytest.mark.parametrize("refresh", [0, 0.1, 5, 25, 255])
def test_refresh(engine, ref, clip, refresh):
    request = ask(clip(4, 17), TowerSettings(0.75, refresh=refresh), evs_encoder_refresh=refresh)
    with Recorder(engine) as seen:
        ((_, result),) = run_and_check(engine, ref, [request])
    (plan,) = seen.plans
    assert plan.computed.tolist() == computed_by(ref, request)
    assert len(plan.refreshed) <= 135 // 2
    if refresh < 1:
        assert bool(len(plan.refreshed)) == bool(refresh), "0 is none, and the lowest level any difference"
    assert len(result.kept[0]) == 45, "refreshing keeps no more tokens"
    assert seen.rows == [4 * len(plan.computed)]


SETTINGS = {
    "threshold": (TowerSettings(threshold=3.0), {"evs_threshold": 3.0}),
    "threshold, refresh": (TowerSettings(threshold=9.0, refresh=3), {"evs_threshold": 9.0, "evs_encoder_refresh": 3}),
    "threshold, cap": (TowerSettings(threshold=1.0, max_tokens=51), {"evs_threshold": 1.0, "evs_max_tokens": 51}),
    "minimum": (TowerSettings(0.9, min_tokens_per_unit=3), {"evs_rate": 0.9, "evs_min_tokens_per_unit": 3}),
    "sequential": (TowerSettings(0.75, positions="sequential"), {"evs_positions": "sequential"}),
    "unit 0 only": (TowerSettings(threshold=255.0), {"evs_threshold": 255}),
}


@families(most_engine_tests)
@pytest.mark.parametrize("name", SETTINGS)
def test_budgets(engine, ref, clip, name):
    settings, kwargs = SETTINGS[name]
    run_and_check(engine, ref, [ask(clip(40), settings, **kwargs), ask(clip(43, 9), settings, **kwargs)])


@families(most_engine_tests)
@pytest.mark.parametrize("size", [(28, 28), (28, 140), (140, 28), (84, 84), (112, 140)])
def test_odd_grids_and_short_clips(engine, ref, clip, facts, size):
    counts = [max(frames, facts.fewest_frames) for frames in (1, 2, 3, 6, 11)]
    requests = [ask(clip(7, frames, size=size), TowerSettings(0.6), evs_rate=0.6) for frames in counts]
    run_and_check(engine, ref, requests)


@families(engine_with_patch_rows)
def test_eight_requests_with_their_own_rates_and_encoders(engine, ref, clip, facts):
    choices = [
        (TowerSettings(0.5), {"evs_rate": 0.5}),
        (Settings(0.5), {"evs_rate": 0.5, "evs_encoder": "full"}),
        (TowerSettings(0.9, refresh=2), {"evs_rate": 0.9, "evs_encoder_refresh": 2}),
        (Settings(0), {"evs_rate": 0}),
        (TowerSettings(0.75, positions="sequential"), {"evs_encoder": "reuse", "evs_positions": "sequential"}),
        (TowerSettings(0.6), {"evs_rate": 0.6}),
        (Settings(0.9), {"evs_rate": 0.9, "evs_encoder": "full", "evs_encoder_refresh": 2}),
    ]
    requests = [
        ask(clip(80 + i, 9 + i, size=(56 + 28 * (i % 3), 140)), settings, f"Question {i}?", **kwargs)
        for i, (settings, kwargs) in enumerate(choices)
    ]
    picture = Picture(clip(8, 1, kind="noise", size=(84, 112))[0])
    media = [picture, Clip(clip(9, 12), settings=REUSE), Clip(clip(12, 5), settings=REUSE)]
    several = Request(chat(IMAGE, VIDEO, "What moves?", VIDEO, "And here?"), media)
    requests.insert(3, Request(chat(IMAGE, VIDEO, "What?"), media[:2]) if facts.one_clip else several)
    with Recorder(engine) as seen:
        run_and_check(engine, ref, requests)
    flights = max(len({s.request_id for s in engine.steps[i : i + 8]}) for i in range(len(engine.steps)))
    assert flights == 8, "the eight requests were not in flight together"
    together = [len(kwargs[PLAN_FIELD]) for kwargs, _ in seen.calls if PLAN_FIELD in kwargs]
    assert max(together) > 1, "no call of the tower held two clips"
    assert {plan.encoder for plan in seen.plans} == {"full", "reuse"}


@families(most_engine_tests)
def test_a_batch_gives_each_clip_what_it_gets_alone(engine, ref, clip):
    cases = [
        (clip(20, 16), {"evs_rate": 0.5}),
        (clip(21, 9, size=(84, 140)), {"evs_rate": 0.9}),
        (clip(22, 2), {"evs_rate": 0.5}),  # one unit: nothing to drop
        (real_clip_frames("carphone_pristine", 12), {"evs_rate": 0.75, "evs_encoder_refresh": 3}),
    ]
    requests = [ask(frames, f"Question {i}?", **kwargs) for i, (frames, kwargs) in enumerate(cases)]
    alone = [embeddings(engine, request) for request in requests]
    engine.reset()
    with Recorder(engine) as seen:
        engine.generate(requests)
    together = [row for _, rows in seen.calls for row in rows]
    assert len(seen.calls) < len(cases), "nothing was batched"
    for one in alone:
        errors = [float((one - other).abs().max()) for other in together if other.shape == one.shape]
        assert min(errors) <= 1e-5 * float(one.abs().max())


@families(engine_with_patch_rows)
def test_second_turn_hits_the_prefix_cache(engine, ref, clip, facts):
    settings, kwargs = TowerSettings(0.75, refresh=3), {"evs_encoder_refresh": 3}
    first = ask(clip(30, 24), settings, **kwargs)
    ((answer, result),) = run_and_check(engine, ref, [first])
    assert answer.num_cached_tokens == 0
    said = ref.tokenizer.decode(answer.outputs[0].token_ids)
    second = Request(first.prompt + said + "<|im_end|>\n" + chat("And what comes next?"), first.media, kwargs)
    with Recorder(engine) as seen:
        ((output, _),) = run_and_check(engine, ref, [second])
    assert output.num_cached_tokens >= len(result.kept[0]), "the second turn computed the clip again"
    assert seen.rows == []
    if facts.one_clip:
        return
    media = [*first.media, Clip(clip(42, 9), settings=settings)]
    third = Request(second.prompt + "Yes.<|im_end|>\n" + chat(VIDEO, "Compare the two."), media, kwargs)
    run_and_check(engine, ref, [third])


def test_identities(engine, ref, clip):
    frames = clip(32)
    variants = {
        "server": (REUSE, {}),
        "full": (Settings(0.75), {"evs_encoder": "full"}),
        "refresh 2": (TowerSettings(0.75, refresh=2), {"evs_encoder_refresh": 2}),
        "refresh 0": (TowerSettings(0.75, refresh=0), {"evs_encoder_refresh": 0}),
    }
    same = {
        "reuse": (REUSE, {"evs_encoder": "reuse"}, "server"),
        "auto": (REUSE, {"evs_encoder": "auto"}, "server"),
        "refresh 25": (REUSE, {"evs_encoder_refresh": 25}, "server"),
        "full, refresh 2": (Settings(0.75), {"evs_encoder": "full", "evs_encoder_refresh": 2}, "full"),
    }

    def identifier(settings, kwargs):
        run_and_check(engine, ref, [ask(frames, settings, **kwargs)])
        return engine.sent[-1].mm_features[0].identifier

    found = {name: identifier(*variant) for name, variant in variants.items()}
    assert len(set(found.values())) == len(found)
    for name, (settings, kwargs, twin) in same.items():
        assert identifier(settings, kwargs) == found[twin], name
    # Once more: now everything comes from the caches.
    for variant in variants.values():
        run_and_check(engine, ref, [ask(frames, *variant[:1], **variant[1])])


@families(most_engine_tests)
def test_pixels_that_travel(engine, clip):
    for kwargs, rows in (
        ({}, 40),
        ({"evs_encoder_refresh": 2}, 40),
        ({"evs_encoder": "full"}, 160),
        ({"evs_rate": 0}, 160),
    ):
        engine.reset()
        with Recorder(engine) as seen:
            engine.generate([ask(clip(33, kind="static", noise=0), **kwargs)])
        (feature,) = engine.sent[-1].mm_features
        plan = plan_of(feature.data) if feature.data is not None else None
        sent = [len(kwargs[PIXELS]) for kwargs, _ in seen.calls]
        # A static clip is one tie: units 0 and 1 stay, and nothing is ever stale.
        assert sent == seen.rows == [4 * rows]
        if plan is not None:
            assert len(feature.data[PIXELS].data) == 4 * len(plan.computed)


@families(most_engine_tests)
def test_a_static_clip_computes_unit_0_only(engine, ref, clip, family):
    frames = clip(34, kind="static", noise=0)
    kwargs = {"evs_threshold": 1}
    request = ask(frames, TowerSettings(threshold=1.0), **kwargs)
    with Recorder(engine) as seen:
        run_and_check(engine, ref, [request])
    assert seen.rows == [80], "20 tokens of 4 patches"
    (got,) = seen.calls[0][1]
    stock = embeddings(engine, ask(frames, evs_rate=0))
    assert got.shape == (20, stock.shape[1])
    assert float((got - stock[:20]).abs().max()) <= 1e-5 * float(stock.abs().max())
    # Nothing changes, so no key is ever stale: at any rate the kept tokens are those of the stock tower.
    half = embeddings(engine, ask(frames, evs_rate=0.5))
    assert float((half - stock[:80]).abs().max()) <= 1e-5 * float(stock.abs().max())


@families(engine_with_patch_rows)
def test_the_comparison_can_fail(engine, ref, clip):
    """A reference with a small mistake in the rule is no longer matched."""
    request = ask(clip(1), TowerSettings(0.75, refresh=3), evs_encoder_refresh=3)
    request.prompt = ref.spelled(request.prompt)
    (output,) = engine.generate([request])
    check(output, expected(ref, request))
    frames = request.media[0].frames
    mistakes = {
        "full tower": Settings(0.75),
        "no refresh": TowerSettings(0.75, refresh=0),
        "another refresh": TowerSettings(0.75, refresh=4),
    }
    for what, settings in mistakes.items():
        result = ref.generate(request.prompt, [Clip(frames, settings=settings)], request.max_tokens)
        first = output.outputs[0].logprobs[0]
        off = max(abs(entry.logprob - float(result.logprobs[0][token])) for token, entry in first.items())
        assert off > 10 * TOLERANCE, f"{what} moves the first logprobs by {off:.1e} only"
        with pytest.raises(AssertionError):
            check(output, result)


@families(engine_with_audio)
@pytest.mark.parametrize("positions", ["keep", "sequential"])
def test_audio_beside_clips(engine, ref, clip, positions):
    """Sounds stand where text stands; here the clips' time is told by the request, as these models' processor does."""

    def sound(seed, samples):
        # All longer than a second: Qwen3-Omni's encoder, transformers' too, pads shorter ones to the longest of their
        # batch and lets the padding show.
        noise = np.random.default_rng(seed).standard_normal(samples) / 10
        return Sound(noise.astype(np.float32))

    settings, kwargs = TowerSettings(0.75, positions=positions), {"evs_positions": positions, "fps": 3.2}
    one, two = (Clip(clip(50 + i, 16 + i), fps=3.2, settings=settings) for i in range(2))
    picture = Picture(clip(52, 1, kind="noise", size=(84, 112))[0])
    for prompt, media in (
        (chat(AUDIO, VIDEO, "What is that?"), [sound(1, 20000), one]),
        (chat(VIDEO, AUDIO, "What is that?"), [one, sound(2, 31200)]),
        (chat(VIDEO, AUDIO, AUDIO, IMAGE, VIDEO, "Why?"), [one, sound(3, 17600), sound(4, 24000), picture, two]),
        (chat(AUDIO, "Why?"), [sound(5, 20000)]),
    ):
        engine.reset()
        with recorded_positions(engine) as seen:
            ((_, result),) = run_and_check(engine, ref, [Request(prompt, media, kwargs)])
        check_positions(seen, result)


# Last of a family: it starts an engine of its own.
@families(engine_with_patch_rows)
def test_settings_of_the_server(pool, ref, clip, family):
    engine = pool.get(family, EVS | {"encoder": "reuse", "encoder_refresh": 2, "rate": 0.9}, max_num_batched_tokens=32)
    requests = [
        ask(clip(36, 32), TowerSettings(0.9, refresh=2)),
        ask(clip(36, 32), TowerSettings(0.9, refresh=0), evs_encoder_refresh=0),
        ask(clip(37, 22), TowerSettings(0.5, refresh=2), evs_rate=0.5),
        ask(clip(37, 22), Settings(0.5), evs_rate=0.5, evs_encoder="full"),
    ]
    # Chunked prefill: no step is longer than the clip, so some begin inside it.
    for request in requests:
        engine.reset()
        run_and_check(engine, ref, [request])
        (span,) = (f.mm_position for f in engine.sent[-1].mm_features)
        assert any(span.offset < step.computed < span.offset + span.length for step in engine.steps)
    engine.reset()
    media = [Clip(clip(38, 10), settings=TowerSettings(0.9, refresh=2)), Picture(clip(39, 1, size=(56, 84))[0])]
    run_and_check(engine, ref, [*requests, Request(chat(VIDEO, IMAGE, "Why?"), media)])
