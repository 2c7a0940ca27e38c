# SPDX-License-Identifier: Apache-2.0
"""The causal budget through every family's processor: a clip that grows keeps its beginning and the names of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evs_vllm.core.plan import RetentionPlan
from evs_vllm.errors import RequestError, UnsupportedError
from evs_vllm.families import family_of
from evs_vllm.families.base import FamilyAdapter
from evs_vllm.testing import synthetic_clip
from tests.families.facts import Facts
from tests.families.processing import adapter_for, arguments_for, plan_in, process, processor_for
from tests.families.registry import FAMILIES, names_of

pytestmark = pytest.mark.vllm


def grows(name: str) -> bool:
    row = family_of(FAMILIES[name].tiny.architecture)
    assert row is not None
    return bool(row.grows)


with_growing = pytest.mark.families([n for n in names_of(lambda facts: True) if grows(n)])
without_growing = pytest.mark.families([n for n in names_of(lambda facts: True) if not grows(n)])
CAUSAL = {"rate": 0.5, "budget": "causal", "request_overrides": "any"}


def planned(processor: Any, frames: np.ndarray, **options: Any) -> tuple[RetentionPlan, list[int]]:
    """The plan, and the prompt up to where the clip ends."""
    result = process(processor, frames, **options)
    plan, (place,) = plan_in(result), result["mm_placeholders"]["video"]
    assert plan is not None
    return plan, list(result["prompt_token_ids"][: place.offset + place.length])


def same(one: RetentionPlan, other: RetentionPlan) -> int:
    """How many units have equal names."""
    equal = [a == b for a, b in zip(one.beginnings.tolist(), other.beginnings.tolist(), strict=False)]
    assert equal == sorted(equal, reverse=True), "a name found again after one that differs"
    return sum(equal)


@with_growing
@pytest.mark.parametrize("encoder", ["full", "reuse"])
@pytest.mark.parametrize("selection", ["learned", "paper"])
def test_what_was_sent_before_is_the_beginning(model: Path, facts: Facts, encoder: str, selection: str) -> None:
    processor = processor_for(model, CAUSAL | {"encoder": encoder, "selection": selection})
    frames = synthetic_clip(8 * facts.unit_frames, facts.frame_size, moving=0.3, noise=3, seed=5)
    longer, prompt = planned(processor, frames)
    assert longer.beginnings.shape == (8, 4) and len({name.tobytes() for name in longer.beginnings}) == 8
    for units in (2, 5, 7):
        shorter, beginning = planned(processor, frames[: units * facts.unit_frames])
        end = units * facts.per_unit
        assert shorter.kept.tolist() == longer.kept[longer.kept < end].tolist()
        assert same(shorter, longer) == units
        # The clip of GLM ends with text of its own.
        length = len(beginning) - (shorter.prompt_index > shorter.visual_index[-1]).sum()
        assert beginning[:length] == prompt[:length]
    # An odd number of frames: the last unit repeats one and is another, and what is before it is the same.
    if facts.unit_frames == 2:
        odd, _ = planned(processor, frames[: 5 * facts.unit_frames - 1])
        assert same(odd, longer) == 4


@with_growing
def test_a_pixel_that_the_tower_sees_changes_the_names_from_its_unit_on(model: Path, facts: Facts) -> None:
    full, reuse = (processor_for(model, CAUSAL | {"encoder": encoder}) for encoder in ("full", "reuse"))
    frames = synthetic_clip(6 * facts.unit_frames, facts.frame_size, moving=0.3, seed=6)
    plan, _ = planned(full, frames)
    unit = 3
    dropped = [p for p in range(facts.per_unit) if unit * facts.per_unit + p not in plan.kept]
    row, column = divmod(dropped[0], facts.grid[1])
    other = frames.copy()
    other[unit * facts.unit_frames, row * facts.token_side, column * facts.token_side] ^= 1
    assert same(plan, planned(full, other)[0]) == unit
    # With reuse nobody computes that token, so nothing depends on it.
    some, changed = (planned(reuse, each)[0] for each in (frames, other))
    assert unit * facts.per_unit + dropped[0] not in some.computed
    assert same(some, changed) == 6


@with_growing
def test_other_settings_and_other_fields_have_other_names(model: Path, facts: Facts) -> None:
    processor = processor_for(model, CAUSAL | {"encoder": "full"})
    frames = synthetic_clip(5 * facts.unit_frames, facts.frame_size, moving=0.3, seed=7)
    plan, _ = planned(processor, frames)
    for options in (
        {"evs_positions": "sequential"},
        {"evs_rate": 0.75},
        {"evs_encoder": "reuse"},
        {"evs_max_tokens": 999},
    ):
        assert same(plan, planned(processor, frames, **options)[0]) == 0, options
    assert same(plan, planned(processor, frames)[0]) == 5
    assert not len(planned(processor, frames, evs_budget="clip")[0].beginnings)
    timed = process(processor, frames, fps_of_clip=0.5)["mm_kwargs"]["video"][0]
    default = process(processor, frames)["mm_kwargs"]["video"][0]
    seconds = [item["second_per_grid_ts"].data for item in (timed, default) if "second_per_grid_ts" in item]
    if seconds and seconds[0] != seconds[1]:  # positions count seconds
        other = plan_in(process(processor, frames, fps_of_clip=0.5))
        assert other is not None and same(plan, other) == 0


@without_growing
def test_it_is_refused_where_it_is_not_known_to_hold(model: Path, facts: Facts) -> None:
    with pytest.raises(UnsupportedError, match="--evs-budget causal is not possible here"):
        arguments_for(model, CAUSAL).create_model_config()
    processor = processor_for(model, {"rate": 0.5, "request_overrides": "any"})
    frames = synthetic_clip(2 * facts.unit_frames, facts.frame_size)
    with pytest.raises(RequestError, match="evs_budget 'causal' is not possible here"):
        process(processor, frames, evs_budget="causal")
    assert type(adapter_for(processor)).unit_pixels is FamilyAdapter.unit_pixels


def block_hashes(result: Any, size: int) -> list[bytes]:
    """What vLLM's prefix cache would name the full blocks of a prompt."""
    from vllm import SamplingParams
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    (item,), (place,) = result["mm_kwargs"]["video"], result["mm_placeholders"]["video"]
    (identity,) = result["mm_hashes"]["video"]
    feature = MultiModalFeatureSpec(item, "video", identity, place, identity)
    request = Request(
        "one",
        list(result["prompt_token_ids"]),
        SamplingParams(max_tokens=1),
        None,
        mm_features=[feature],
        block_hasher=get_request_block_hasher(size, sha256),
    )
    return list(request.block_hashes)


@with_growing
def test_the_prefix_cache_finds_all_blocks_before_the_one_in_which_the_clip_ended(model: Path, facts: Facts) -> None:
    processor = processor_for(model, CAUSAL)
    from evs_vllm.engine import compat, plugin

    compat.wrap_block_keys(plugin._block_key)
    frames = synthetic_clip(8 * facts.unit_frames, facts.frame_size, moving=0.4, noise=3, seed=8)
    shorter, longer = (process(processor, frames[: units * facts.unit_frames]) for units in (5, 8))
    (place,) = shorter["mm_placeholders"]["video"]
    end, size = place.offset + place.length, 4
    plan = plan_in(shorter)
    assert plan is not None
    # With some families the clip ends with text, which may or may not be that of the longer one.
    text = int((plan.prompt_index > plan.visual_index[-1]).sum())
    one, other = block_hashes(shorter, size), block_hashes(longer, size)
    equal = [a == b for a, b in zip(one, other, strict=False)]
    assert place.offset // size + 2 < (end - text - 1) // size <= equal.index(False) <= (end - 1) // size
    assert block_hashes(shorter, size) == one, "names depend on chance"
    clipwise = [
        block_hashes(process(processor, frames[: units * facts.unit_frames], evs_budget="clip"), size)
        for units in (5, 8)
    ]
    assert sum(a == b for a, b in zip(*clipwise, strict=False)) <= place.offset // size
