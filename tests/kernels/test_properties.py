# SPDX-License-Identifier: Apache-2.0
"""Properties of a selection, and the CPU kernels against the reference, on inputs hypothesis chooses."""

import itertools
import math

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import evs_kernels as ek
from evs_kernels.select_hold._prices import lowest_that_fits, price, top_number

SETTINGS = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])

shapes = st.tuples(st.integers(1, 7), st.integers(1, 40))
ints = st.one_of(st.integers(-3, 3), st.integers(-(2**31), 2**31 - 1))
floats = st.one_of(st.sampled_from([0.0, -0.0, 1.0]), st.floats(width=32, allow_nan=False))
scores = shapes.flatmap(
    lambda s: st.one_of(hnp.arrays(np.int32, s, elements=ints), hnp.arrays("f4", s, elements=floats))
)
minimum = st.integers(0, 45)
byte = st.one_of(st.sampled_from([0, 1, 100, 255]), st.integers(0, 255))


def same(got, want):
    assert got.indices.tolist() == want.indices.tolist()
    assert got.counts.tolist() == want.counts.tolist()


@SETTINGS
@given(scores, st.integers(0, 300), minimum)
def test_topk(array, budget, reserved):
    values = torch.from_numpy(array)
    units, places = values.shape
    got = ek.select_topk(values, budget, min_per_unit=reserved)
    same(got, ek.select_topk(values, budget, min_per_unit=reserved, backend="ref"))
    floor = places + (units - 1) * min(reserved, places)
    assert len(got.indices) == min(units * places, max(budget, floor)) == got.counts.sum()
    assert (got.indices.diff() > 0).all()
    assert got.counts[0] == places and got.counts.min() >= min(reserved, places)
    per_unit = torch.bincount(got.indices // places, minlength=units)
    assert per_unit.tolist() == got.counts.tolist()


@SETTINGS
@given(scores, st.one_of(st.floats(allow_nan=False, width=32), st.integers(-(2**33), 2**33)), minimum, st.data())
def test_threshold(array, threshold, reserved, data):
    values = torch.from_numpy(array)
    cap = data.draw(st.one_of(st.none(), st.integers(0, values.numel())))
    got = ek.select_threshold(values, threshold, min_per_unit=reserved, max_tokens=cap)
    same(got, ek.select_threshold(values, threshold, min_per_unit=reserved, max_tokens=cap, backend="ref"))


@SETTINGS
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 200))))
def test_uint8_score_is_the_integer_sum(array):
    got = ek.temporal_score(torch.from_numpy(array))
    wide = array.astype(np.int64)
    assert got[1:].tolist() == np.abs(wide[1:] - wide[:-1]).sum(-1).tolist()
    assert not got[0].any()


@SETTINGS
@given(hnp.arrays(np.float32, (2, 3, 9), elements=st.floats(-1e4, 1e4, width=32)))
def test_cosine_of_equal_units_is_zero_and_range_is_two(array):
    unit = torch.from_numpy(array)
    got = ek.cosine_score(unit)
    assert ((got >= 0) & (got <= 2)).all()
    assert not ek.cosine_score(unit[:1].repeat(3, 1, 1)).any()
    assert not any(math.isnan(x) for x in got.flatten().tolist())


@SETTINGS
@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(1, 30))),
    st.one_of(st.none(), st.integers(0, 130)),
    st.one_of(st.none(), st.integers(1, 9000)),
    st.integers(0, 25),
    st.data(),
)
def test_anchored(array, budget, threshold, reserved, data):
    if budget is None and threshold is None:
        budget = 0
    units, places, _ = array.shape
    forced = data.draw(st.one_of(st.none(), hnp.arrays(np.bool_, (units, places))))
    weights = data.draw(st.one_of(st.none(), hnp.arrays(np.int32, units, elements=st.integers(0, 4096))))
    given_ = {
        "threshold": threshold,
        "min_per_unit": reserved,
        "weights": None if weights is None else torch.from_numpy(weights),
        "forced": None if forced is None else torch.from_numpy(forced),
    }
    got = ek.select_anchored(torch.from_numpy(array), budget, **given_)
    same(got, ek.select_anchored(torch.from_numpy(array), budget, **given_, backend="ref"))
    assert (got.indices.diff() > 0).all()
    per_unit = torch.bincount(got.indices // places, minlength=units)
    assert per_unit.tolist() == got.counts.tolist()
    assert got.counts[0] == places and got.counts.min() >= min(reserved, places)
    stays = np.zeros((units, places), np.bool_)
    stays.reshape(-1)[got.indices] = True
    must = np.zeros_like(stays) if forced is None else forced.copy()
    must[0] = True
    assert stays[must].all()
    least = places + sum(max(int(n), min(reserved, places)) for n in must[1:].sum(axis=1))
    bound = units * places if budget is None else min(units * places, max(budget, least))
    assert len(got.indices) <= bound
    if threshold is None:
        assert len(got.indices) == bound
    elif len(got.indices) < bound:
        # The threshold stands, so by the walk alone nothing that is dropped is as far as it from its anchor.
        values, anchors = array.astype(np.int64), array[0].astype(np.int64)
        for t in range(1, units):
            far = np.abs(values[t] - anchors).sum(axis=1) * (1 if weights is None else weights[t]) >= threshold
            assert not (far & ~stays[t]).any()
            anchors[far | must[t]] = values[t][far | must[t]]


@settings(SETTINGS, max_examples=60)
@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(1, 5)), elements=byte),
    st.integers(0, 200),
    st.integers(0, 8),
    st.data(),
)
def test_hold(array, budget, reserved, data):
    units, places, _ = array.shape
    weights = data.draw(st.one_of(st.none(), hnp.arrays(np.int32, units, elements=st.integers(0, 4096))))
    given_ = {"min_per_unit": reserved, "weights": None if weights is None else torch.from_numpy(weights)}
    got = ek.select_hold(torch.from_numpy(array), budget, **given_)
    same(got, ek.select_hold(torch.from_numpy(array), budget, **given_, backend="ref"))
    least = places + (units - 1) * min(reserved, places)
    assert len(got.indices) == min(units * places, max(budget, least)) == got.counts.sum()
    assert (got.indices.diff() > 0).all()
    assert got.counts[0] == places and got.counts.min() >= min(reserved, places)
    per_unit = torch.bincount(got.indices // places, minlength=units)
    assert per_unit.tolist() == got.counts.tolist()


@SETTINGS
@given(hnp.arrays(np.uint8, st.integers(1, 7), elements=byte), st.integers(0, 8))
def test_hold_finds_the_best_of_all_ways(values, budget):
    units = len(values)
    ways = [way for n in range(units) for way in itertools.combinations(range(1, units), n)]

    def distances(way):
        anchors = [max(s for s in (0, *way) if s <= t) for t in range(units)]
        return [abs(int(values[t]) - int(values[s])) for t, s in enumerate(anchors)]

    def best(number):
        # Of equal ways the one whose next token is latest, so whose sequence of kept units is the highest.
        return min(ways, key=lambda way: (sum(distances(way)) + len(way) * price(number), [-t for t in (*way, 99)]))

    def fits(number):
        return 1 + len(best(number)) <= bound

    bound = min(units, max(budget, 1))
    way = best(0 if fits(0) else lowest_that_fits(fits, top_number(1, 1)))
    rest = sorted(set(range(1, units)) - set(way), key=lambda t: (-distances(way)[t], t))
    want = sorted([0, *way, *rest][:bound])
    assert ek.select_hold(torch.from_numpy(values)[:, None, None], budget).indices.tolist() == want


@SETTINGS
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.sampled_from([1, 2, 5, 8, 14, 17]), st.data())
def test_pool(merge, channels, frames, side, data):
    size = merge * side
    cells = data.draw(st.integers(1, size))
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    pictures = np.random.default_rng(seed).integers(0, 256, (*shape, channels, frames, size, size), dtype=np.uint8)
    split = pictures.reshape(*shape, channels, frames, merge, side, merge, side)
    tokens = torch.from_numpy(split.transpose(0, 1, 4, 6, 2, 3, 5, 7).reshape(*shape, -1).copy())
    got = ek.pool_tokens(tokens, merge, channels, frames, side, cells)
    assert torch.equal(got, ek.pool_tokens(tokens, merge, channels, frames, side, cells, backend="ref"))
    # torch's own pooling, of doubles: a mean that is not half an integer is further from it than they can be wrong.
    means = torch.from_numpy(pictures).double().mean(dim=3).flatten(0, 1)
    means = torch.nn.functional.adaptive_avg_pool2d(means, cells).view(*shape, channels, cells, cells)
    assert torch.equal(got, (means + 0.5 + 1e-9).floor().to(torch.uint8).permute(0, 1, 3, 4, 2))


@SETTINGS
@given(hnp.arrays(np.uint8, st.tuples(*[st.integers(1, n) for n in (4, 7, 7, 2)]), elements=byte), st.data())
def test_every_pixel_counts_by_its_share_of_a_cell(array, data):
    frames, height, width, channels = array.shape
    rows, columns, unit_frames = (data.draw(st.integers(1, most)) for most in (2 * height + 3, 2 * width + 3, 3))
    got = ek.pool_frames(torch.from_numpy(array), rows, columns, unit_frames)
    assert got.shape == (-(-frames // unit_frames), rows, columns, channels)
    edges = [[i * n * 256 // cells for i in range(cells + 1)] for n, cells in ((height, rows), (width, columns))]
    for t, i, j, channel in itertools.product(*map(range, got.shape)):
        total = weight = 0
        for frame, y, x in itertools.product(range(unit_frames), range(height), range(width)):
            tall, wide = (
                max(0, min(edge[k + 1], 256 * at + 256) - max(edge[k], 256 * at))
                for edge, k, at in zip(edges, (i, j), (y, x), strict=True)
            )
            total += tall * wide * int(array[min(t * unit_frames + frame, frames - 1), y, x, channel])
            weight += tall * wide
        assert int(got[t, i, j, channel]) == (2 * total + weight) // (2 * weight)


@SETTINGS
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(0, 2**31))
def test_pool_frames_equals_pool_tokens_of_the_same_pixels(down, across, patch, cells, seed):
    """Where the grid divides the picture: tokens of 2 x 2 patches, in each cells x cells, frames of the right size."""
    side = patch * cells
    frames = torch.randint(
        0, 256, (3, 2 * side * down, 2 * side * across, 3), generator=torch.Generator().manual_seed(seed)
    )
    frames = frames.to(torch.uint8)
    rows = ek.resize_patches(frames, *frames.shape[1:3], None, 2, side, 2)
    pooled = ek.pool_tokens(rows.view(2, down * across, -1), 2, 3, 2, side, 2 * cells)
    grid = pooled.view(2, down, across, 2 * cells, 2 * cells, 3).transpose(2, 3).reshape(2, 2 * cells * down, -1, 3)
    assert torch.equal(ek.pool_frames(frames, 2 * cells * down, 2 * cells * across, 2), grid)
