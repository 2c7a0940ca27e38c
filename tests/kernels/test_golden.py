# SPDX-License-Identifier: Apache-2.0
"""Cases worked out by hand, for every implementation including the reference."""

import pytest
import torch

import evs_kernels as ek

BACKENDS = ["ref", "cpu", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    ok, reason = ek.supported("prune_topk", request.param, "cpu")
    if not ok:
        pytest.skip(reason)
    return request.param


def kept(selection):
    return selection.indices.tolist(), selection.counts.tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_temporal_score(backend, dtype):
    # Unit 1: both tokens jump by the whole range, one up and one down, which wraps to 1 in byte arithmetic.
    clip = [[[0, 0, 0], [255, 255, 7]], [[255, 255, 0], [0, 255, 7]], [[255, 250, 1], [0, 255, 7]]]
    scores = ek.temporal_score(torch.tensor(clip, dtype=dtype), backend=backend)
    assert scores.tolist() == [[0, 0], [510, 255], [6, 0]]
    assert scores.dtype == (torch.int32 if dtype == torch.uint8 else torch.float32)


def test_uint8_sums_do_not_wrap(backend):
    # 70000 * 255 does not fit 16 or 24 bits.
    clip = torch.tensor([[0], [255]], dtype=torch.uint8).repeat_interleave(70_000, dim=1).view(2, 1, 70_000)
    assert ek.temporal_score(clip, backend=backend).tolist() == [[0], [17_850_000]]
    assert ek.temporal_score(clip.flip(0), backend=backend).tolist() == [[0], [17_850_000]]


def test_half_precision_differences_are_not_rounded(backend):
    # 2048 - 0.5 is not a float16, and 4096 of them would overflow it.
    clip = torch.tensor([0.5, 2048.0], dtype=torch.float16).repeat_interleave(4096).view(2, 1, 4096)
    assert ek.temporal_score(clip, backend=backend).tolist() == [[0], [2047.5 * 4096]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cosine_score(backend, dtype):
    # Columns: equal, opposite, right angle, scaled, from zero, to zero, both zero.
    units = [
        [[1, 2], [1, 2], [1, 0], [1, 1], [0, 0], [3, 4], [0, 0]],
        [[1, 2], [-1, -2], [0, 5], [4, 4], [1, 2], [0, 0], [0, 0]],
    ]
    scores = ek.cosine_score(torch.tensor(units, dtype=dtype), backend=backend)
    assert scores[0].tolist() == [0] * 7
    torch.testing.assert_close(scores[1], torch.tensor([0, 2, 1, 0, 1, 1, 0.0]), rtol=0, atol=1e-6)
    assert scores[1, 0] == 0 and scores[1, 6] == 0


def test_cosine_score_of_equal_vectors_is_exactly_zero(backend, generator):
    # By the formula alone, rounding leaves about 1e-7 at some of them, and still tokens would no longer tie.
    unit = torch.randn((1, 40, 21), generator=generator)
    assert not ek.cosine_score(unit.repeat(2, 1, 1), backend=backend).any()


SCORES = [
    [9, 9, 9, 9],
    [1, 5, 5, 0],
    [5, 2, 7, 5],
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
@pytest.mark.parametrize(
    ("budget", "reserved", "indices", "counts"),
    [
        (0, 0, [0, 1, 2, 3], [4, 0, 0]),  # unit 0 is kept whole
        (4, 0, [0, 1, 2, 3], [4, 0, 0]),
        (5, 0, [0, 1, 2, 3, 10], [4, 0, 1]),
        (7, 0, [0, 1, 2, 3, 5, 6, 10], [4, 2, 1]),  # four fives tie for two places: the lower indices win
        (8, 0, [0, 1, 2, 3, 5, 6, 8, 10], [4, 2, 2]),
        (0, 1, [0, 1, 2, 3, 5, 10], [4, 1, 1]),  # the minimum wins over the budget, ties to the lower index
        (7, 1, [0, 1, 2, 3, 5, 6, 10], [4, 1 + 1, 1]),
        (0, 3, [0, 1, 2, 3, 4, 5, 6, 8, 10, 11], [4, 3, 3]),
        (12, 0, list(range(12)), [4, 4, 4]),
        (99, 99, list(range(12)), [4, 4, 4]),
    ],
)
def test_select_topk(backend, dtype, budget, reserved, indices, counts):
    scores = torch.tensor(SCORES, dtype=dtype)
    assert kept(ek.select_topk(scores, budget, min_per_unit=reserved, backend=backend)) == (indices, counts)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
@pytest.mark.parametrize(
    ("threshold", "reserved", "cap", "indices", "counts"),
    [
        (5, 0, None, [0, 1, 2, 3, 5, 6, 8, 10, 11], [4, 2, 3]),  # at least, not above
        (5.5, 0, None, [0, 1, 2, 3, 10], [4, 0, 1]),
        (4.5, 0, None, [0, 1, 2, 3, 5, 6, 8, 10, 11], [4, 2, 3]),
        (8, 1, None, [0, 1, 2, 3, 5, 10], [4, 1, 1]),
        (5, 0, 9, [0, 1, 2, 3, 5, 6, 8, 10, 11], [4, 2, 3]),  # exactly the cap
        (5, 0, 7, [0, 1, 2, 3, 5, 6, 10], [4, 2, 1]),
        (5, 1, 0, [0, 1, 2, 3, 5, 10], [4, 1, 1]),  # the floor wins over the cap
        (float("inf"), 0, None, [0, 1, 2, 3], [4, 0, 0]),
        (float("-inf"), 0, None, list(range(12)), [4, 4, 4]),
    ],
)
def test_select_threshold(backend, dtype, threshold, reserved, cap, indices, counts):
    got = ek.select_threshold(
        torch.tensor(SCORES, dtype=dtype), threshold, min_per_unit=reserved, max_tokens=cap, backend=backend
    )
    assert kept(got) == (indices, counts)


# Place 0 creeps by 4, place 1 jumps by 40 and returns, place 2 rests.
MOVES = torch.tensor([[0, 50, 7], [4, 90, 7], [8, 50, 7], [12, 50, 7], [16, 50, 7]], dtype=torch.uint8)[:, :, None]


@pytest.mark.parametrize(
    ("arguments", "indices"),
    [
        ({"budget": 0}, []),  # unit 0 is kept whole
        ({"budget": 4}, [4]),  # any level that takes the jump takes the return as well; at none the jump is furthest
        ({"budget": 5}, [4, 7]),
        ({"budget": 6}, [4, 7, 9]),  # the lowest level that fits is 9: place 0 has crept by 12 in unit 3
        ({"budget": 7}, [4, 6, 7, 12]),  # level 5, which place 0 passes in units 2 and 4
        ({"budget": 8}, [3, 4, 6, 7, 12]),  # as before, as level 4 costs 9; unit 1 and 3 of place 0 tie at 4
        ({"budget": 9}, [3, 4, 6, 7, 9, 12]),
        ({"budget": 10}, [3, 4, 5, 6, 7, 9, 12]),  # all that is left is 0 from its anchor: the lowest index
        ({"budget": 99}, list(range(3, 15))),
        ({"threshold": 9}, [4, 7, 9]),
        ({"threshold": 12}, [4, 7, 9]),
        ({"threshold": 13}, [4, 7, 12]),
        ({"threshold": 41}, []),
        ({"threshold": 10**9}, []),
        ({"threshold": 41, "min_per_unit": 1}, [4, 6, 9, 12]),  # the jump is the furthest of unit 1
        ({"threshold": 9, "min_per_unit": 1}, [4, 7, 9, 12]),
        ({"threshold": 9, "min_per_unit": 9}, list(range(3, 15))),
        ({"threshold": 9, "budget": 99}, [4, 7, 9]),  # a bound, not a number to fill
        ({"threshold": 9, "budget": 6}, [4, 7, 9]),
        ({"threshold": 9, "budget": 5}, [4, 7]),  # the bound bites: raised to 17
        ({"threshold": 9, "budget": 4}, [4]),
        ({"threshold": 1, "budget": 7}, [4, 6, 7, 12]),
        ({"budget": 4, "min_per_unit": 1}, [4, 7, 9, 12]),  # minima are kept whatever the budget
        ({"budget": 8, "min_per_unit": 1}, [4, 6, 7, 9, 12]),
        ({"budget": 4, "weights": [1, 1, 3, 1, 1]}, [4]),
        ({"threshold": 24, "weights": [9, 1, 3, 1, 1]}, [4, 6, 7]),  # of unit 2, 8 and 40 count 24 and 120
        ({"threshold": 1, "weights": [1, 0, 0, 0, 0]}, []),
        ({"threshold": 41, "forced": [4]}, [4]),
        ({"threshold": 40, "forced": [4]}, [4, 7]),  # kept at the jump, so the return is far from its anchor
        ({"threshold": 9, "forced": [6]}, [4, 6, 7]),  # measured from unit 2, place 0 never creeps by 9
        ({"budget": 0, "forced": [6, 8]}, [6, 8]),
        ({"budget": 0, "forced": [6, 8], "min_per_unit": 1}, [4, 6, 8, 9, 12]),
    ],
)
def test_select_anchored(backend, arguments, indices):
    given = dict(arguments)
    if "weights" in given:
        given["weights"] = torch.tensor(given["weights"], dtype=torch.int32)
    if "forced" in given:
        given["forced"] = (
            torch.zeros(15, dtype=torch.bool).index_fill(0, torch.tensor(given["forced"]), True).view(5, 3)
        )
    selection = ek.select_anchored(MOVES, backend=backend, **given)
    assert kept(selection)[0] == [0, 1, 2, *indices]
    assert selection.counts.tolist() == torch.bincount(selection.indices // 3, minlength=5).tolist()


def test_select_anchored_level_is_the_one_that_bisection_finds(backend):
    # One token beside unit 0. Level 5 would keep the 9 and be lower, but bisection comes from 8, which keeps the 6, and
    # goes by 4, 6 and 7, which all keep two.
    clip = torch.tensor([14, 9, 6, 13], dtype=torch.uint8).view(4, 1, 1)
    assert kept(ek.select_anchored(clip, 2, backend=backend))[0] == [0, 2]
    assert kept(ek.select_anchored(clip, threshold=5, backend=backend))[0] == [0, 1]
    assert kept(ek.select_anchored(clip, 2, threshold=5, backend=backend))[0] == [0, 1]
    assert kept(ek.select_anchored(clip, 2, threshold=4, backend=backend))[0] == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "indices"),
    [
        ({"budget": 0}, []),  # price 24, at which keeping unit 3 of place 0 saves nothing: 24 + 16 = 4 + 8 + 12 + 16
        ({"budget": 4}, [9]),  # price 20: the jump and the return would cost 2 * 20, and not keeping them is 40
        ({"budget": 5}, [4, 9]),  # the same, and what is furthest from what stands for it
        ({"budget": 6}, [4, 7, 9]),  # price 8, at which units 2 and 4 of place 0 cost as much as unit 3, which is later
        ({"budget": 7}, [4, 6, 7, 12]),  # price 4, at which more of place 0 costs as much and begins no later
        ({"budget": 8}, [3, 4, 6, 7, 12]),  # units 1 and 3 of place 0 tie at 4
        ({"budget": 9}, [3, 4, 6, 7, 9, 12]),  # price 0
        ({"budget": 10}, [3, 4, 5, 6, 7, 9, 12]),  # all that is left is 0 from what stands for it: the lowest index
        ({"budget": 99}, list(range(3, 15))),
        ({"budget": 0, "min_per_unit": 1}, [4, 7, 9, 12]),  # minima are kept whatever the budget
        ({"budget": 8, "min_per_unit": 1}, [4, 6, 7, 9, 12]),  # price 4, as unit 3 lacks one
        ({"budget": 0, "min_per_unit": 9}, list(range(3, 15))),
        ({"budget": 8, "weights": [9, 1, 0, 1, 1]}, [3, 4, 9, 10, 12]),  # what counts 0 is held
        ({"budget": 8, "weights": [1, 0, 0, 0, 0]}, [3, 4, 5, 6, 7]),
    ],
)
def test_select_hold(backend, arguments, indices):
    given = dict(arguments)
    if "weights" in given:
        given["weights"] = torch.tensor(given["weights"], dtype=torch.int32)
    selection = ek.select_hold(MOVES, backend=backend, **given)
    assert kept(selection)[0] == [0, 1, 2, *indices]
    assert selection.counts.tolist() == torch.bincount(selection.indices // 3, minlength=5).tolist()


@pytest.mark.parametrize(
    ("last", "budget", "indices"),
    [
        ((100, 100), 2, [0, 32]),  # what is kept in one block stands in the next
        ((50, 100), 2, [0, 33]),  # price 50, at which the first block keeps nothing
        ((50, 100), 3, [0, 32, 33]),
    ],
)
def test_select_hold_goes_block_by_block(backend, last, budget, indices):
    clip = torch.zeros((34, 1, 1), dtype=torch.uint8)
    clip[32:, 0, 0] = torch.tensor(last)
    assert kept(ek.select_hold(clip, budget, backend=backend))[0] == indices


def test_largest_weighted_distance_is_exact(backend):
    clip = torch.zeros((3, 2, 256), dtype=torch.uint8)
    clip[1], clip[2, 1, 0] = 255, 1
    weights = torch.full((3,), 4096, dtype=torch.int32)
    largest = 255 * 256 * 4096
    assert kept(ek.select_anchored(clip, threshold=largest, weights=weights, backend=backend))[0] == [0, 1, 2, 3, 4]
    assert kept(ek.select_anchored(clip, threshold=largest + 1, weights=weights, backend=backend))[0] == [0, 1]
    assert kept(ek.select_anchored(clip, 5, weights=weights, backend=backend))[0] == [0, 1, 2, 3, 4]


def test_pool_tokens(backend):
    # Two patches a side, two channels, two frames, two pixels a side: the layout of a token, position by position.
    tokens = torch.arange(64, dtype=torch.uint8).view(1, 1, 64)
    # A cell is a pixel of channel and patch: the mean of it in both frames, which lie 4 values apart.
    pixels = [[0, 1, 16, 17], [2, 3, 18, 19], [32, 33, 48, 49], [34, 35, 50, 51]]
    want = [[[x + 2, x + 10] for x in row] for row in pixels]
    assert ek.pool_tokens(tokens, 2, 2, 2, 2, 4, backend=backend).tolist() == [[want]]
    # A cell is a patch: the mean of its eight values, whose half is rounded up.
    want = [[[4, 12], [20, 28]], [[36, 44], [52, 60]]]
    assert ek.pool_tokens(tokens, 2, 2, 2, 2, 2, backend=backend).tolist() == [[want]]
    # Three cells over four pixels: rows and columns 0-1, 1-2, 2-3, so neighbours share one.
    want = [[[4, 12], [12, 20], [20, 28]], [[20, 28], [28, 36], [36, 44]], [[36, 44], [44, 52], [52, 60]]]
    assert ek.pool_tokens(tokens, 2, 2, 2, 2, 3, backend=backend).tolist() == [[want]]
    assert ek.pool_tokens(tokens, 2, 2, 2, 2, 1, backend=backend).tolist() == [[[[[28, 36]]]]]


def test_pool_tokens_rounds_half_up(backend):
    for total, mean in ((0, 0), (1, 0), (2, 1), (3, 1), (5, 1), (6, 2)):
        token = torch.tensor([total, 0, 0, 0], dtype=torch.uint8).view(1, 1, 4)
        assert ek.pool_tokens(token, 1, 1, 1, 2, 1, backend=backend).item() == mean
    assert (ek.pool_tokens(torch.full((1, 3, 4704), 255, dtype=torch.uint8), 2, 3, 2, 14, backend=backend) == 255).all()


def test_pool_frames(backend):
    # Two frames of 2 x 3 pixels with two channels: the first counts up, the second is all 10 and 20.
    frames = torch.tensor([[[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]], [[[10, 20]] * 3] * 2])
    frames = frames.to(torch.uint8)
    assert ek.pool_frames(frames[:1], 2, 3, 1, backend=backend).tolist() == frames[:1].tolist()
    assert ek.pool_frames(frames, 1, 1, 2, backend=backend).tolist() == [[[[8, 13]]]]  # (5 + 10) / 2, (6 + 20) / 2
    # The last frame stands for the one that the second unit lacks.
    assert ek.pool_frames(frames[[0, 0, 1]], 1, 1, 2, backend=backend).tolist() == [[[[5, 6]]], [[[10, 20]]]]
    # Two cells over three columns: the middle one is half in either.
    want = [[[[1, 2], [3, 4]], [[7, 8], [9, 10]]]]  # (0 + 2 / 2) / 1.5 = 0.67, (2 / 2 + 4) / 1.5 = 3.33, and so on
    assert ek.pool_frames(frames[:1], 2, 2, 1, backend=backend).tolist() == want
    # Finer than the picture: cells within a pixel are that pixel, one across two pixels is their mean.
    row = torch.tensor([0, 90], dtype=torch.uint8).view(1, 1, 2, 1)
    assert ek.pool_frames(row, 1, 3, 1, backend=backend).flatten().tolist() == [0, 45, 90]


def test_pool_frames_weighs_pixels_by_their_share(backend):
    # Cell 1 of 256 has 255 parts of pixel 1 and 2 of pixel 2.
    frames = torch.zeros((2, 257, 1, 1), dtype=torch.uint8)
    frames[:, 1] = 255
    for units in (1, 2):
        down = ek.pool_frames(frames, 256, 1, units, backend=backend)
        across = ek.pool_frames(frames.transpose(1, 2).contiguous(), 1, 256, units, backend=backend)
        assert down[0, 1].item() == across[0, 0, 1].item() == 253  # 255 * 255 / 257 = 253.02
        assert down[0, 0].item() == across[0, 0, 0].item() == 1  # 255 * 1 / 257


def test_pool_frames_rounds_half_up(backend):
    for total, mean in ((0, 0), (1, 0), (2, 1), (3, 1), (5, 1), (6, 2)):
        frames = torch.tensor([total, 0, 0, 0], dtype=torch.uint8).view(2, 2, 1, 1)
        assert ek.pool_frames(frames, 1, 1, backend=backend).item() == mean


def test_resize_patches_lays_out(backend):
    # Two frames of 2 x 4 pixels: tokens of 2 x 2 patches of one pixel.
    frames = torch.arange(2 * 2 * 4 * 2, dtype=torch.uint8).view(2, 2, 4, 2)
    rows = ek.resize_patches(frames, 2, 4, None, 2, 1, 2, backend=backend)
    first = [0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27]
    assert rows.tolist() == [first, [4 + value for value in first]]
    # Patches of 2 x 2 pixels, one frame in a unit, and the second token of the second unit.
    rows = ek.resize_patches(frames, 2, 4, torch.tensor([3]), 1, 2, 1, backend=backend)
    assert rows.tolist() == [[20, 22, 28, 30, 21, 23, 29, 31]]
    assert ek.resize_patches(frames, 2, 4, torch.empty(0, dtype=torch.int64), 1, 2, 1, backend=backend).shape == (0, 8)


def test_resize_patches_by_hand(backend):
    # Four values from two. Centres lie at 1/4, 3/4, 5/4, 7/4; the first sees 0 and 1 at distances 1/4 and 5/4:
    # 111/128 and -9/128, together 102/128. The second at 1/4 and 3/4: 111/128 and 29/128 of 140/128.
    # So 1 is worth round(2**14 * 111/102) there: 17830, with the largest below 2**15; and 200 becomes 218.
    frames = torch.tensor([200, 0], dtype=torch.uint8).view(1, 1, 2, 1)
    got = ek.resize_patches(frames, 1, 4, None, 1, 1, 1, backend=backend)
    assert got.flatten().tolist() == [218, 159, 41, 0]  # 200 * 111 / 140 = 158.6, 200 * 29 / 140 = 41.4


def test_resize_patches_by_hand_as_pillow_does(backend):
    # As above, with 2**22 parts of 1: 200 * 111 / 102 = 217.6.
    frames = torch.tensor([200, 0], dtype=torch.uint8).view(1, 1, 2, 1)
    got = ek.resize_patches(frames, 1, 4, None, 1, 1, 1, arithmetic="pillow", backend=backend)
    assert got.flatten().tolist() == [218, 159, 41, 0]


def test_place_blocks(backend):
    # Three blocks of two channels and 2 x 2 pixels in pictures of one row of two.
    blocks = torch.arange(24, dtype=torch.uint8).view(3, 8)
    levels = torch.stack([torch.arange(256), 1000 + torch.arange(256)]).float() / 2
    placed = ek.place_blocks(blocks, levels, 1, 2, backend=backend)
    assert (2 * placed[0, 0]).tolist() == [[0, 1, 8, 9], [2, 3, 10, 11]]
    assert (2 * placed[0, 1]).tolist() == [[1004, 1005, 1012, 1013], [1006, 1007, 1014, 1015]]
    assert (2 * placed[1]).tolist() == [[[16, 17, 0, 0], [18, 19, 0, 0]], [[1020, 1021, 0, 0], [1022, 1023, 0, 0]]]
    out = torch.full_like(placed, 7)
    assert ek.place_blocks(blocks, levels, 1, 2, out=out, backend=backend) is out and torch.equal(out, placed)
    # Bits stay as they are, those of a NaN too.
    odd = torch.full((2, 256), float("nan")).bfloat16()
    odd.view(torch.int16)[0, 5] = -3
    bits = ek.place_blocks(torch.full((1, 2), 5, dtype=torch.uint8), odd, 1, 1, backend=backend).view(torch.int16)
    assert bits.flatten().tolist() == odd[:, 5].view(torch.int16).tolist()


def test_int32_extremes(backend):
    low, high = -(2**31), 2**31 - 1
    scores = torch.tensor([[0, 0, 0, 0], [low, high, high - 1, low + 1]], dtype=torch.int32)
    assert kept(ek.select_topk(scores, 6, backend=backend))[0] == [0, 1, 2, 3, 5, 6]
    assert kept(ek.select_topk(scores, 7, backend=backend))[0] == [0, 1, 2, 3, 5, 6, 7]
    # 2**31 - 1.5 as a float64 lies between the two highest integers; as a float32 it would be 2**31.
    assert kept(ek.select_threshold(scores, high - 0.5, backend=backend))[0] == [0, 1, 2, 3, 5]
    assert kept(ek.select_threshold(scores, high, backend=backend))[0] == [0, 1, 2, 3, 5]
    assert kept(ek.select_threshold(scores, high + 1, backend=backend))[0] == [0, 1, 2, 3]
    assert kept(ek.select_threshold(scores, low - 1, backend=backend))[0] == list(range(8))
    assert kept(ek.select_threshold(scores, low + 1, backend=backend))[0] == [0, 1, 2, 3, 5, 6, 7]


def test_float_order(backend):
    inf = float("inf")
    scores = torch.tensor([[0.0] * 6, [-0.0, 0.0, -1.0, -inf, inf, -2.0]])
    for budget, want in ((7, [10]), (8, [6, 10]), (9, [6, 7, 10]), (10, [6, 7, 8, 10]), (11, [6, 7, 8, 10, 11])):
        assert kept(ek.select_topk(scores, budget, backend=backend))[0][6:] == want  # -0.0 ties with 0.0
    assert kept(ek.select_threshold(scores, 0.0, backend=backend))[0][6:] == [6, 7, 10]
    assert kept(ek.select_threshold(scores, -0.0, backend=backend))[0][6:] == [6, 7, 10]
    # 0.7 is rounded to float32 as the score was, so a score of 0.7 passes a threshold of 0.7.
    assert kept(ek.select_threshold(torch.tensor([[0.0], [0.7]]), 0.7, backend=backend))[0] == [0, 1]


def test_prune_topk(backend):
    clip = torch.tensor([[[0], [10], [20]], [[3], [10], [29]], [[4], [200], [29]]], dtype=torch.uint8)
    assert kept(ek.prune_topk(clip, 5, backend=backend)) == ([0, 1, 2, 5, 7], [3, 1, 1])
    assert kept(ek.prune_topk(clip, 6, min_per_unit=1, backend=backend)) == ([0, 1, 2, 3, 5, 7], [3, 2, 1])
