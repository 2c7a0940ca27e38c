# SPDX-License-Identifier: Apache-2.0
"""An engine without EVS beside one with it: at rate 0 its very numbers, pruned the position IDs of its full prompt.

For one kind of rotary embedding. `tests/families/test_engine.py` runs every kind and compares with Hugging Face, and
`tests/families/test_requests.py` sees that the language model is built from the same config with EVS as without.
"""

import pytest
import torch

from evs_vllm.testing import synthetic_clip
from tests.e2e.harness import Request, check, expected, start_engine, stop_engine
from tests.families.registry import make_model
from tests.reference.frames import FramesReference
from tests.reference.hf import Clip, Settings

pytestmark = pytest.mark.vllm

FAMILY = "llava_next_video"
CONTEXT = 256
"""Of the model and of the engines: so short that answers reach its end."""
OPTIONS = {"limit_mm_per_prompt": {"video": 1}, "enable_prefix_caching": False, "max_model_len": CONTEXT}


def ask(frames, settings, **kwargs):
    prompt = "<|im_start|>user\n<video>\nWhat moves?<|im_end|>\n<|im_start|>assistant\n"
    return Request(prompt, [Clip(frames, settings=settings)], kwargs or None)


def answer(engine, request):
    """The prompt, the tokens and all reported logprobs; and every tensor of positions that any layer rotated by."""
    rotary = engine.language_model.layers[0].self_attn.rotary_emb
    forward, seen = rotary.forward, []

    def recording(positions, *args, **kwargs):
        seen.append(positions.clone())
        return forward(positions, *args, **kwargs)

    rotary.forward = recording
    try:
        (output,) = engine.generate([request])
    finally:
        del rotary.forward
    steps = [sorted((t, e.logprob) for t, e in step.items()) for step in output.outputs[0].logprobs]
    assert all(ids.ndim == 1 for ids in seen)
    layers = len(engine.language_model.layers)
    return output, steps, torch.cat(seen[::layers]).tolist(), type(rotary).__name__


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("rope") / "short", FAMILY, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def frames():
    return [synthetic_clip(count, (64, 64), seed=count, noise=2) for count in (9, 4)]


@pytest.fixture(scope="module")
def stock(engines, directory, frames):
    """Answers of an engine without EVS."""
    engines.close()
    engine = start_engine(directory, None, **OPTIONS)
    try:
        assert not engine.runner.uses_mrope, "vLLM numbers this model's prompts itself"
        return [answer(engine, ask(clip, Settings())) for clip in frames]
    finally:
        stop_engine(engine)


@pytest.fixture(scope="module")
def engine(stock, directory):
    engine = start_engine(directory, {"rate": 0.75, "request_overrides": "any"}, **OPTIONS)
    yield engine
    stop_engine(engine)


def test_rate_0_gives_the_numbers_of_an_engine_without_evs(engine, stock, frames):
    assert engine.runner.uses_mrope
    for clip, (output, steps, seen, rotary) in zip(frames, stock):
        ours, our_steps, our_seen, our_rotary = answer(engine, ask(clip, Settings(), evs_rate=0))
        assert our_rotary == rotary and our_seen == seen
        assert list(ours.prompt_token_ids) == list(output.prompt_token_ids) and our_steps == steps


def test_pruned_prompts_have_the_ids_of_the_full_one(engine, stock, directory, frames):
    reference = FramesReference(directory)
    request = ask(frames[0], Settings(0.75))
    result = expected(reference, request)
    output, _, seen, _ = answer(engine, request)
    check(output, result)
    full = stock[0][2][: len(stock[0][0].prompt_token_ids)]
    kept = result.kept[0].tolist()
    start = result.prompt_ids.index(reference.video_id)
    assert seen[: len(result.prompt_ids)] == (
        full[:start] + [full[start + i] for i in kept] + full[start + 9 * 16 :]
    ), "the IDs of kept tokens and of the text after them are not those of the unpruned prompt"
    assert seen[len(result.prompt_ids) :] == [len(full) + i for i in range(len(result.tokens) - 1)]


def test_answer_ends_with_the_position_ids(engine):
    """A context of 256 with 256 position IDs: the answer to a pruned prompt ends where that to the full one would."""
    frames = synthetic_clip(11, (64, 64), seed=5, noise=2)
    request = ask(frames, Settings(0.75))
    request.max_tokens = 100
    output, _, seen, _ = answer(engine, request)
    dropped = 11 * 16 * 3 // 4
    room = CONTEXT - 32 - len(output.prompt_token_ids) - dropped
    assert len(output.outputs[0].token_ids) == room < 100 and output.outputs[0].finish_reason == "length"
    assert max(seen) < CONTEXT - 32
    sequential = ask(frames, Settings(0.75), evs_positions="sequential")
    sequential.max_tokens = 100
    assert len(answer(engine, sequential)[0].outputs[0].token_ids) == 100
    with pytest.raises(Exception, match="the model has 256"):
        engine.generate([ask(synthetic_clip(16, (64, 64), seed=5), Settings(0.75))])
