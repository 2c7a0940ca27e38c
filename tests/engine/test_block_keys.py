# SPDX-License-Identifier: Apache-2.0
"""The names of a prompt's blocks: vLLM's own, but within a clip whose beginnings have names."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from evs_vllm.core.plan import Layout, RetentionPlan
from evs_vllm.engine.plan_field import PLAN_FIELD

pytestmark = pytest.mark.vllm


@pytest.fixture
def keys() -> tuple[Any, Any]:
    """vLLM's function as it is installed, and wrapped."""
    from vllm.v1.core import kv_cache_utils

    from evs_vllm.engine import compat, plugin

    compat.wrap_block_keys(plugin._block_key)
    wrapped = kv_cache_utils._gen_mm_extra_hash_keys
    return wrapped.__wrapped__, wrapped  # type: ignore[attr-defined]


def feature(offset: int, identifier: str, plan: RetentionPlan | None, length: int) -> SimpleNamespace:
    data = None if plan is None else {PLAN_FIELD: SimpleNamespace(data=torch.from_numpy(plan.to_array()))}
    place = SimpleNamespace(offset=offset, length=length)
    return SimpleNamespace(identifier=identifier, mm_position=place, data=data, mm_hash=identifier)


def drawn_plan(rng: np.random.Generator, named: bool) -> RetentionPlan:
    """Units of 6 tokens, with or without text between them."""
    units = int(rng.integers(1, 7))
    ids, embeds = [], []
    for _ in range(units):
        before = int(rng.integers(0, 3))
        ids += [9] * before + [5] * 6
        embeds += [False] * before + [True] * 6
    kept = np.flatnonzero(rng.random(units * 6) < 0.5)
    if not len(kept):
        kept = np.array([0])
    names = rng.integers(-(2**60), 2**60, (units if named else 0, 4))
    layout = Layout(np.array(ids), np.array(embeds), np.ones(units * 6, dtype=np.bool_))
    return RetentionPlan((units, 2, 3), kept, beginnings=names).with_layout(layout, 40)


def unit_before(plan: RetentionPlan, elements: int) -> int:
    """The unit in which the first `elements` of a pruned clip's prompt end, by walking through the unpruned one."""
    assert plan.layout is not None
    token, seen, unit = 0, 0, 0
    for embed in plan.layout.is_embed.tolist():
        stays = True
        if embed:
            unit = token // 6
            stays = token in plan.kept
            token += 1
        if stays:
            seen += 1
            if seen == elements:
                return unit
    raise AssertionError


@pytest.mark.parametrize("seed", range(60))
def test_blocks_are_named_by_the_beginning_of_the_clip_in_which_they_end(keys: tuple[Any, Any], seed: int) -> None:
    stock, ours = keys
    rng = np.random.default_rng(seed)
    features, plans, at = [], [], int(rng.integers(0, 9))
    for number in range(int(rng.integers(1, 4))):
        kind = rng.integers(3)
        plan = None if kind == 0 else drawn_plan(rng, named=kind == 2)
        length = int(rng.integers(1, 30)) if plan is None else len(plan.prompt_index)
        features.append(feature(at, f"item {number}", plan, length))
        plans.append(plan)
        at += length + int(rng.integers(0, 6))
    size, number, mine = int(rng.choice([4, 7, 16])), 0, 0
    request = SimpleNamespace(mm_features=features)
    for start in range(0, at + size, size):
        end = start + size
        expected, number = stock(request, start, end, number)
        found, mine = ours(request, start, end, mine)
        assert mine == number and len(found) == len(expected)
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            (item,) = [each for each in features if each.identifier == other[1]]
            plan = plans[features.index(item)]
            inside = end - item.mm_position.offset
            if plan is None or not len(plan.beginnings) or inside >= item.mm_position.length:
                assert one == other
            else:
                name = plan.beginnings[unit_before(plan, inside)].tobytes().hex()
                assert place == len(found) - 1 and one == (other[0], f"evs-{name}", other[2])


def test_requests_without_items_and_late_blocks_are_as_ever(keys: tuple[Any, Any]) -> None:
    stock, ours = keys
    plan = drawn_plan(np.random.default_rng(0), named=True)
    request = SimpleNamespace(mm_features=[feature(3, "clip", plan, len(plan.prompt_index))])
    for some in (SimpleNamespace(mm_features=[]), request):
        assert ours(some, 400, 416, -1) == stock(some, 400, 416, -1) == ([], -1)
    assert ours(request, 0, 400, -1) == stock(request, 0, 400, -1)
