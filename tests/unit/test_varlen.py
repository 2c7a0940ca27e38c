# SPDX-License-Identifier: Apache-2.0
"""The forms for GPUs: keys gathered with cumulative lengths or in padded batches give what the running state gives."""

from functools import partial

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.reuse import ClipRows, clip_rows
from evs_vllm.core.schedule import LEAST_PADDING, Padded, ReuseSchedule, Varlen, place


def latest(clip: ClipRows, unit: int) -> list[int]:
    """For each slot the last row that computed it, up to a unit, counted among those that have rows."""
    found = [-1] * clip.tokens_per_unit
    for row, slot in enumerate(clip.slots[: clip.units[unit + 1]].tolist()):
        found[slot] = row
    return found


@settings(max_examples=60)
@given(
    st.integers(0, 2**32),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.booleans()), min_size=1, max_size=3),
    st.sampled_from([None, 1, 2, 3]),
    st.sampled_from([1, 4]),
)
def test_varlen_equals_running_state(
    seed: int, grids: list[tuple[int, int, int, bool]], window: int | None, patches: int
) -> None:
    rng = np.random.default_rng(seed)
    clips = []
    for units, height, width, refresh in grids:
        stays = rng.random((units, height * width)) < 0.3
        stays[0] = True
        again = ~stays & (rng.random(stays.shape) < 0.3 * refresh)
        plan = RetentionPlan(
            (units, height, width), np.flatnonzero(stays), encoder="reuse", refreshed=np.flatnonzero(again)
        )
        clips.append(clip_rows(plan, window)[0])
    for clip in clips:
        one_by_one = list(clip.sequences())
        queries, keys, rows_of_keys = clip.lengths()
        assert queries.tolist() == [rows.stop - rows.start for _, rows, _ in one_by_one]
        assert keys.tolist() == [slots.stop - slots.start for _, _, slots in one_by_one]
        assert rows_of_keys.tolist() == [row for unit, _, slots in one_by_one for row in latest(clip, unit)[slots]]
    schedule = ReuseSchedule(clips, patches)
    rows = sum(len(clip.slots) for clip in clips) * patches
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, rows, 2, 8, generator=generator)
    expected = schedule.attend(query, key, value, 0.3)
    tokens = rng.permutation(rows // patches)
    for form in ("varlen", "padded"):
        placed = ReuseSchedule(clips, patches)
        (uploaded,) = place([placed], form, torch.device("cpu"), [tokens.reshape(-1, 1)])
        assert uploaded.dtype == torch.int32 and uploaded.tolist() == tokens.reshape(-1, 1).tolist()
        attend = placed.attend if form == "padded" else partial(by_sequence, placed)
        torch.testing.assert_close(attend(query, key, value, 0.3), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(placed.placed, Padded)
    queries = sum(batch.numel() for batch, _ in placed.placed.batches) * patches
    assert queries <= max(2 * rows, LEAST_PADDING * sum(len(clip.lengths()[0]) for clip in clips)), "padding is bounded"
    products = sum(queries.numel() * keys.shape[1] for queries, keys in placed.placed.batches)
    whole = sum(units * int((np.diff(clip.windows) ** 2).sum()) for (units, *_), clip in zip(grids, clips, strict=True))
    assert products <= whole, "attention never costs more than that of the full tower"


def by_sequence(
    schedule: ReuseSchedule, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """What a kernel for variable lengths does, one sequence after the other."""
    form = schedule.placed
    assert isinstance(form, Varlen)
    keys, values = schedule.take(key, form.key_tokens), schedule.take(value, form.key_tokens)
    assert form.query_starts[-1] == len(query) and form.key_starts[-1] == len(keys)
    out = torch.empty_like(query)
    for i in range(len(form.query_starts) - 1):
        q = slice(form.query_starts[i], form.query_starts[i + 1])
        k = slice(form.key_starts[i], form.key_starts[i + 1])
        assert 0 < q.stop - q.start <= form.longest_query and k.stop - k.start <= form.longest_key
        scores = torch.einsum("qhd,khd->hqk", query[q], keys[k]) * scale
        out[q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values[k])
    return out
