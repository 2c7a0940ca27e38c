# SPDX-License-Identifier: Apache-2.0
"""A video that is sent again, grown, with the causal budget: vLLM's prefix cache has its beginning, and answers are
those of the reference, which has no caches."""

from typing import Any

import numpy as np
import pytest

from evs_vllm.testing import synthetic_clip
from tests.e2e.harness import VIDEO, Engine, Request, chat, recorded_positions, run_and_check, sized, untied
from tests.families.registry import FAMILIES
from tests.reference.hf import Clip
from tests.reference.tower import TowerReference, TowerSettings

pytestmark = pytest.mark.vllm

CASES = [
    ("qwen2_5_vl", "full", "keep"),
    ("qwen2_5_vl", "reuse", "keep"),
    ("qwen2_5_vl", "full", "sequential"),
    ("qwen3_vl", "reuse", "keep"),  # with text between the units
]


SEED = 300
"""Of scenes whose grown part crosses a block of the prompt."""


def block(family: str) -> int:
    return FAMILIES[family].facts.block_size


def start(engines: Any, family: str) -> Engine:
    evs = {"rate": 0.75, "encoder": "full", "request_overrides": "any"}
    options = {"enable_prefix_caching": True, "block_size": block(family)}
    engine: Engine = engines.get(family, None, additional_config={"evs": evs}, **options)
    return engine


def scene(family: str, seed: int) -> np.ndarray:
    """34 frames: something moves, another scene moves, and that goes on."""
    size = sized(family, (112, 140))
    return np.concatenate([synthetic_clip(n, size, moving=0.3, noise=4, seed=seed + n) for n in (14, 20)])


def asked(frames: np.ndarray, **options: Any) -> Request:
    settings = TowerSettings(**{"rate": 0.5, "selection": "learned", "budget": "causal"} | options)
    given = {"rate": settings.rate, "threshold": settings.threshold}
    keys = {f"evs_{name}": value for name, value in given.items() if value}
    for name in ("selection", "budget", "encoder", "positions"):
        keys[f"evs_{name}"] = getattr(settings, name)
    return Request(chat(VIDEO, "What happens?"), [Clip(frames, settings=settings)], keys, max_tokens=4)


def run(engine: Engine, ref: TowerReference, request: Request) -> tuple[int, int, int]:
    """Where the clip begins and ends in the prompt, and how many of the prompt's tokens were cached."""
    with recorded_positions(engine) as seen:
        ((output, result),) = run_and_check(engine, ref, [request])
    computed = seen[0][1].shape[1]
    assert computed == len(result.prompt_ids) - output.num_cached_tokens
    np.testing.assert_array_equal(seen[0][1], result.positions[:, -computed:])
    place = engine.sent[-1].mm_features[0].mm_position
    return place.offset, place.offset + place.length, output.num_cached_tokens


def test_with_the_budget_of_the_clip_nothing_is_found(engines, model_dir):
    engine, ref = start(engines, "qwen2_5_vl"), TowerReference(model_dir("qwen2_5_vl"))
    clips = untied(
        ref,
        lambda seed: [asked(scene("qwen2_5_vl", seed)[:end], budget="clip", encoder="full") for end in (20, 26)],
        SEED,
    )
    begin, _, _ = run(engine, ref, clips[0])
    assert run(engine, ref, clips[1])[2] <= begin


def test_later_units_that_keep_nothing_still_move_the_text(engines, model_dir):
    """The prompts of both are equal, token for token, and only the text's positions tell them apart."""
    engine, ref = start(engines, "qwen2_5_vl"), TowerReference(model_dir("qwen2_5_vl"))

    def make(seed: int) -> list[Request]:
        frames = synthetic_clip(12, (112, 140), moving=0.3, seed=seed)
        longer = np.concatenate([frames, np.repeat(frames[-1:], 30, axis=0)])
        still = [np.concatenate([frames, np.repeat(frames[-1:], 2, axis=0)]), longer]
        return [asked(each, rate=0, threshold=5, encoder="full") for each in still]

    short, long = untied(ref, make, SEED)
    assert short.answer is not None and long.answer is not None
    assert short.answer.prompt_ids == long.answer.prompt_ids and short.answer.following != long.answer.following
    for requests in ([short, long], [long, short]):
        engine.reset()
        _, end, _ = run(engine, ref, requests[0])
        assert run(engine, ref, requests[1])[2] == (end - 1) // block("qwen2_5_vl") * block("qwen2_5_vl")


def test_another_past_is_not_found(engines, model_dir):
    """Pixels that the tower sees change in a place that is dropped: what is before that is found, and no more."""
    engine, ref = start(engines, "qwen2_5_vl"), TowerReference(model_dir("qwen2_5_vl"))
    size, per_unit, unit = block("qwen2_5_vl"), 20, 6

    def make(seed: int) -> list[Request]:
        frames = scene("qwen2_5_vl", seed)
        request = asked(frames, encoder="full")
        kept = ref.generate(ref.spelled(request.prompt), request.media, 1).kept[0]
        dropped = next(p for p in range(per_unit) if unit * per_unit + p not in kept)
        other = frames.copy()
        row, column = divmod(dropped, 5)
        other[2 * unit : 2 * unit + 2, row * 28 + 3, column * 28 + 3] ^= 1
        return [request, asked(other, encoder="full")]

    one, other = untied(ref, make, SEED)
    assert one.answer is not None and other.answer is not None
    assert one.answer.kept[0].tolist() == other.answer.kept[0].tolist()
    begin, _, _ = run(engine, ref, one)
    before = begin + int((one.answer.kept[0] < unit * per_unit).sum())
    assert run(engine, ref, other)[2] == before // size * size > 0


@pytest.mark.parametrize(("name", "encoder", "positions"), CASES)
def test_a_clip_that_has_grown_finds_its_beginning(engines, model_dir, name, encoder, positions):
    engine, ref, size = start(engines, name), TowerReference(model_dir(name)), block(name)
    options = {"encoder": encoder, "positions": positions}
    first, second, third = untied(
        ref, lambda seed: [asked(scene(name, seed)[:end], **options) for end in (20, 26, 34)], SEED
    )
    _, end, cached = run(engine, ref, first)
    assert cached == 0 and end > 2 * size
    # The block in which the clip ended before is named by the whole clip; all before it are found.
    _, second_end, cached = run(engine, ref, second)
    assert cached == (end - 1) // size * size
    _, _, cached = run(engine, ref, third)
    assert cached == (second_end - 1) // size * size > (end - 1) // size * size
    # The other way round, as when another client is behind.
    engine.reset()
    run(engine, ref, third)
    assert run(engine, ref, first)[2] == (end - 1) // size * size
    # And again: vLLM takes all full blocks, as of any clip that it had.
    assert run(engine, ref, first)[2] >= end // size * size
