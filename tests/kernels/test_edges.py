# SPDX-License-Identifier: Apache-2.0
"""What the contract refuses, and how it says so."""

import pytest
import torch

import evs_kernels as ek
from evs_kernels import _dispatch, _validate
from evs_kernels.select_hold._prices import UNITS, price, top_number

CLIP = torch.zeros((2, 3, 4), dtype=torch.uint8)
SCORES = torch.zeros((2, 3), dtype=torch.int32)
PIXELS = torch.zeros((2, 3, 192), dtype=torch.uint8)
LEVELS = torch.zeros((3, 256))
WEIGHTS = torch.tensor([0, 4096], dtype=torch.int32)
ROWS = torch.zeros((3, 4))
FRAMES = torch.zeros((3, 20, 30, 3), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ek.temporal_score([1]), TypeError, "tokens: got list"),
        (lambda: ek.temporal_score(CLIP[0]), ValueError, r"tokens: got shape \(3, 4\); allowed: \(T, P, D\)"),
        (lambda: ek.temporal_score(CLIP[:0]), ValueError, "every dimension >= 1"),
        (lambda: ek.temporal_score(CLIP[..., :0]), ValueError, "every dimension >= 1"),
        (lambda: ek.temporal_score(CLIP.int()), TypeError, "dtype torch.int32"),
        (lambda: ek.temporal_score(CLIP.transpose(0, 1)), ValueError, "contiguous"),
        (lambda: ek.temporal_score(CLIP[..., ::2]), ValueError, "contiguous"),
        (lambda: ek.temporal_score(CLIP, backend="cuda"), ValueError, "backend: got 'cuda'; allowed: auto, ref"),
        (lambda: ek.cosine_score(CLIP), TypeError, "features: got dtype torch.uint8"),
        (lambda: ek.select_topk(SCORES.long(), 3), TypeError, "scores: got dtype torch.int64"),
        (lambda: ek.select_topk(SCORES[0], 3), ValueError, "scores: got shape"),
        (lambda: ek.select_topk(SCORES.t(), 3), ValueError, "contiguous"),
        (lambda: ek.select_topk(SCORES, 3.5), TypeError, "budget: got 3.5"),
        (lambda: ek.select_topk(SCORES, -1), ValueError, "budget: got -1"),
        (lambda: ek.select_topk(SCORES, 3, min_per_unit=-1), ValueError, "min_per_unit: got -1"),
        (lambda: ek.select_topk(SCORES.float().log().sub(torch.inf).mul(0), 3), ValueError, "scores: got NaN"),
        (lambda: ek.select_threshold(SCORES, float("nan")), ValueError, "threshold: got NaN"),
        (lambda: ek.select_threshold(SCORES, "3"), TypeError, "threshold: got '3'"),
        (lambda: ek.select_threshold(SCORES, 1, max_tokens=-1), ValueError, "max_tokens: got -1"),
        (
            lambda: ek.select_anchored(CLIP.int(), 3),
            TypeError,
            "descriptors: got dtype torch.int32; allowed: torch.uint8",
        ),
        (lambda: ek.select_anchored(CLIP[0], 3), ValueError, r"descriptors: got shape \(3, 4\); allowed: \(T, P, F\)"),
        (lambda: ek.select_anchored(CLIP[..., ::2], 3), ValueError, "contiguous"),
        (lambda: ek.select_anchored(CLIP.repeat(1, 1, 65), 3), ValueError, "got F=260; allowed: F <= 256"),
        (lambda: ek.select_anchored(CLIP), ValueError, "budget: got None without a threshold"),
        (lambda: ek.select_anchored(CLIP, -1), ValueError, "budget: got -1"),
        (lambda: ek.select_anchored(CLIP, 1, threshold=0), ValueError, "threshold: got 0; allowed: an integer >= 1"),
        (lambda: ek.select_anchored(CLIP, threshold=1.5), TypeError, "threshold: got 1.5; allowed: an integer >= 1"),
        (lambda: ek.select_anchored(CLIP, 1, min_per_unit=-1), ValueError, "min_per_unit: got -1"),
        (lambda: ek.select_anchored(CLIP, 1, weights=[1, 1]), TypeError, "weights: got list"),
        (lambda: ek.select_anchored(CLIP, 1, weights=WEIGHTS.long()), TypeError, "weights: got dtype torch.int64"),
        (lambda: ek.select_anchored(CLIP, 1, weights=WEIGHTS[:1]), ValueError, "weights: got 1 of them; allowed: 2"),
        (lambda: ek.select_anchored(CLIP, 1, weights=WEIGHTS - 1), ValueError, "from -1 to 4095; allowed: 0 to 4096"),
        (lambda: ek.select_anchored(CLIP, 1, weights=WEIGHTS + 1), ValueError, "from 1 to 4097; allowed: 0 to 4096"),
        (lambda: ek.select_anchored(CLIP, 1, weights=WEIGHTS.to("meta")), ValueError, "weights: got device meta"),
        (lambda: ek.select_anchored(CLIP, 1, forced=SCORES), TypeError, "forced: got dtype torch.int32"),
        (lambda: ek.select_anchored(CLIP, 1, forced=SCORES[:1].bool()), ValueError, r"forced: got shape \(1, 3\)"),
        (lambda: ek.select_anchored(CLIP, 1, forced=SCORES.bool().to("meta")), ValueError, "forced: got device meta"),
        (lambda: ek.select_hold(CLIP.int(), 3), TypeError, "descriptors: got dtype torch.int32; allowed: torch.uint8"),
        (lambda: ek.select_hold(CLIP[0], 3), ValueError, r"descriptors: got shape \(3, 4\); allowed: \(T, P, F\)"),
        (lambda: ek.select_hold(CLIP[..., ::2], 3), ValueError, "contiguous"),
        (lambda: ek.select_hold(CLIP.repeat(1, 1, 65), 3), ValueError, "got F=260; allowed: F <= 256"),
        (lambda: ek.select_hold(CLIP, None), TypeError, "budget: got None; allowed: an integer >= 0"),
        (lambda: ek.select_hold(CLIP, -1), ValueError, "budget: got -1"),
        (lambda: ek.select_hold(CLIP, 1, min_per_unit=-1), ValueError, "min_per_unit: got -1"),
        (lambda: ek.select_hold(CLIP, 1, weights=[1, 1]), TypeError, "weights: got list"),
        (lambda: ek.select_hold(CLIP, 1, weights=WEIGHTS.long()), TypeError, "weights: got dtype torch.int64"),
        (lambda: ek.select_hold(CLIP, 1, weights=WEIGHTS[:1]), ValueError, "weights: got 1 of them; allowed: 2"),
        (lambda: ek.select_hold(CLIP, 1, weights=WEIGHTS - 1), ValueError, "from -1 to 4095; allowed: 0 to 4096"),
        (lambda: ek.select_hold(CLIP, 1, weights=WEIGHTS + 1), ValueError, "from 1 to 4097; allowed: 0 to 4096"),
        (lambda: ek.select_hold(CLIP, 1, weights=WEIGHTS.to("meta")), ValueError, "weights: got device meta"),
        (
            lambda: ek.select_hold(CLIP.repeat(1, 1, 64), 1, weights=WEIGHTS),
            ValueError,
            "weights: got 4096; allowed: 0 to 257 for descriptors of 256 values. Scale them down.",
        ),
        (lambda: ek.pool_tokens(PIXELS.float(), 2, 3, 1, 4), TypeError, "tokens: got dtype torch.float32"),
        (
            lambda: ek.pool_tokens(PIXELS[0], 2, 3, 1, 4),
            ValueError,
            r"tokens: got shape \(3, 192\); allowed: \(T, P, D\)",
        ),
        (lambda: ek.pool_tokens(PIXELS[..., ::2], 1, 6, 1, 4), ValueError, "contiguous"),
        (lambda: ek.pool_tokens(PIXELS, 2, 3, 2, 4), ValueError, "tokens: got D=192; allowed: 384 = merge"),
        (lambda: ek.pool_tokens(PIXELS, 0, 3, 1, 4), ValueError, "merge: got 0; allowed: an integer >= 1"),
        (lambda: ek.pool_tokens(PIXELS, 2, 0, 1, 4), ValueError, "channels: got 0; allowed: an integer >= 1"),
        (lambda: ek.pool_tokens(PIXELS, 2, 3, 0, 4), ValueError, "frames: got 0; allowed: an integer >= 1"),
        (lambda: ek.pool_tokens(PIXELS, 2, 3, 1, 4.0), TypeError, "side: got 4.0; allowed: an integer >= 1"),
        (lambda: ek.pool_tokens(PIXELS, 2, 3, 1, 4, 0), ValueError, "cells: got 0; allowed: an integer >= 1"),
        (lambda: ek.pool_tokens(PIXELS, 2, 3, 1, 4, 9), ValueError, "cells: got 9; allowed: 1 to 8"),
        (
            lambda: ek.pool_frames(FRAMES[0], 2, 2),
            ValueError,
            r"frames: got shape \(20, 30, 3\); allowed: \(F, H, W, C\)",
        ),
        (lambda: ek.pool_frames(FRAMES.float(), 2, 2), TypeError, "frames: got dtype torch.float32"),
        (lambda: ek.pool_frames(FRAMES.transpose(1, 2), 2, 2), ValueError, "contiguous"),
        (lambda: ek.pool_frames(FRAMES[:0], 2, 2), ValueError, "every dimension >= 1"),
        (lambda: ek.pool_frames(FRAMES, 0, 2), ValueError, "rows: got 0; allowed: an integer >= 1"),
        (lambda: ek.pool_frames(FRAMES, 2, 7681), ValueError, "columns: got 7681; allowed: 1 to 7680"),
        (lambda: ek.pool_frames(FRAMES, 2, 2, 0), ValueError, "unit_frames: got 0; allowed: an integer >= 1"),
        (lambda: ek.pool_frames(FRAMES, 2, 2, 2**32), ValueError, "unit_frames: got 7730941132800 values in a unit"),
        (lambda: ek.resize_patches(FRAMES[0], 28, 28, None, 2, 14), ValueError, "frames: got shape"),
        (lambda: ek.resize_patches(FRAMES.int(), 28, 28, None, 2, 14), TypeError, "frames: got dtype torch.int32"),
        (
            lambda: ek.resize_patches(FRAMES, 27, 28, None, 2, 14),
            ValueError,
            "height: got 27; allowed: multiples of 28",
        ),
        (lambda: ek.resize_patches(FRAMES, 28, 0, None, 2, 14), ValueError, "width: got 0; allowed: an integer >= 1"),
        (lambda: ek.resize_patches(FRAMES, 28, 28, None, 0, 14), ValueError, "merge: got 0"),
        (lambda: ek.resize_patches(FRAMES, 28, 28, None, 2, 1.5), TypeError, "side: got 1.5"),
        (lambda: ek.resize_patches(FRAMES, 28, 28, [0], 2, 14), TypeError, "tokens: got list"),
        (lambda: ek.resize_patches(FRAMES, 28, 28, WEIGHTS, 2, 14), TypeError, "tokens: got dtype torch.int32"),
        (
            lambda: ek.resize_patches(FRAMES, 28, 28, WEIGHTS.long(), 2, 14),
            ValueError,
            "from 0 to 4096; allowed: 0 to 1",
        ),
        (lambda: ek.resize_patches(FRAMES, 28, 28, WEIGHTS.long() - 1, 2, 14), ValueError, "from -1 to 4095"),
        (
            lambda: ek.resize_patches(FRAMES, 28, 28, torch.tensor([1, 1]), 2, 14),
            ValueError,
            "tokens: got indices that do not ascend; allowed: strictly ascending",
        ),
        (
            lambda: ek.resize_patches(FRAMES, 28, 28, WEIGHTS.long().to("meta"), 2, 14),
            ValueError,
            "tokens: got device meta; allowed: cpu",
        ),
        (lambda: ek.place_blocks(PIXELS[0].float(), LEVELS, 1, 1), TypeError, "blocks: got dtype torch.float32"),
        (lambda: ek.place_blocks(PIXELS[0], LEVELS.double(), 1, 1), TypeError, "levels: got dtype torch.float64"),
        (
            lambda: ek.place_blocks(PIXELS[0], torch.zeros(3, 255), 1, 1),
            ValueError,
            "levels: got shape .3, 255.",
        ),
        (lambda: ek.place_blocks(PIXELS[0], LEVELS.to("meta"), 1, 1), ValueError, "levels: got device meta"),
        (lambda: ek.place_blocks(PIXELS[0, :, :190].contiguous(), LEVELS, 1, 1), ValueError, "blocks: got D=190"),
        (lambda: ek.place_blocks(PIXELS[0], LEVELS, 0, 1), ValueError, "rows: got 0"),
        (lambda: ek.place_blocks(PIXELS[0], LEVELS, 1, 1.5), TypeError, "columns: got 1.5"),
        (
            lambda: ek.place_blocks(PIXELS[0], LEVELS, 1, 1, out=torch.zeros(3, 3, 8, 9)),
            ValueError,
            "out: got shape .3, 3, 8, 9. on cpu; allowed: .3, 3, 8, 8. on cpu",
        ),
        (
            lambda: ek.place_blocks(PIXELS[0], LEVELS, 1, 1, out=torch.zeros(3, 3, 8, 8).half()),
            TypeError,
            "out: got dtype torch.float16",
        ),
        (lambda: ek.resize_patches(FRAMES, 28, 28 * 2**26, None, 2, 14), ValueError, "height, width: got 28 x"),
        (lambda: ek.prune_topk(torch.full((2, 1, 1), torch.nan), 1), ValueError, "scores: got NaN"),
        (lambda: ek.supported("score", "cpu", "cpu"), ValueError, "op: got 'score'"),
    ],
)
def test_refuses(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_refuses_depth_whose_score_could_overflow():
    depth = _validate.MAX_UINT8_DEPTH
    assert depth * 255 <= 2**31 - 1 < (depth + 1) * 255
    with pytest.raises(ValueError, match="cannot overflow"):
        ek.temporal_score(torch.zeros((1, 1, depth + 1), dtype=torch.uint8))


def test_refuses_tokens_whose_sum_could_overflow():
    pixels = _validate.MAX_PIXELS
    assert 2 * 255 * pixels + pixels <= 2**31 - 1
    with pytest.raises(ValueError, match=f"tokens: got D={pixels + 1}; allowed: D <= {pixels}"):
        ek.pool_tokens(torch.zeros((1, 1, pixels + 1), dtype=torch.uint8), 1, pixels + 1, 1, 1, 1)


@pytest.mark.parametrize("width", [1, 16, 17, 256])
def test_no_cost_of_holding_can_overflow(width):
    highest = min(_validate.MAX_WEIGHT, _validate.MAX_HOLD // (255 * width))
    _validate.hold_weights("weights", torch.tensor([highest], dtype=torch.int32), 1, width)
    if highest < _validate.MAX_WEIGHT:
        with pytest.raises(ValueError, match=f"weights: got {highest + 1}; allowed: 0 to {highest} for"):
            _validate.hold_weights("weights", torch.tensor([highest + 1], dtype=torch.int32), 1, width)
    top = top_number(width, highest)
    most = 255 * width * UNITS * highest
    assert price(top - 1) <= most < price(top)
    # What is held, what the rest of the block costs at most, and a price.
    assert 2 * most + price(top) <= 2**31 - 1


@pytest.mark.parametrize("backend", ["ref", "cpu"])
def test_largest_cost_of_holding_is_exact(backend):
    clip = torch.zeros((33, 2, 256), dtype=torch.uint8)
    clip[1:, 0], clip[32, 1, 0] = 255, 1
    weights = torch.full((33,), 257, dtype=torch.int32)
    assert ek.select_hold(clip, 2, weights=weights, backend=backend).indices.tolist() == [0, 1]
    assert ek.select_hold(clip, 3, weights=weights, backend=backend).indices.tolist() == [0, 1, 2]


def test_prices_grow_by_a_64th():
    prices = [price(number) for number in range(1500)]
    assert (
        prices[:128] == list(range(128)) and prices[128:131] == [128, 130, 132] and prices[191:194] == [254, 256, 260]
    )
    assert all(a < b <= a + max(1, a // 64) for a, b in zip(prices, prices[1:], strict=False))


@pytest.mark.parametrize("frames", [1, 2, 257, 258, 700])
@pytest.mark.parametrize("backend", ["ref", "cpu"])
def test_pixels_of_many_frames_do_not_wrap(backend, frames):
    # The sum of a column over 257 frames is the largest that fits 16 bits.
    tokens = torch.full((1, 2, frames * 64), 255, dtype=torch.uint8)
    assert (ek.pool_tokens(tokens, 1, 1, frames, 8, 8, backend=backend) == 255).all()


@pytest.mark.parametrize(
    "shape", [(2, 300, 1, 1), (1, 70_000, 1, 1), (1, 1, 70_000, 3), (3, 129, 3, 2), (700, 1, 1, 1)]
)
def test_frames_of_many_rows_do_not_wrap(shape, generator):
    """As many rows as 16-bit and 32-bit sums hold, and more; in one cell, and in cells that end inside of pixels."""
    for frames in (torch.full(shape, 255, dtype=torch.uint8), torch.randint(0, 256, shape, generator=generator)):
        frames = frames.to(torch.uint8)
        for rows, columns in ((1, 1), (3, 1), (1, 7)):
            got, want = (ek.pool_frames(frames, rows, columns, shape[0], backend=b) for b in ("cpu", "ref"))
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["ref", "cpu"])
def test_largest_uint8_score_is_exact(backend):
    depth = _validate.MAX_UINT8_DEPTH
    clip = torch.zeros((2, 1, depth), dtype=torch.uint8)
    clip[1] = 255
    assert ek.temporal_score(clip, backend=backend).tolist() == [[0], [depth * 255]]


@pytest.mark.parametrize("backend", ["ref", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nan_and_infinite_tokens_show_in_their_score_only(backend, dtype):
    clip = torch.zeros((2, 3, 40), dtype=dtype)
    clip[1, 0, 17], clip[1, 1, 3] = torch.nan, torch.inf
    scores = ek.temporal_score(clip, backend=backend)
    assert scores[1, 0].isnan() and scores[1, 1] == torch.inf and scores[1, 2] == 0


def test_nan_is_not_looked_for_on_other_devices():
    _validate.clip_scores(torch.empty((2, 2), device="meta"))


def test_backend_variable(monkeypatch):
    monkeypatch.setenv("EVS_KERNELS_BACKEND", "ref")
    device = torch.device("cpu")
    assert _dispatch.implementation("select_topk", "auto", device).__module__.endswith("select_topk._ref")
    # An argument wins over the variable.
    assert _dispatch.implementation("select_topk", "cpu", device).__module__.endswith("select_topk._cpu")
    monkeypatch.setenv("EVS_KERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match="EVS_KERNELS_BACKEND: got 'gpu'; allowed: auto"):
        ek.select_topk(SCORES, 3)
    monkeypatch.setenv("EVS_KERNELS_BACKEND", "")
    assert _dispatch.implementation("select_topk", "auto", device).__module__.endswith("select_topk._cpu")


def test_supported_gives_reasons():
    for op in ek.OPS:
        assert ek.supported(op, "ref", "cuda") == (True, "")
        assert ek.supported(op, "cpu", "cpu") == (True, "")
        ok, reason = ek.supported(op, "cpu", "cuda:1")
        assert not ok and "host memory" in reason
        ok, reason = ek.supported(op, "triton", "meta")
        assert not ok and reason
    with pytest.raises(ValueError, match="host memory"):
        _dispatch.implementation("select_topk", "cpu", torch.device("cuda"))
