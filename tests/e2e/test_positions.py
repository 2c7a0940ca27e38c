# SPDX-License-Identifier: Apache-2.0
"""The position IDs that reach the language model are the reference's, as integers, however large they get."""

import numpy as np
import pytest
import torch

from evs_vllm.testing import make_model, synthetic_clip
from tests.e2e.harness import (
    IMAGE,
    TOLERANCE,
    VIDEO,
    Request,
    ask,
    chat,
    check,
    check_positions,
    expected,
    recorded_positions,
    start_engine,
    stop_engine,
)
from tests.families.registry import families, most_engine_tests
from tests.reference.hf import Clip, Picture, Reference, Settings

pytestmark = pytest.mark.vllm


@pytest.fixture
def engine(engines, family):
    return engines.get(family, {"rate": 0.75, "request_overrides": "any"}, max_num_batched_tokens=8192)


@pytest.fixture
def ref(reference, family):
    return reference(family)


@pytest.fixture
def seen(engine):
    with recorded_positions(engine) as calls:
        yield calls


def long_clip(facts):
    # The moving rectangle keeps late units alive, so that large IDs are really used.
    return synthetic_clip(facts.frames_past_256, (56, 56), moving=0.15, noise=2, seed=7)


@families(most_engine_tests)
@pytest.mark.parametrize("positions", ["keep", "sequential"])
@pytest.mark.parametrize("rate", [0, 0.75, 0.9])
def test_ids_of_one_clip(engine, ref, seen, rate, positions):
    settings = Settings(rate, positions=positions)
    frames = synthetic_clip(16, noise=2, seed=60)
    request = ask(frames, settings, evs_rate=rate, evs_positions=positions)
    result = expected(ref, request)
    check(engine.generate([request])[0], result)
    check_positions(seen, result)


@families(most_engine_tests)
@pytest.mark.parametrize("positions", ["keep", "sequential"])
def test_ids_of_images_and_clips(engine, ref, seen, positions):
    settings = Settings(0.75, positions=positions)
    picture = Picture(synthetic_clip(1, (140, 112), "noise", seed=61)[0])
    clips = [Clip(synthetic_clip(9, noise=2, seed=62 + i), settings=settings) for i in range(2)]
    prompt = chat(VIDEO, "First ", IMAGE, "then ", VIDEO, "What moves?")
    request = Request(prompt, [clips[0], picture, clips[1]], {"evs_positions": positions})
    result = expected(ref, request)
    check(engine.generate([request])[0], result)
    check_positions(seen, result)


@families(most_engine_tests)
def test_text_goes_on_where_it_would_have(ref):
    """`keep` in one line: dropping tokens moves nothing. `sequential`: as if they had never been there."""
    frames = synthetic_clip(16, noise=2, seed=63)
    full, keep, sequential = (
        ref.generate(ask(frames).prompt, [Clip(frames, settings=s)], 1)
        for s in (Settings(), Settings(0.75), Settings(0.75, positions="sequential"))
    )
    is_clip = np.array(full.prompt_ids) == ref.video_id
    stays = ~is_clip
    stays[np.flatnonzero(is_clip)[keep.kept[0]]] = True
    np.testing.assert_array_equal(keep.positions, full.positions[:, stays])
    np.testing.assert_array_equal(sequential.positions, np.tile(np.arange(len(sequential.prompt_ids)), (3, 1)))


@families(most_engine_tests)
def test_ids_above_256_are_exact(engine, ref, seen, facts):
    """Carrying IDs as bf16 channels beside the embeddings, as vLLM's own implementation does, would round these."""
    assert torch.tensor(257.0, dtype=torch.bfloat16).item() == 256
    settings = Settings(0.9)
    request = ask(long_clip(facts), settings, evs_rate=0.9)
    request.media = [Clip(request.media[0].frames, fps=1.6, settings=settings)]
    result = expected(ref, request)
    assert result.positions.max() > 256

    rounded = torch.from_numpy(result.positions).to(torch.bfloat16).to(torch.int64).numpy()
    changed = (rounded != result.positions).any(axis=0)
    assert changed[np.array(result.prompt_ids) == ref.video_id].any(), (
        "no kept token of the clip has an ID that bf16 would round"
    )
    assert changed[-10:].any(), "nor has the question"

    (output,) = engine.generate([request])
    check(output, result)
    check_positions(seen, result)

    # The difference is not academic: with rounded IDs the same model gives other logprobs.
    broken = ref.generate(request.prompt, request.media, 1, lambda ids: rounded)
    assert np.abs(broken.logprobs[0] - result.logprobs[0]).max() > 100 * TOLERANCE


# Frames that fit, frames that do not, and their size: few and wide where the text of each unit takes up context.
BEYOND = {"qwen2_vl": (1600, 2200, (28, 28)), "qwen3_vl": (22, 30, (32, 32 * 60))}


@pytest.mark.parametrize("name", BEYOND)
def test_ids_beyond_the_context_length(engines, tmp_path, name):
    """Kept IDs may exceed the context length (the cos/sin cache is four times as long), but never that cache."""
    directory = make_model(tmp_path / "short", name, max_position_embeddings=256, max_tokens_per_frame=60)
    ref = Reference(directory)
    engines.close()
    engine = start_engine(directory, {"rate": 0.95, "request_overrides": "any"}, max_model_len=256)
    try:
        *counts, size = BEYOND[name]
        within, beyond = (synthetic_clip(frames, size, moving=0.5, noise=2, seed=64) for frames in counts)
        request = ask(within, Settings(0.95))
        result = expected(ref, request)
        assert len(result.prompt_ids) < 256 < 700 < result.positions.max() < 4 * 256
        check(engine.generate([request])[0], result)

        with pytest.raises(ValueError, match="position"):
            engine.generate([ask(beyond)])
        request = ask(beyond, Settings(0.95, positions="sequential"), evs_positions="sequential")
        check(engine.generate([request])[0], expected(ref, request))
    finally:
        stop_engine(engine)
