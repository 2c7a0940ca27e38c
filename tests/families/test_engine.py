# SPDX-License-Identifier: Apache-2.0
"""InternVL, LLaVA, Gemma 4, Ovis: one frame a unit, text between frames or extra rows, 1-D RoPE. vLLM answers like the
reference.

One engine for each family: its steps are so short that every prefill is cut, and it caches prefixes.
"""

import pytest
import torch

from evs_vllm.core.plan import RetentionPlan
from evs_vllm.families import family_of
from evs_vllm.testing import real_clip_frames, synthetic_clip
from tests.e2e.harness import TOLERANCE, Request, check, expected, run_and_check
from tests.families.registry import FAMILIES, engine_with_whole_frames, families
from tests.reference.hf import Clip, Picture, Settings
from tests.reference.tower import TowerSettings

pytestmark = [pytest.mark.vllm, families(engine_with_whole_frames)]

SERVER = Settings(0.75)
MODES = {
    "keep": (Settings(0.5), {"evs_rate": 0.5}),
    "sequential": (Settings(0.5, positions="sequential"), {"evs_rate": 0.5, "evs_positions": "sequential"}),
    "off": (Settings(0), {"evs_rate": 0}),
}


@pytest.fixture(scope="module")
def ref(reference, family):
    return reference(family)


@pytest.fixture
def engine(engines, family, facts):
    options = {"max_num_batched_tokens": facts.step_tokens, "block_size": 32, "enable_prefix_caching": True}
    return engines.get(family, {"rate": 0.75, "request_overrides": "any"}, **options)


@pytest.fixture
def clip(facts):
    def make(seed=0, frames=8, **kwargs):
        return synthetic_clip(frames, facts.frame_size, seed=seed, noise=kwargs.pop("noise", 2), **kwargs)

    return make


def chat(*parts):
    return "<|im_start|>user\n" + "".join(parts) + "<|im_end|>\n<|im_start|>assistant\n"


def ask(ref, frames, settings=SERVER, question="Describe the video.", **kwargs):
    return Request(chat(ref.video, "\n", question), [Clip(frames, settings=settings)], kwargs or None)


@pytest.fixture
def rotated(engine, facts):
    """Every positions tensor that reached a rotary embedding, of which layers of one kind share one."""
    calls = []
    embeddings = {layer.self_attn.rotary_emb for layer in engine.language_model.layers}
    assert sorted(type(rotary).__name__ for rotary in embeddings) == sorted(facts.rotary)

    def record(rotary):
        forward = rotary.forward

        def recording(positions, *args, **kwargs):
            calls.append(positions.detach().clone())
            return forward(positions, *args, **kwargs)

        rotary.forward = recording

    for rotary in embeddings:
        record(rotary)
    yield calls
    for rotary in embeddings:
        del rotary.forward


@pytest.mark.parametrize("positions", ["keep", "sequential"])
def test_rates_and_positions(engine, ref, clip, rotated, positions, facts):
    per_frame = facts.per_unit
    for seed, rate in enumerate((0, 0.75, 0.9)):
        engine.reset()
        rotated.clear()
        settings = Settings(rate, positions=positions)
        request = ask(ref, clip(seed), settings, evs_rate=rate, evs_positions=positions)
        ((output, result),) = run_and_check(engine, ref, [request])
        assert result.grids == [(8, *facts.grid)]
        assert len(result.kept[0]) == max(per_frame, int(8 * per_frame * (100 - 100 * rate) / 100))
        assert output.prompt_token_ids.count(ref.video_id) == len(result.kept[0]) + facts.extra_rows
        # What the attention of the language model sees: one axis, the places of the unpruned prompt.
        assert all(ids.ndim == 1 for ids in rotated)
        layers = len(engine.language_model.layers)
        seen = torch.cat(rotated[::layers]).tolist()
        assert all(torch.equal(ids, rotated[i - i % layers]) for i, ids in enumerate(rotated))
        decoded = [result.following + step for step in range(len(result.tokens) - 1)]
        assert seen == result.positions[0].tolist() + decoded
        assert (result.following > len(result.prompt_ids)) == (positions == "keep" and rate > 0)


def test_requests_at_once_with_their_own_rates(engine, ref, clip):
    rates = [0, 0.1, 0.5, 0.75, 0.9, 0.99]
    requests = []
    for i, rate in enumerate(rates):
        settings = Settings(rate, positions="sequential" if i % 2 else "keep")
        kwargs = {"evs_rate": rate, "evs_positions": settings.positions}
        requests.append(ask(ref, clip(10 + i, 3 + i), settings, f"Question {i}?", **kwargs))
    run_and_check(engine, ref, requests)
    together = max(len({s.request_id for s in engine.steps[i : i + 6]}) for i in range(len(engine.steps)))
    assert together > 1, "no two requests were in flight together"


def test_clips_of_different_lengths_in_one_call_of_the_tower(engine, ref, clip):
    calls, model = [], engine.runner.model
    embed = model.embed_multimodal

    def recording(**kwargs):
        calls.append(len(kwargs.get("evs_plan", ())))
        return embed(**kwargs)

    # Short prompts: several clips begin in the same step.
    requests = [ask(ref, clip(20 + i, 1 + i), Settings(0.99), "Why?", evs_rate=0.99) for i in range(3)]
    model.embed_multimodal = recording
    try:
        run_and_check(engine, ref, requests)
    finally:
        del model.embed_multimodal
    assert max(calls) > 1, calls


@pytest.mark.parametrize("mode", MODES)
def test_chunked_prefill_and_second_turn(engine, ref, clip, mode, facts):
    settings, kwargs = MODES[mode]
    frames = clip(30, facts.long)
    first = ask(ref, frames, settings, **kwargs)
    ((answer, _),) = run_and_check(engine, ref, [first])
    assert answer.num_cached_tokens == 0
    (feature,) = engine.sent[-1].mm_features
    start, end = feature.mm_position.offset, feature.mm_position.offset + feature.mm_position.length
    assert any(start < step.computed < end for step in engine.steps), "no prefill step began inside the clip"

    other = ask(ref, frames, settings, "How many people ride their bikes down the street?", **kwargs)
    ((output, _),) = run_and_check(engine, ref, [other])
    assert start < output.num_cached_tokens, "nothing of the clip came from the cache"

    said = ref.tokenizer.decode(answer.outputs[0].token_ids)
    second = Request(first.prompt + said + "<|im_end|>\n" + chat("And what comes next?"), first.media, kwargs or None)
    ((output, _),) = run_and_check(engine, ref, [second])
    assert output.num_cached_tokens >= end - facts.block_size, "the second turn computed the clip again"


@pytest.mark.parametrize("positions", ["keep", "sequential"])
def test_images_and_videos_in_any_order(engine, ref, clip, positions, facts):
    settings = Settings(0.75, positions=positions)
    kwargs = {"evs_positions": positions}
    # Two tiles and a thumbnail; InternVL's own format makes the latter with Pillow, the reference does not.
    size = (112, 112) if ref.chat_format else (112, 224)
    picture = Picture(synthetic_clip(1, size, "noise", seed=3)[0])
    one, other = (Clip(clip(40 + i, 4 + i), settings=settings) for i in range(2))
    if not facts.images:
        run_and_check(engine, ref, [Request(chat("Why? ", ref.video, "\nWhat moves?"), [one], kwargs)])
        return
    orders = {
        "image, video": [ref.image, ref.video],
        "video, image, video": [ref.video, ref.image, ref.video],
    }
    media = {"image, video": [picture, one], "video, image, video": [one, picture, other]}
    for name, items in orders.items():
        if items.count(ref.video) > facts.limits["video"]:
            continue
        prompt = chat(*(f"{item}\n" for item in items), "What moves?")
        run_and_check(engine, ref, [Request(prompt, media[name], kwargs)])


REUSE = {
    "rate 0.5": (TowerSettings(0.5), {"evs_rate": 0.5}),
    "rate 0.9": (TowerSettings(0.9), {"evs_rate": 0.9}),
    "no refresh": (TowerSettings(0.75, refresh=0), {"evs_encoder_refresh": 0}),
    "refresh every other": (TowerSettings(0.75, refresh=2), {"evs_encoder_refresh": 2}),
    "sequential": (TowerSettings(0.75, positions="sequential"), {"evs_positions": "sequential"}),
    "unit 0 only": (TowerSettings(threshold=255.0, refresh=0), {"evs_threshold": 255, "evs_encoder_refresh": 0}),
}


def test_encoder_reuse(engine, ref, clip, family, facts):
    if not family_of(FAMILIES[family].tiny.architecture).reuse:
        with pytest.raises(Exception, match="vision tower is not supported"):
            engine.generate([ask(ref, clip(50), evs_encoder="reuse")])
        return
    model, calls = engine.runner.model, []
    embed = model.embed_multimodal

    def recording(**kwargs):
        calls.append(kwargs)
        return embed(**kwargs)

    requests = [
        ask(ref, clip(50 + i, 4 + i), settings, f"Question {i}?", evs_encoder="reuse", **kwargs)
        for i, (settings, kwargs) in enumerate(REUSE.values())
    ]
    whole = ask(ref, clip(60, 5), Settings(0.75), "Why?")
    picture = Picture(synthetic_clip(1, (112, 112), "noise", seed=5)[0])
    media = [picture, Clip(clip(61, 6), settings=TowerSettings(0.75)), Clip(clip(62, 3), settings=TowerSettings(0.75))]
    prompt = chat(ref.image, "\n", ref.video, "\n", ref.video, "\nWhat moves?")
    if not facts.images:
        media, prompt = media[1:2], chat("Why? ", ref.video, "\nWhat moves?")
    mixed = Request(prompt, media, {"evs_encoder": "reuse"})
    model.embed_multimodal = recording
    try:
        run_and_check(engine, ref, [*requests[:3], whole, *requests[3:], mixed])
    finally:
        del model.embed_multimodal
    calls = [kwargs for kwargs in calls if "evs_plan" in kwargs]
    arrays = [array for kwargs in calls for array in kwargs["evs_plan"]]
    plans = [RetentionPlan.from_array(array.numpy()) for array in arrays]
    (pixels,) = (name for name in calls[0] if name.startswith("pixel_values"))
    flat = "video_num_patches" in calls[0]  # one frame after the other, or a tensor for each clip
    per_clip = [clip for kwargs in calls for clip in kwargs[pixels]]
    frames = len(per_clip) if flat else sum(map(len, per_clip))
    assert {plan.encoder for plan in plans} == {"reuse", "full"}
    assert frames == sum(-(-len(plan.computed) // facts.per_unit) for plan in plans), (
        "pixels that nobody computes travelled"
    )

    # All clips in one call get what they get alone.
    together = {pixels: per_clip}
    if flat:
        together = {name: torch.cat([kwargs[name] for kwargs in calls]) for name in (pixels, "video_num_patches")}
    alone = [rows for kwargs in calls for rows in embed(**kwargs)]
    for one, other in zip(alone, embed(**{**calls[0], **together, "evs_plan": arrays}), strict=True):
        assert one.shape == other.shape and float((one - other).abs().max()) <= 1e-5 * float(one.abs().max())

    # The comparison can fail: the tower as a whole, or another choice of what is computed, gives other logprobs.
    engine.reset()
    (output,) = engine.generate([requests[3]])
    check(output, expected(ref, requests[3]))
    for settings in (Settings(0.75), TowerSettings(0.75, refresh=0)):
        other = ref.generate(requests[3].prompt, [Clip(requests[3].media[0].frames, settings=settings)], 12)
        with pytest.raises(AssertionError):
            check(output, other)


def test_real_video_is_resized(engine, ref):
    run_and_check(engine, ref, [ask(ref, real_clip_frames("bikes", 8))])


def test_the_comparison_can_fail(engine, ref, clip):
    request = ask(ref, clip(1))
    (output,) = engine.generate([request])
    check(output, expected(ref, request))

    def one_id_off(ids):
        ids = ids.copy()
        ids[0, 30] += 1
        return ids

    sequential = [Clip(request.media[0].frames, settings=Settings(0.75, positions="sequential"))]
    for what, result in {
        "one position ID off by one": ref.generate(request.prompt, request.media, 12, one_id_off),
        "sequential instead of keep": ref.generate(request.prompt, sequential, 12),
    }.items():
        first = output.outputs[0].logprobs[0]
        off = max(abs(entry.logprob - float(result.logprobs[0][token])) for token, entry in first.items())
        assert off > 10 * TOLERANCE, f"{what} moves the first logprobs by {off:.1e} only"
        with pytest.raises(AssertionError):
            check(output, result)
