# SPDX-License-Identifier: Apache-2.0
"""K/V reuse against a plain dense tower: every slot of every unit in loops, float64, stale keys filled forward."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from evs_vllm.core.plan import RetentionPlan
from evs_vllm.core.reuse import clip_rows, window_order
from evs_vllm.core.schedule import ReuseSchedule

LAYERS, HEADS, SIZE = 4, 2, 4
WIDTH = HEADS * SIZE
FULL_LAYERS = (1, 3)  # the others attend within windows
TOLERANCE = 1e-5


@dataclass(frozen=True)
class ClipCase:
    grid: tuple[int, int, int]
    density: float
    refreshed: float = 0.0
    seed: int = 0

    @property
    def plan(self):
        units, height, width = self.grid
        chance = np.random.default_rng(self.seed).random(units * height * width)
        chance[: height * width] = 0
        kept = chance <= self.density
        again = ~kept & (chance <= self.density + self.refreshed)
        return RetentionPlan(self.grid, np.flatnonzero(kept), encoder="reuse", refreshed=np.flatnonzero(again))


clips = st.builds(
    ClipCase,
    grid=st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
    density=st.sampled_from([0.0, 0.1, 0.4, 0.8, 1.0]),
    refreshed=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**16),
)
windows = st.one_of(st.none(), st.integers(1, 6))


class ToyTower:
    """Layers of attention and MLP with random weights; queries and keys carry a phase that depends on the slot."""

    def __init__(self, patches, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.patches = patches
        self.weights = [
            [torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5 for _ in range(6)]
            for _ in range(LAYERS)
        ]

    def phases(self, plan):
        """(P, patches, WIDTH)."""
        generator = torch.Generator().manual_seed(plan.grid[1] * 100 + plan.grid[2])
        shape = (plan.tokens_per_unit, self.patches, WIDTH)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def pixels(self, plan, seed):
        """(N, patches, WIDTH)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(plan.num_tokens, self.patches, WIDTH, generator=generator, dtype=torch.float64)

    @staticmethod
    def norm(x):
        return torch.nn.functional.layer_norm(x, x.shape[-1:])

    def dense(self, plan, pixels, window):
        """(N, patches, WIDTH), NaN where nothing is computed: one clip, in loops over units and slots."""
        units, height, width = plan.grid
        count, m = height * width, self.patches
        computed = np.zeros((units, count), dtype=bool)
        computed.flat[plan.computed] = True
        group = [(p // width // window, p % width // window) if window else (0, 0) for p in range(count)]
        phase = self.phases(plan)
        hidden = pixels.clone().view(units, count, m, WIDTH)
        hidden[~torch.from_numpy(computed)] = torch.nan
        for number, (wq, wk, wv, wo, w1, w2) in enumerate(self.weights):
            x = self.norm(hidden)
            query, key, value = x @ wq + phase, x @ wk + phase, x @ wv
            for t in range(1, units):
                for p in range(count):
                    if not computed[t, p]:
                        key[t, p], value[t, p] = key[t - 1, p], value[t - 1, p]
            after = torch.full_like(hidden, torch.nan)
            for t in range(units):
                for p in range(count):
                    if not computed[t, p]:
                        continue
                    seen = [o for o in range(count) if number in FULL_LAYERS or group[o] == group[p]]
                    for head in range(HEADS):
                        part = slice(head * SIZE, (head + 1) * SIZE)
                        k, v = key[t, seen, :, part].reshape(-1, SIZE), value[t, seen, :, part].reshape(-1, SIZE)
                        after[t, p, :, part] = torch.softmax(query[t, p, :, part] @ k.T * SIZE**-0.5, -1) @ v
            hidden = hidden + after @ wo
            hidden = hidden + torch.tanh(self.norm(hidden) @ w1) @ w2
        return hidden.view(units * count, m, WIDTH)

    def reuse(self, plans, pixels, window):
        """The same for several clips at once, in fp32, with computed rows only: (rows, patches, WIDTH) per clip."""
        rows, orders = zip(*(clip_rows(plan, window) for plan in plans), strict=True)
        whole = ReuseSchedule([replace(r, windows=r.windows[[0, -1]]) for r in rows], self.patches)
        windowed = ReuseSchedule(rows, self.patches)
        taken = [torch.from_numpy(plan.computed[order]) for plan, order in zip(plans, orders, strict=True)]
        hidden = torch.cat([x[t] for x, t in zip(pixels, taken, strict=True)]).flatten(0, 1).float()
        parts = [self.phases(plan)[t % plan.tokens_per_unit] for plan, t in zip(plans, taken, strict=True)]
        phase = torch.cat(parts).flatten(0, 1).float()
        for number, weights in enumerate(self.weights):
            wq, wk, wv, wo, w1, w2 = (w.float() for w in weights)
            x = self.norm(hidden)
            heads = [(x @ w).view(-1, HEADS, SIZE) for w in (wq, wk, wv)]
            heads[:2] = [h + phase.view(-1, HEADS, SIZE) for h in heads[:2]]
            schedule = whole if number in FULL_LAYERS else windowed
            hidden = hidden + schedule.attend(*heads, scale=SIZE**-0.5).flatten(1) @ wo
            hidden = hidden + torch.tanh(self.norm(hidden) @ w1) @ w2
        out = []
        for part, order in zip(hidden.split([len(o) * self.patches for o in orders]), orders, strict=True):
            in_order = torch.empty_like(part).view(-1, self.patches, WIDTH)
            in_order[torch.from_numpy(order)] = part.view(-1, self.patches, WIDTH)
            out.append(in_order)
        return out


def assert_close(got, want, tolerance=TOLERANCE):
    assert got.shape == want.shape
    assert not want.isnan().any() and not got.isnan().any()
    error = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
    assert error <= tolerance * max(1.0, want.abs().max().item()), f"differs by {error:.1e}"


@settings(max_examples=60)
@given(cases=st.lists(clips, min_size=1, max_size=3), window=windows, patches=st.sampled_from([1, 4]))
@example(cases=[ClipCase((1, 3, 5), 0.0)], window=2, patches=4)  # one unit
@example(cases=[ClipCase((5, 1, 1), 0.5)], window=None, patches=4)  # one slot
@example(cases=[ClipCase((6, 5, 3), 0.0), ClipCase((2, 3, 3), 1.0)], window=2, patches=4)  # nothing after unit 0; all
@example(cases=[ClipCase((6, 3, 5), 0.0, refreshed=1.0)], window=4, patches=1)  # one unit kept, all computed
@example(cases=[ClipCase((6, 5, 5), 0.1, r, s) for s, r in enumerate((0.0, 0.1, 0.5))], window=2, patches=4)
def test_a_batch_of_clips_equals_the_dense_tower_on_each(cases, window, patches):
    tower = ToyTower(patches)
    plans = [case.plan for case in cases]
    pixels = [tower.pixels(plan, seed) for seed, plan in enumerate(plans)]
    for plan, x, got in zip(plans, pixels, tower.reuse(plans, pixels, window), strict=True):
        assert_close(got, tower.dense(plan, x, window)[plan.computed])


@pytest.mark.parametrize("window", [None, 2, 4])
def test_other_clips_of_the_batch_change_nothing(window):
    tower = ToyTower(4)
    cases = [
        ClipCase((4, 3, 5), 0.5),
        ClipCase((1, 2, 2), 0.0),
        ClipCase((6, 5, 4), 0.1, 0.3),
        ClipCase((4, 3, 5), 0.2),
    ]
    plans = [case.plan for case in cases]
    pixels = [tower.pixels(plan, seed) for seed, plan in enumerate(plans)]
    together = tower.reuse(plans, pixels, window)
    for plan, x, got in zip(plans, pixels, together, strict=True):
        assert_close(got, tower.reuse([plan], [x], window)[0], 1e-6)


def test_keys_really_come_from_the_past_and_from_nowhere_else():
    tower, case = ToyTower(1), ClipCase((5, 2, 3), 0.4, seed=3)
    plan = case.plan
    x = tower.pixels(plan, 0)
    (before,) = tower.reuse([plan], [x], 2)
    for token in range(plan.num_tokens):
        changed = x.clone()
        changed[token] += 1
        (after,) = tower.reuse([plan], [changed], 2)
        moved = plan.computed[((after - before).abs().amax((1, 2)) > 1e-6).numpy()]
        if token not in plan.computed:
            assert len(moved) == 0, "a dropped token's pixels reached the output"
        else:
            assert token in moved and moved.min() // 6 >= token // 6, "a later unit reached an earlier one"


@given(height=st.integers(1, 9), width=st.integers(1, 9), window=windows)
def test_window_order(height, width, window):
    order, starts = window_order(height, width, window)
    expected = []
    side = window or 100
    for top in range(0, height, side):
        for left in range(0, width, side):
            inside = [(r, c) for r in range(height) for c in range(width) if r // side == top // side]
            expected.append([r * width + c for r, c in inside if c // side == left // side])
    assert [order[a:b].tolist() for a, b in zip(starts, starts[1:])] == expected


@pytest.mark.parametrize("grid", [(1, 1), (4, 5), (5, 4), (8, 8), (3, 9), (7, 1)])
def test_window_order_is_that_of_transformers(grid):
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    theirs, bounds = modeling.get_vision_window_index(torch.tensor([[1, 2 * grid[0], 2 * grid[1]]]), 2, 112, 14)
    order, starts = window_order(*grid, 4)
    assert order.tolist() == theirs.tolist()
    assert (4 * starts).tolist() == bounds.tolist()


@settings(max_examples=60)
@given(case=clips, window=windows)
def test_every_row_attends_once_in_its_own_window(case, window):
    plan = case.plan
    rows, row_order = clip_rows(plan, window)
    order, starts = window_order(*plan.grid[1:], window)
    assert sorted(row_order.tolist()) == list(range(len(plan.computed)))
    tokens = plan.computed[row_order]
    assert (order[rows.slots] == tokens % plan.tokens_per_unit).all()
    assert rows.windows.tolist() == starts.tolist()
    assert rows.tokens_per_unit == plan.tokens_per_unit
    units = [set((tokens[a:b] // plan.tokens_per_unit).tolist()) for a, b in zip(rows.units, rows.units[1:])]
    assert [len(u) for u in units] == [1] * len(units), "rows between two boundaries belong to one unit"
    assert [min(u) for u in units] == sorted(set((plan.computed // plan.tokens_per_unit).tolist()))
    seen = []
    for unit, its_rows, slots in rows.sequences():
        assert rows.units[unit] <= its_rows.start < its_rows.stop <= rows.units[unit + 1]
        assert (slots.start, slots.stop) in set(zip(starts.tolist(), starts[1:].tolist()))
        assert all(slots.start <= p < slots.stop for p in rows.slots[its_rows])
        seen += range(its_rows.start, its_rows.stop)
    assert seen == list(range(len(tokens)))


@settings(max_examples=60)
@given(case=clips, window=windows)
def test_sources_are_the_latest_rows(case, window):
    plan = case.plan
    rows, row_order = clip_rows(plan, window)
    order, _ = window_order(*plan.grid[1:], window)
    unit_of, slot_of = np.divmod(plan.computed[row_order], plan.tokens_per_unit)
    present = sorted(set(unit_of.tolist()))
    assert rows.sources.shape == (len(present), plan.tokens_per_unit)
    for index, unit in enumerate(present):
        for rank, slot in enumerate(order):
            candidates = [r for r in range(len(unit_of)) if slot_of[r] == slot and unit_of[r] <= unit]
            assert rows.sources[index, rank] == max(candidates, key=lambda r: unit_of[r])


@pytest.mark.parametrize("window", [None, 2, 3])
def test_a_plan_that_keeps_all_is_ordinary_attention(window):
    units, height, width, m = 3, 4, 5, 4
    plan = ClipCase((units, height, width), 1.0).plan
    rows, row_order = clip_rows(plan, window)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, plan.num_tokens * m, HEADS, SIZE, generator=generator)
    slot = torch.from_numpy(plan.computed[row_order]).repeat_interleave(m)
    unit, row, column = slot // (height * width), slot % (height * width) // width, slot % width
    side = window or 100
    group = unit * 10000 + row // side * 100 + column // side
    mask = group[:, None] == group
    want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), mask, scale=0.3)
    assert_close(ReuseSchedule([rows], m).attend(q, k, v, 0.3), want.transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_strided_inputs_and_dtypes(dtype):
    plan = ClipCase((4, 3, 5), 0.4, refreshed=0.2).plan
    rows, _ = clip_rows(plan, 2)
    qkv = torch.randn(len(plan.computed) * 4, 3, HEADS, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = qkv.clone()
    schedule = ReuseSchedule([rows], 4)
    got = schedule.attend(*qkv.unbind(1), scale=0.5)  # views into one tensor, like a fused projection's output
    want = schedule.attend(*(x.contiguous() for x in qkv.unbind(1)), scale=0.5)
    assert got.dtype == dtype and torch.equal(got, want) and torch.equal(qkv, before)
    exact = schedule.attend(*before.double().unbind(1), scale=0.5)
    assert_close(got, exact, 1e-5 if dtype != torch.bfloat16 else 2e-2)
