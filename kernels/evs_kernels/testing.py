# SPDX-License-Identifier: Apache-2.0
"""One table of ops: how to make inputs, which shapes and dtypes, how close is equal. Tests and benchmark read it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import (
    cosine_score,
    place_blocks,
    pool_frames,
    pool_tokens,
    prune_topk,
    resize_patches,
    select_anchored,
    select_hold,
    select_threshold,
    select_topk,
    temporal_score,
)

TOLERANCE = {
    torch.float32: (1e-5, 2e-6),  # a sum of up to 10k float32 terms, in any order
}
"""(rtol, atol) by dtype of the result; a dtype that is not listed must be equal bit for bit."""

Shape = tuple[int, ...]


class Call(NamedTuple):
    """Arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class OpSpec:
    """What tests and benchmarks need to know about an op.

    Attributes:
        name: the op, as in evs_kernels.OPS.
        op: its public function.
        calls: (generator, dtype, shape) -> calls worth comparing.
        dtypes: of the first argument.
        shapes: of the first argument; odd sizes and ones on purpose.
        large_shapes: too slow for Triton's interpreter.
    """

    name: str
    op: Callable[..., Any]
    calls: Callable[[torch.Generator, torch.dtype, Shape], Iterator[Call]]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[Shape, ...]
    large_shapes: tuple[Shape, ...] = ()


def assert_same(got: Any, want: Any) -> None:
    """Compares two results of an op: shapes and dtypes, integers exactly, floats within TOLERANCE.

    Raises:
        AssertionError: they differ.
    """
    if isinstance(want, tuple):
        assert len(got) == len(want)
        for mine, theirs in zip(got, want, strict=True):
            assert_same(mine, theirs)
        return
    rtol, atol = TOLERANCE.get(want.dtype, (0.0, 0.0))
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True)


def random_tensor(generator: torch.Generator, dtype: torch.dtype, shape: Shape) -> torch.Tensor:
    """Random values: all bytes for uint8, few distinct values (ties) for integers, normal for floats."""
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    high = 256 if dtype == torch.uint8 else 2 if dtype == torch.bool else 7
    low = -3 if dtype.is_signed else 0
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def random_clip(generator: torch.Generator, dtype: torch.dtype, shape: Shape) -> torch.Tensor:
    """A clip with unchanged tokens in it; small integers, so that every order of summing gives the same float."""
    clip = torch.randint(0, 256, shape, generator=generator)
    for unit in range(1, shape[0]):
        still = torch.rand(shape[1], generator=generator) < 0.5
        clip[unit, still] = clip[unit - 1, still]
    return clip.to(dtype)


def _one(generator: torch.Generator, dtype: torch.dtype, shape: Shape) -> Iterator[Call]:
    yield Call((random_tensor(generator, dtype, shape),), {})


def _budgets(shape: Shape) -> Iterator[tuple[int, int]]:
    """(budget, min_per_unit): below the floor, between, everything, more than everything."""
    units, places = shape[:2]
    tokens = units * places
    yield from ((0, 0), (tokens, 0), (tokens + 3, places + 2), ((tokens + places) // 2, 0))
    yield from ((places - 1, 1), (tokens // 2, 2))


def _topk(generator: torch.Generator, dtype: torch.dtype, shape: Shape) -> Iterator[Call]:
    scores = random_tensor(generator, dtype, shape)
    for budget, reserved in _budgets(shape):
        yield Call((scores, budget), {"min_per_unit": reserved})
    yield Call((torch.full_like(scores, 5), (scores.numel() + shape[1]) // 2), {"min_per_unit": 1})


def _threshold(generator: torch.Generator, dtype: torch.dtype, shape: Shape) -> Iterator[Call]:
    scores = random_tensor(generator, dtype, shape)
    for threshold, reserved, cap in ((0, 0, None), (0.5, 2, None), (-1.5, 1, scores.numel() // 2), (99, 1, 0)):
        yield Call((scores, threshold), {"min_per_unit": reserved, "max_tokens": cap})


def _prune(generator: torch.Generator, dtype: torch.dtype, shape: Shape) -> Iterator[Call]:
    clip = random_clip(generator, dtype, shape)
    for budget, reserved in _budgets(shape):
        yield Call((clip, budget), {"min_per_unit": reserved})


def _anchored(generator: torch.Generator, dtype: torch.dtype, shape: Shape) -> Iterator[Call]:
    clip = random_clip(generator, dtype, shape)
    units, places, width = shape
    tokens = units * places
    forced = torch.rand((units, places), generator=generator) < 0.2
    weights = torch.randint(0, 4097, (units,), generator=generator).to(torch.int32)
    for budget, reserved in _budgets(shape):
        yield Call((clip, budget), {"min_per_unit": reserved})
    for given in ({}, {"forced": forced}, {"weights": weights}, {"forced": forced, "weights": weights}):
        yield Call((clip, (tokens + places) // 2), {"min_per_unit": 1, **given})
    for threshold in (1, 60 * width, 255 * width, 255 * width + 9):
        yield Call((clip,), {"threshold": threshold, "min_per_unit": 2})
        yield Call((clip, tokens // 2), {"threshold": threshold, "forced": forced})
    yield Call((clip, (tokens + places) // 2), {"weights": torch.zeros_like(weights)})
    # Noise: distances are all about the same, so one level more or less changes much.
    yield Call((random_tensor(generator, dtype, shape), (tokens + places) // 2), {})


def _hold(generator: torch.Generator, dtype: torch.dtype, shape: Shape) -> Iterator[Call]:
    clip = random_clip(generator, dtype, shape)
    units, places, width = shape
    half = (units * places + places) // 2
    top = min(4096, 2**24 // (255 * width))
    weights = torch.randint(0, top + 1, (units,), generator=generator).to(torch.int32)
    for budget, reserved in ((0, 0), (units * places + 3, places + 2), (places - 1, 1), (half, 2)):
        yield Call((clip, budget), {"min_per_unit": reserved})
    for factors in (weights, torch.full_like(weights, top), torch.zeros_like(weights)):
        yield Call((clip, half), {"weights": factors})
    # Noise: holding costs all about the same, so one price more or less changes much.
    yield Call((random_tensor(generator, dtype, shape), half), {})


def _pool(generator: torch.Generator, dtype: torch.dtype, shape: Shape) -> Iterator[Call]:
    tokens = random_tensor(generator, dtype, shape)
    layout = merge, _, _, side = _LAYOUTS[shape[2]]
    for cells in sorted({1, 2, 4, 5, side, merge * side} & set(range(merge * side + 1))):
        yield Call((tokens, *layout, cells), {})
    yield Call((torch.full_like(tokens, 255), *layout, 1), {})


def _pool_frames(generator: torch.Generator, dtype: torch.dtype, shape: Shape) -> Iterator[Call]:
    frames = random_tensor(generator, dtype, shape)
    height, width = shape[1:3]
    for rows, columns in ((1, 1), (min(2 * height + 1, 9), 3), (height, width), (4, min(3 * width, 7))):
        yield Call((frames, min(rows, 24), min(columns, 24)), {"unit_frames": 1 + rows % 3})
    yield Call((torch.full_like(frames, 255), 2, 5), {})


def _resize(generator: torch.Generator, dtype: torch.dtype, shape: Shape) -> Iterator[Call]:
    # Extremes beside each other are what a cubic kernel overshoots at.
    frames = random_tensor(generator, dtype, shape)
    frames = torch.where(torch.rand(shape, generator=generator) < 0.5, frames, frames // 128 * 255)
    height, width = shape[1:3]
    for merge, side, unit_frames in ((2, 3, 1), (1, 17, 3), (2, 14, 2)):
        size = merge * side
        larger, near = (size, 2 * size), (-(-height // size) * size, max(1, width // (2 * size)) * size)
        for rows, columns in (larger, near):
            total = -(-len(frames) // unit_frames) * (rows // size) * (columns // size)
            some = (torch.rand(total, generator=generator) < 0.4).nonzero().flatten()
            tokens = None if total < 9 else some
            sides = {"merge": merge, "side": side, "unit_frames": unit_frames}
            for arithmetic in ("torch", "pillow"):
                yield Call((frames, rows, columns), {"tokens": tokens, "arithmetic": arithmetic, **sides})
    # Pixels of their own size, one by one.
    yield Call((frames, height, min(width, 9)), {"tokens": torch.tensor([0]), "merge": 1, "side": 1})


def _place(generator: torch.Generator, dtype: torch.dtype, shape: Shape) -> Iterator[Call]:
    count, channels, side = shape
    blocks = random_tensor(generator, dtype, (count, channels * side**2))
    for levels in (torch.float32, torch.bfloat16, torch.float16, torch.uint8):
        table = random_tensor(generator, levels, (channels, 256))
        for rows, columns in ((1, 1), (2, 3), (4, 1), (1, 5)):
            yield Call((blocks, table, rows, columns), {})


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CLIPS = ((1, 1, 1), (2, 1, 5), (1, 7, 3), (6, 5, 33), (4, 3, 272), (3, 2, 1200))
_DESCRIPTORS = ((1, 1, 1), (2, 1, 5), (1, 7, 3), (3, 5, 33), (4, 19, 12), (2, 2, 256))
_LONG = ((33, 131, 12), (34, 7, 256), (66, 3, 48), (3, 600, 4))
_LAYOUTS = {
    merge**2 * channels * frames * side**2: (merge, channels, frames, side)
    for merge, channels, frames, side in (
        (1, 1, 1, 1),
        (2, 3, 1, 5),
        (3, 1, 2, 8),
        (1, 2, 3, 17),
        (1, 3, 1, 28),
        (2, 3, 2, 14),
        (2, 3, 2, 16),
    )
}
"""What the pixels of a token are, by how many: (merge, channels, frames, side)."""
_PIXELS = ((1, 1, 1), (3, 1, 300), (1, 2, 1152), (2, 1, 1734))
_FRAMES = ((1, 1, 1, 1), (3, 5, 7, 3), (2, 17, 12, 3), (3, 9, 31, 4))
_LARGE_FRAMES = ((5, 180, 313, 3), (2, 61, 120, 5), (3, 56, 84, 3), (2, 300, 1, 3), (2, 1, 300, 3))
_BLOCKS = ((1, 1, 1), (5, 3, 2), (12, 3, 7), (7, 2, 17))
"""Blocks, channels, and pixels along a side of a block."""
_SCORES = ((1, 1), (1, 9), (4, 1), (2, 3), (3, 13))

SPECS = (
    OpSpec("temporal_score", temporal_score, _one, (torch.uint8, *_FLOATS), _CLIPS, ((9, 131, 1176), (5, 67, 4704))),
    OpSpec("cosine_score", cosine_score, _one, _FLOATS, _CLIPS, ((9, 131, 1024), (3, 67, 3584))),
    OpSpec("select_topk", select_topk, _topk, (torch.int32, torch.float32), _SCORES, ((33, 650), (3, 9001))),
    OpSpec("select_threshold", select_threshold, _threshold, (torch.int32, torch.float32), _SCORES, ((33, 650),)),
    OpSpec("select_anchored", select_anchored, _anchored, (torch.uint8,), _DESCRIPTORS, ((33, 131, 48), (9, 67, 192))),
    OpSpec("select_hold", select_hold, _hold, (torch.uint8,), _DESCRIPTORS, _LONG),
    OpSpec("prune_topk", prune_topk, _prune, (torch.uint8, torch.float32), _CLIPS, ((9, 131, 1176),)),
    OpSpec("pool_tokens", pool_tokens, _pool, (torch.uint8,), _PIXELS, ((5, 67, 4704), (3, 41, 6144), (4, 33, 2352))),
    OpSpec("pool_frames", pool_frames, _pool_frames, (torch.uint8,), _FRAMES, _LARGE_FRAMES),
    OpSpec("resize_patches", resize_patches, _resize, (torch.uint8,), _FRAMES, _LARGE_FRAMES),
    OpSpec("place_blocks", place_blocks, _place, (torch.uint8,), _BLOCKS, ((37, 3, 28), (50, 3, 14))),
)
"""One row per op of evs_kernels.OPS."""
