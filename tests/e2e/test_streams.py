# SPDX-License-Identifier: Apache-2.0
"""A conversation about a stream in vLLM, turn by turn with prefix caching, compared with the reference."""

import numpy as np
import pytest

from evs_vllm.engine.metrics import NEWS, metrics
from evs_vllm.testing import synthetic_clip
from tests.e2e.harness import VIDEO, Request, chat, recorded_positions, run_and_check, untied
from tests.families.registry import FAMILIES
from tests.reference.hf import Clip, Settings
from tests.reference.tower import TowerReference, TowerSettings

pytestmark = pytest.mark.vllm

FAMILY = "qwen2_5_vl"
SIZE = (84, 140)
PER_UNIT = 15
BLOCK = FAMILIES[FAMILY].facts.block_size


@pytest.fixture
def engine(engines):
    evs = {"rate": 0.75, "encoder": "full", "request_overrides": "any"}
    return engines.get(FAMILY, None, additional_config={"evs": evs}, enable_prefix_caching=True, block_size=BLOCK)


def pieces(seed: int) -> list[np.ndarray]:
    """Something moves; it stands still, in as many frames and then in a single unit; another scene moves."""
    moving, other = (synthetic_clip(8, SIZE, moving=0.3, seed=seed + i) for i in (0, 50))
    return [moving, np.repeat(moving[-1:], 8, axis=0), np.repeat(moving[-1:], 2, axis=0), other]


def turns(seed: int, settings: Settings, **kwargs) -> list[Request]:
    """What a client sends at every turn: all of the conversation so far and one more clip."""
    requests, prompt, clips = [], "", []
    for number, frames in enumerate(pieces(seed)):
        prompt += chat(VIDEO, f"What happens now, {number}?")
        clips.append(Clip(frames, settings=settings, after=tuple(clips)))
        requests.append(Request(prompt, list(clips), {"evs_stream": True, **kwargs}, max_tokens=6))
        prompt += f"Something of kind {number}.<|im_end|>\n"
    return requests


@pytest.mark.parametrize("encoder", ["full", "reuse"])
@pytest.mark.parametrize("positions", ["keep", "sequential"])
def test_a_conversation_is_that_of_the_reference(engine, model_dir, encoder, positions):
    ref = TowerReference(model_dir(FAMILY))
    settings = TowerSettings(0.75, selection="learned", encoder=encoder, positions=positions)
    requests = untied(ref, lambda seed: turns(seed, settings, evs_encoder=encoder, evs_positions=positions))
    engine.reset()
    already = planned(0)
    for number, request in enumerate(requests):
        with recorded_positions(engine) as seen:
            ((output, result),) = run_and_check(engine, ref, [request])
        (_, prefill), *decoding = seen
        computed = prefill.shape[1]
        assert computed == len(result.prompt_ids) - output.num_cached_tokens
        np.testing.assert_array_equal(prefill, result.positions[:, -computed:])
        for step, (_, ids) in enumerate(decoding[: len(result.tokens) - 1]):
            assert ids[:, 0].tolist() == [result.following + step] * 3
        if number:
            # All full blocks come from the cache: a turn costs its own chunk, its text and less than a block.
            before = len(requests[number - 1].answer.prompt_ids)
            assert output.num_cached_tokens >= before // BLOCK * BLOCK > 0
        assert planned(already) == number + 1, "the clips before are not looked at again"
    kept = [len(indices) for indices in requests[-1].answer.kept]
    # Unit 0 is whole and 2 of 4 units' share is left; what the first clip could not show of its end, then nothing; a
    # new scene gets its share and a unit of what was saved.
    assert kept[0] == PER_UNIT + 6 and kept[2] == 1 and kept[3] > 4 * PER_UNIT // 4, kept
    # In another order, and all at once, with nothing in any cache: the same.
    engine.reset()
    run_and_check(engine, ref, requests[::-1])


def planned(before: float) -> float:
    """Clips of streams that were planned since."""
    return sum(metrics().stream_chunks.labels(news)._value.get() for news in NEWS) - before


def test_other_requests_are_not_touched(engine, reference):
    """The same clips without the key, between the turns."""
    ref = reference(FAMILY)
    frames = pieces(7)[:2]
    alone = [Clip(each, settings=Settings(0.75, selection="learned")) for each in frames]
    request = Request(chat(VIDEO, VIDEO, "Compare."), alone)
    engine.generate([Request(request.prompt, alone, {"evs_stream": True})])
    run_and_check(engine, ref, [request])
