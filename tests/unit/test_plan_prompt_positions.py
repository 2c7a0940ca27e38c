# SPDX-License-Identifier: Apache-2.0
"""Plan, prompt and positions: golden cases by hand and properties on random plans."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evs_vllm.core.plan import Layout, RetentionPlan
from evs_vllm.core.positions import PositionRequest, pruned_positions
from evs_vllm.core.prompt import ClipSpan, pruned_clip, unprune
from evs_vllm.core.rows import encoder_batches, keep_rows
from evs_vllm.errors import PlanError

PAD, TEXT, NEWLINE = 7, 100, 8


def random_plan(seed: int, units: int, height: int, width: int, framed: bool) -> RetentionPlan:
    """A plan with random kept tokens; `framed` puts text before each unit and one extra, non-visual row at the end."""
    rng = np.random.default_rng(seed)
    per_unit = height * width
    stays = rng.random(units * per_unit) < 0.4
    stays[:per_unit] = True
    plan = RetentionPlan((units, height, width), np.flatnonzero(stays), str(rng.choice(["keep", "sequential"])))
    if rng.random() < 0.5:
        again = np.flatnonzero(~stays & (rng.random(stays.shape) < 0.3))
        plan = replace(plan, encoder="reuse", refreshed=again)
    if not framed:
        return plan.with_layout(Layout.contiguous(PAD, units * per_unit), units * per_unit + 3)
    ids = np.concatenate([[TEXT, TEXT + 1, *([PAD] * per_unit)] for _ in range(units)] + [[NEWLINE]])
    embeds = (ids == PAD) | (ids == NEWLINE)
    return plan.with_layout(Layout(ids, embeds, ids[embeds] == PAD), units * per_unit)


plans = st.builds(
    random_plan, st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.booleans()
)


def test_golden_framed_clip() -> None:
    ids = np.array([TEXT, PAD, PAD, TEXT, PAD, PAD, NEWLINE])
    layout = Layout(ids, ids != TEXT, np.array([True, True, True, True, False]))
    plan = RetentionPlan((2, 1, 2), np.array([0, 1, 3]), "keep", layout)
    assert plan.embed_index.tolist() == [0, 1, 3, 4]
    assert plan.prompt_index.tolist() == [0, 1, 2, 3, 5, 6]
    assert pruned_clip(plan)[0] == [TEXT, PAD, PAD, TEXT, PAD, NEWLINE]
    assert pruned_clip(plan)[1].tolist() == [False, True, True, False, True, True]
    assert plan.counts.tolist() == [2, 1]


@given(plans)
def test_plan_survives_the_trip(plan: RetentionPlan) -> None:
    back = RetentionPlan.from_array(torch.from_numpy(plan.to_array()).numpy())
    assert (back.grid, back.positions, back.encoder) == (plan.grid, plan.positions, plan.encoder)
    for name in ("kept", "refreshed", "computed"):
        assert getattr(back, name).tolist() == getattr(plan, name).tolist()
    assert plan.layout is not None and back.layout is not None
    for name in ("token_ids", "is_embed", "is_visual"):
        assert getattr(back.layout, name).tolist() == getattr(plan.layout, name).tolist()


@given(plans)
def test_counts_rows_and_placeholders_agree(plan: RetentionPlan) -> None:
    ids, embeds = pruned_clip(plan)
    assert embeds.sum() == len(plan.embed_index) and len(ids) == len(plan.prompt_index)
    assert ids.count(PAD) == plan.num_kept == plan.counts.sum()
    assert plan.layout is not None
    dropped = plan.num_tokens - plan.num_kept
    assert len(plan.layout.token_ids) - len(ids) == dropped
    rows = torch.arange(len(plan.layout.is_visual))[:, None].float()
    whole = replace(plan, encoder="full", refreshed=plan.refreshed[:0])
    assert keep_rows([rows], [whole])[0][:, 0].long().tolist() == plan.embed_index.tolist()
    if plan.encoder == "reuse":
        rows = torch.from_numpy(plan.computed)[:, None].float()
        assert keep_rows([rows], [plan])[0][:, 0].long().tolist() == plan.kept.tolist()


@pytest.mark.parametrize("cut", [0, 3, -1])
def test_damaged_plans_are_refused(cut: int) -> None:
    array = random_plan(1, 3, 2, 2, True).to_array()
    with pytest.raises(PlanError):
        RetentionPlan.from_array(array[:cut])
    with pytest.raises(PlanError, match="same version"):
        RetentionPlan.from_array(np.concatenate([[99], array[1:]]))


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [0, 4], [-1, 2]])
def test_bad_indices_are_refused(kept: list[int]) -> None:
    with pytest.raises(PlanError):
        RetentionPlan((2, 1, 2), np.array(kept, dtype=np.int64))


@pytest.mark.parametrize("refreshed", [[3, 2], [3, 3], [4], [-1], [1]])
def test_bad_refreshed_indices_are_refused(refreshed: list[int]) -> None:
    kept = np.array([0, 1])
    assert RetentionPlan((2, 1, 2), kept, encoder="reuse", refreshed=np.array([3])).computed.tolist() == [0, 1, 3]
    with pytest.raises(PlanError, match="Refreshed"):
        RetentionPlan((2, 1, 2), kept, encoder="reuse", refreshed=np.array(refreshed))
    with pytest.raises(PlanError, match="of a plan that reuses"):
        RetentionPlan((2, 1, 2), kept, refreshed=np.array([3]))


def test_mismatches_are_refused() -> None:
    with pytest.raises(PlanError, match="grid of 4"):
        RetentionPlan((2, 1, 2), np.array([0]), layout=Layout.contiguous(PAD, 5))
    with pytest.raises(PlanError):
        Layout(np.array([1, 2]), np.array([True, False]), np.array([True, True]))
    plan = RetentionPlan((2, 1, 2), np.array([0, 1]), layout=Layout.contiguous(PAD, 4))
    with pytest.raises(PlanError, match="laid out for 4"):
        keep_rows([torch.zeros(5, 3)], [plan])
    with pytest.raises(PlanError, match="does not fit"):
        unprune([PAD], [ClipSpan(0, plan)])


def stock_mrope(ids: list[int], features: list[Any]) -> tuple[torch.Tensor, int]:
    """A stand-in for a model's method: text counts up, a clip has (t, h, w) and the text resumes after its maximum."""
    out = np.zeros((3, len(ids)), dtype=np.int64)
    place, start = 0, 0
    for offset, (t, h, w) in features:
        text = np.arange(offset - place) + start
        out[:, place:offset] = text
        start += len(text)
        n = t * h * w
        out[:, offset : offset + n] = np.indices((t, h, w)).reshape(3, -1) + start
        start += max(t, h, w)
        place = offset + n
    out[:, place:] = np.arange(len(ids) - place) + start
    return torch.from_numpy(out), int(out.max()) + 1 - len(ids)


def move(item: PositionRequest, offset: int) -> Any:
    return offset, item.feature


def lay_out(pieces: list[int | RetentionPlan | tuple[int, int, int]]) -> tuple[list[int], list[PositionRequest]]:
    """Text runs, pruned clips and unpruned images -> the pruned prompt and its items."""
    ids: list[int] = []
    items: list[PositionRequest] = []
    for piece in pieces:
        if isinstance(piece, int):
            ids += [TEXT] * piece
        elif isinstance(piece, tuple):
            items.append(PositionRequest(piece, len(ids), None))
            ids += [PAD] * int(np.prod(piece))
        else:
            items.append(PositionRequest(piece.grid, len(ids), ClipSpan(len(ids), piece)))
            ids += pruned_clip(piece)[0]
    return ids, items


def test_golden_positions() -> None:
    plan = random_plan(0, 3, 1, 2, False)
    plan = replace(plan, kept=np.array([0, 1, 4]), positions="keep")
    ids, items = lay_out([2, plan, 2])
    positions, delta = pruned_positions(ids, items, move, stock_mrope)
    # Clip starts at 2: (0,0,0), (0,0,1), (2,0,0) -> text resumes at 2 + 3.
    assert positions.tolist() == [[0, 1, 2, 2, 4, 5, 6], [0, 1, 2, 2, 2, 5, 6], [0, 1, 2, 3, 2, 5, 6]]
    assert delta + 7 == 7
    # EVS never drops the first token, but nothing moves if another choice does.
    ids, items = lay_out([2, replace(plan, kept=np.array([1, 4])), 2])
    positions, delta = pruned_positions(ids, items, move, stock_mrope)
    assert positions.tolist() == [[0, 1, 2, 4, 5, 6], [0, 1, 2, 2, 5, 6], [0, 1, 3, 2, 5, 6]] and delta == 1
    sequential = replace(plan, positions="sequential")
    ids, items = lay_out([2, sequential, 2])
    positions, delta = pruned_positions(ids, items, move, stock_mrope)
    assert positions.tolist() == [list(range(7))] * 3 and delta == 0


pieces = st.lists(
    st.one_of(
        st.integers(1, 5),
        st.tuples(st.just(1), st.integers(1, 3), st.integers(1, 3)),
        plans.filter(lambda plan: plan.layout is not None and bool(plan.layout.is_embed.all())),
    ),
    min_size=1,
    max_size=6,
)


@given(pieces)
def test_keep_is_the_unpruned_prompt_gathered(prompt: list[int | RetentionPlan | tuple[int, int, int]]) -> None:
    prompt = [replace(p, positions="keep") if isinstance(p, RetentionPlan) else p for p in prompt]
    ids, items = lay_out(prompt)
    positions, delta = pruned_positions(ids, items, move, stock_mrope)
    unpruned = [
        replace(p, kept=np.arange(p.num_tokens), refreshed=p.refreshed[:0]) if isinstance(p, RetentionPlan) else p
        for p in prompt
    ]
    full_ids, full_items = lay_out(unpruned)
    full, full_delta = stock_mrope(full_ids, [(i.offset, i.feature) for i in full_items])
    index: list[int] = []
    place = 0
    for before, after in zip(prompt, unpruned, strict=True):
        length = len(lay_out([after])[0])
        kept = before.kept if isinstance(before, RetentionPlan) else np.arange(length)
        index += (place + kept).tolist()
        place += length
    assert positions.tolist() == full[:, index].tolist()
    assert positions.dtype == torch.int64
    # The next token's ID is the same, counted from either length.
    assert delta + len(ids) == full_delta + len(full_ids)


@given(pieces)
def test_sequential_numbers_clips_like_text(prompt: list[int | RetentionPlan | tuple[int, int, int]]) -> None:
    prompt = [replace(p, positions="sequential") if isinstance(p, RetentionPlan) else p for p in prompt]
    ids, items = lay_out(prompt)
    positions, delta = pruned_positions(ids, items, move, stock_mrope)
    as_text = [p.num_kept if isinstance(p, RetentionPlan) else p for p in prompt]
    text_ids, text_items = lay_out(as_text)
    expected, expected_delta = stock_mrope(text_ids, [(i.offset, i.feature) for i in text_items])
    assert positions.tolist() == expected.tolist() and delta == expected_delta


@given(st.lists(plans, max_size=8), st.integers(1, 200))
def test_encoder_batches_bound_memory(clips: list[RetentionPlan], limit: int) -> None:
    slices = list(encoder_batches(clips, limit))
    assert [i for start, stop in slices for i in range(start, stop)] == list(range(len(clips)))
    for start, stop in slices:
        tokens = sum(plan.num_tokens for plan in clips[start:stop])
        assert stop - start == 1 or tokens <= limit
        assert len({plan.encoder for plan in clips[start:stop]}) == 1
    for (start, stop), (_, after) in zip(slices, slices[1:], strict=False):
        full = sum(p.num_tokens for p in clips[start : stop + 1]) > limit
        assert (full or clips[stop].encoder != clips[start].encoder) and after > stop
