# SPDX-License-Identifier: Apache-2.0
"""What lets vLLM's prefix cache find the beginning of a clip that has grown (``evs_budget: causal``).

vLLM names every block of a prompt by its tokens, by the block before it and, where it holds tokens of a clip, by the
cache identity of the whole clip: a clip that has grown finds none of its blocks. Here a block that ends within a clip
is named by the clip's beginning instead, up to the unit in which the block ends. `name_beginnings` makes those names,
in the API server; `block_key` finds the one of a block, where vLLM names blocks. The block in which a clip ends keeps
the identity of the whole clip: what comes after it has positions that depend on the clip's length.

A name is a digest of all that keys and values up to there are computed from, of what the vision tower is sent and not
of what was chosen by. So it is right whatever the selection did; a selection that is not causal would find nothing.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evs_vllm.core.plan import IntArray, RetentionPlan
from evs_vllm.engine.plan_field import PLAN_FIELD, plan_of
from evs_vllm.families.base import FamilyAdapter

_MEMO = "_evs_beginnings"


def name_beginnings(adapter: FamilyAdapter, fields: Mapping[str, Any], plan: RetentionPlan, identity: str) -> IntArray:
    """`RetentionPlan.beginnings` of a clip.

    Args:
        adapter: Its family's.
        fields: What is sent to the vision tower, by name; pixels of the computed tokens alone if `plan` reuses.
        plan: Its plan, with the layout.
        identity: Of the settings and, in a stream, of the clips before.

    Returns:
        (T, 4) int64. Number t chains the one before it with the kept and computed tokens of unit t, their pixels and
        the text before them. The first one is chained to the settings, the size of the units and all other fields.
    """
    pixels = adapter.unit_pixels(fields, plan)
    digest = hashlib.sha256()
    for part in (identity, plan.grid[1:], plan.encoder, plan.positions):
        _add(digest, repr(part).encode())
    for name in sorted(set(fields) - set(adapter.growing_fields) - {PLAN_FIELD}):
        _add(digest, name.encode())
        _add_value(digest, fields[name])
    assert plan.layout is not None
    last, places = digest.digest(), plan.tokens_per_unit
    kept, computed = (np.searchsorted(of, np.arange(plan.num_units + 1) * places) for of in (plan.kept, plan.computed))
    ends = [0, *(plan.visual_index[places - 1 :: places] + 1)]
    names = np.empty((plan.num_units, len(last) // 8), dtype=np.int64)
    for unit in range(plan.num_units):
        digest = hashlib.sha256(last)
        _add_value(digest, torch.from_numpy(plan.kept[kept[unit] : kept[unit + 1]] - unit * places))
        _add_value(digest, torch.from_numpy(plan.computed[computed[unit] : computed[unit + 1]] - unit * places))
        for row in (plan.layout.token_ids, plan.layout.is_embed):
            _add_value(digest, torch.from_numpy(row[ends[unit] : ends[unit + 1]]))
        _add_value(digest, pixels[unit])
        last = digest.digest()
        names[unit] = np.frombuffer(last, dtype=np.int64)
    return names


def _add(digest: Any, data: bytes | memoryview) -> None:
    """Adds bytes after their number, so that no two sequences of parts are spelled alike."""
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _add_value(digest: Any, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        _add(digest, repr(value).encode())
        return
    _add(digest, f"{value.dtype} {tuple(value.shape)}".encode())
    # Of a unit that keeps nothing there are no numbers, and torch has no bytes of those.
    _add(digest, value.contiguous().cpu().flatten().view(torch.uint8).numpy().data if value.numel() else b"")


def block_key(request: Any, number: int, end: int) -> str | None:
    """The name of a clip's beginning for a block of a prompt.

    Args:
        request: vLLM's, in the engine core.
        number: Which of its multimodal items.
        end: Where the block ends in the prompt.

    Returns:
        The name, or None where the block does not end within the item, the item has no names, or the engine core does
        not have its fields.
    """
    feature = request.mm_features[number]
    inside = end - feature.mm_position.offset
    if not 0 < inside < feature.mm_position.length or PLAN_FIELD not in (feature.data or {}):
        return None
    # A plan is read once for all blocks of its clip.
    memo = request.__dict__.setdefault(_MEMO, {})
    if number not in memo:
        # Plans are long, and most have no names.
        named = RetentionPlan.names_beginnings(feature.data[PLAN_FIELD].data.numpy())
        plan = plan_of(feature.data) if named else None
        fits = plan is not None and len(plan.prompt_index) == feature.mm_position.length
        memo[number] = (plan.prompt_units, plan.beginnings) if plan is not None and fits else None
    if memo[number] is None:
        return None
    units, names = memo[number]
    return f"evs-{names[units[inside - 1]].tobytes().hex()}"
