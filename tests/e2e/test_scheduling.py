# SPDX-License-Identifier: Apache-2.0
"""What the scheduler does to a pruned prompt changes nothing: cut prefill, cached prefixes, preemption, speculation."""

import pytest

from evs_vllm.testing import real_clip_frames, synthetic_clip
from tests.e2e.harness import IMAGE, VIDEO, Request, ask, chat, run_and_check
from tests.reference.hf import Clip, Picture, Settings

pytestmark = pytest.mark.vllm

BLOCK = 32  # the smallest block of the CPU attention
EVS = {"rate": 0.75, "request_overrides": "any"}
MODES = {
    "keep": (Settings(0.75), {}),
    "sequential": (Settings(0.75, positions="sequential"), {"evs_positions": "sequential"}),
    "off": (Settings(0), {"evs_rate": 0}),
}


@pytest.fixture
def ref(reference, family):
    return reference(family)


def clip(seed=0, frames=16, size=(112, 140)):
    return synthetic_clip(frames, size, noise=2, seed=seed)


def clip_ranges(request):
    """(start, end) in the prompt of every clip of a request that reached the engine core."""
    spans = [f.mm_position for f in request.mm_features if f.modality == "video"]
    return [(span.offset, span.offset + span.length) for span in spans]


@pytest.mark.parametrize("mode", MODES)
def test_chunked_prefill_cuts_the_clip(engines, ref, family, mode):
    engine = engines.get(family, EVS, max_num_batched_tokens=32, enable_prefix_caching=False)
    settings, kwargs = MODES[mode]
    media = [Clip(clip(1, 16), settings=settings), Clip(real_clip_frames("carphone_pristine", 12), settings=settings)]
    requests = [
        ask(clip(0, 16), settings, **kwargs),
        Request(chat("Here are two clips. ", VIDEO, "Compare ", VIDEO, "Why?"), media, kwargs or None),
    ]
    for request in requests:
        engine.reset()
        run_and_check(engine, ref, [request])
        (sent,) = engine.sent
        starts = {step.computed for step in engine.steps}
        for first, end in clip_ranges(sent):
            assert any(first < start < end for start in starts), f"no prefill step began inside the clip {first}..{end}"
    engine.reset()
    run_and_check(engine, ref, requests * 3)


@pytest.mark.parametrize("mode", MODES)
def test_second_turn_hits_the_prefix_cache(engines, ref, family, mode):
    engine = engines.get(family, EVS, block_size=BLOCK, enable_prefix_caching=True)
    settings, kwargs = MODES[mode]
    frames = clip(3, 24)
    first = ask(frames, settings, **kwargs)
    ((answer, _),) = run_and_check(engine, ref, [first])
    assert answer.num_cached_tokens == 0
    ((_, clip_end),) = clip_ranges(engine.sent[-1])

    said = ref.tokenizer.decode(answer.outputs[0].token_ids)
    second = Request(first.prompt + said + "<|im_end|>\n" + chat("And what comes next?"), first.media, kwargs or None)
    hits = engine.metric("vllm:prefix_cache_hits")
    ((output, result),) = run_and_check(engine, ref, [second])
    assert output.num_cached_tokens >= clip_end, "the second turn computed the clip again"
    assert output.num_cached_tokens < len(result.prompt_ids)
    assert engine.metric("vllm:prefix_cache_hits") - hits == output.num_cached_tokens

    # A third turn with a new clip, after the cached one.
    media = [*first.media, Clip(clip(4, 9), settings=settings)]
    third = Request(second.prompt + "Yes.<|im_end|>\n" + chat(VIDEO, "Compare the two."), media, kwargs or None)
    ((output, _),) = run_and_check(engine, ref, [third])
    assert output.num_cached_tokens >= clip_end


@pytest.mark.parametrize("mode", MODES)
def test_prefix_cache_hit_ends_inside_the_clip(engines, ref, family, mode):
    engine = engines.get(family, EVS, block_size=BLOCK, enable_prefix_caching=True)
    settings, kwargs = MODES[mode]
    frames = clip(5, 26)
    run_and_check(engine, ref, [ask(frames, settings, "What moves?", **kwargs)])
    ((first, end),) = clip_ranges(engine.sent[-1])
    assert end % BLOCK != 0, "choose another clip: a block must end inside this one"
    other = ask(frames, settings, "How many people ride their bikes down the street?", **kwargs)
    ((output, _),) = run_and_check(engine, ref, [other])
    assert first < output.num_cached_tokens < end


@pytest.mark.parametrize("mode", MODES)
def test_other_settings_share_no_prefix(engines, ref, family, mode):
    engine = engines.get(family, EVS, block_size=BLOCK, enable_prefix_caching=True)
    settings, kwargs = MODES[mode]
    frames = clip(6, 24)
    run_and_check(engine, ref, [ask(frames, settings, **kwargs)])
    for name, (others, other_kwargs) in MODES.items():
        ((output, _),) = run_and_check(engine, ref, [ask(frames, others, **other_kwargs)])
        if name == mode:
            assert output.num_cached_tokens >= BLOCK
        else:  # the text before the clip fits no block
            assert output.num_cached_tokens == 0, f"{mode} -> {name}"


def test_preemption(engines, ref, family):
    options = {"block_size": BLOCK, "max_model_len": 320, "num_gpu_blocks_override": 16, "enable_prefix_caching": False}
    engine = engines.get(family, EVS, **options)
    requests = []
    for i in range(6):
        settings, kwargs = list(MODES.values())[i % 2]
        requests.append(ask(clip(40 + i, 8 + i), settings, **kwargs))
        requests[-1].max_tokens = 48
    before = engine.metric("vllm:num_preemptions")
    run_and_check(engine, ref, requests)
    assert engine.metric("vllm:num_preemptions") > before, "nothing was preempted"


@pytest.mark.parametrize("mode", MODES)
def test_ngram_speculative_decoding(engines, ref, family, mode):
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    engine = engines.get(family, EVS, speculative_config=speculation)
    settings, kwargs = MODES[mode]
    picture = Picture(synthetic_clip(1, (56, 84), "noise", seed=8)[0])
    requests = [
        ask(clip(52, 12), settings, **kwargs),
        Request(chat(IMAGE, VIDEO, "Why?"), [picture, Clip(clip(51, 9), settings=settings)], kwargs or None),
    ]
    for request in requests:
        request.max_tokens = 32
    before = {name: engine.metric(name) for name in SPECULATION}
    run_and_check(engine, ref, requests)
    drafted, accepted = (engine.metric(name) - before[name] for name in SPECULATION)
    assert drafted > 0 and accepted > 0, f"{drafted} tokens drafted, {accepted} accepted: nothing was speculated"


SPECULATION = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
