# SPDX-License-Identifier: Apache-2.0
"""Triton select_hold: what holding costs is summed up once, then every price is a launch; the bisection of prices stays
on the device.

A program owns some places. Of a block of units it holds in registers, for every place, what is best from each of them
on. The bisection is select_anchored's: its lower bound begins below price 0, as that one may fit.
"""

import torch
import triton
import triton.language as tl

from .. import _triton
from .._types import Selection, kept_tokens
from ..select_anchored._triton_kernels import (
    BLOCK,
    BOUND,
    HIGH,
    LEVEL,
    LOW,
    block_of,
    step_kernel,
    walk_kernel,
    weights_on,
)
from ..select_topk._triton_kernels import select_partial
from ._prices import UNITS, top_number

# Places of a program of one warp. There are few places, so more would leave most of a GPU idle.
PLACES = 8

BLOCK_UNITS = tl.constexpr(UNITS)
NEVER = tl.constexpr(2**31 - 1)  # above every cost, and every distance


@triton.jit
def distances(descriptors_ptr, this, that, place, per_unit, width, inside, PLACES: tl.constexpr, SLICE: tl.constexpr):
    """L1 distances of tokens of unit `this` from those of units `that`, which may differ from place to place."""
    total = tl.zeros([PLACES], tl.int32)
    this_row = descriptors_ptr + (this * per_unit.to(tl.int64) + place) * width
    that_row = descriptors_ptr + (that * per_unit.to(tl.int64) + place) * width
    for first in range(0, width, SLICE):
        value = first + tl.arange(0, SLICE)
        mask = inside[:, None] & (value < width)[None, :]
        a = tl.load(this_row[:, None] + value[None, :], mask=mask, other=0).to(tl.int32)
        b = tl.load(that_row[:, None] + value[None, :], mask=mask, other=0).to(tl.int32)
        total += tl.sum(tl.abs(a - b), axis=1)
    return total


@triton.jit
def row_of(start):
    """Where the sums of unit `start` of a block begin; a unit has one for each later unit."""
    return (start - 1) * (BLOCK_UNITS - 1) - (start - 1) * (start - 2) // 2


@triton.jit(do_not_specialize=["units", "per_unit"])
def sum_kernel(
    descriptors_ptr,
    weights_ptr,
    sums_ptr,
    units,
    per_unit,
    width,
    PLACES: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Writes what it costs to hold a unit up to each later one of its block, that one included."""
    unit = 1 + tl.program_id(0)  # of which there may be more than CUDA takes programs along its second axis
    block = (unit - 1) // BLOCK_UNITS
    before = block * BLOCK_UNITS
    place = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    inside = place < per_unit
    row = block.to(tl.int64) * (BLOCK_UNITS * (BLOCK_UNITS - 1) // 2) + row_of(unit - before)
    held = tl.zeros([PLACES], tl.int32)
    for t in range(unit + 1, tl.minimum(before + BLOCK_UNITS + 1, units)):
        far = distances(descriptors_ptr, t, unit, place, per_unit, width, inside, PLACES, SLICE)
        held += far * tl.load(weights_ptr + t)
        tl.store(sums_ptr + (row + t - unit - 1) * per_unit + place, held, mask=inside)


@triton.jit(do_not_specialize=["units", "per_unit"])
def price_kernel(
    descriptors_ptr,
    weights_ptr,
    sums_ptr,
    state_ptr,
    out_ptr,
    units,
    per_unit,
    width,
    WRITE: tl.constexpr,
    PLACES: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Adds what the price keeps to a count for each later unit or, with WRITE, marks it."""
    number = tl.load(state_ptr + LEVEL)
    # See _prices.price.
    paid = tl.where(number < 64, number, (64 + number % 64) << tl.maximum(number // 64 - 1, 0))
    # The number is the upper bound once the bisection is over: nothing left to count.
    stop = units if WRITE else tl.where(number == tl.load(state_ptr + HIGH), 1, units)
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    inside = place < per_unit
    row = tl.arange(0, BLOCK_UNITS)[:, None]
    anchors = tl.zeros([PLACES], tl.int32)
    block_sums_ptr = sums_ptr
    for before in range(0, stop - 1, BLOCK_UNITS):
        length = tl.minimum(BLOCK_UNITS, units - 1 - before)
        # Row r of `worth` is the lowest cost of unit r + 2 and what comes after it, if it is kept, and of what comes
        # after the last unit, nothing; row r of `following` is the next unit that is kept after unit r + 1.
        worth = tl.zeros([BLOCK_UNITS, PLACES], tl.int32)
        following = tl.zeros([BLOCK_UNITS, PLACES], tl.int32)
        cheapest = tl.zeros([PLACES], tl.int32)
        for back in range(0, length):
            start = length - back
            summed = (row > start - 1) & (row < length) & inside[None, :]
            at = (row_of(start) + row - start).to(tl.int64) * per_unit + place[None, :]
            cost = tl.load(block_sums_ptr + at, mask=summed, other=0) + worth
            possible = (row >= start - 1) & (row < length)
            cost = tl.where(possible, cost, NEVER)
            best = tl.min(cost, axis=0)
            latest = tl.max(tl.where(possible & (cost == best[None, :]), row, -1), axis=0)
            cheapest = best + paid
            following = tl.where(row == start - 1, latest[None, :] + 2, following)
            worth = tl.where(row == start - 2, cheapest[None, :], worth)
        # When the token that stands for the place before the block gives way.
        turn = tl.full([PLACES], 1, tl.int32)
        held = tl.zeros([PLACES], tl.int32)
        for unit in range(1, length + 1):
            far = distances(descriptors_ptr, before + unit, anchors, place, per_unit, width, inside, PLACES, SLICE)
            held += far * tl.load(weights_ptr + before + unit)
            cost = held + tl.sum(tl.where(row == unit - 1, worth, 0), axis=0)
            turn = tl.where(cost <= cheapest, unit + 1, turn)
            cheapest = tl.minimum(cost, cheapest)
        for unit in range(1, length + 1):
            kept = turn == unit
            turn = tl.where(kept, tl.sum(tl.where(row == unit - 1, following, 0), axis=0), turn)
            anchors = tl.where(kept, before + unit, anchors)
            if WRITE:
                at = (before + unit) * per_unit.to(tl.int64) + place
                tl.store(out_ptr + at, kept.to(tl.uint8), mask=inside)
            else:
                tl.atomic_add(out_ptr + before + unit - 1, tl.sum((kept & inside).to(tl.int32)))
        block_sums_ptr += per_unit.to(tl.int64) * (BLOCK_UNITS * (BLOCK_UNITS - 1) // 2)


def slice_of(width: int) -> int:
    """How many values of descriptors are compared at a time."""
    # Rows that do not start on 16 bytes are read byte by byte, each in a register of its own: take fewer.
    return 16 if width % 16 == 0 else 8


def run(descriptors: torch.Tensor, budget: int, min_per_unit: int, weights: torch.Tensor | None) -> Selection:
    """See evs_kernels.select_hold."""
    units, per_unit, width = descriptors.shape
    device = descriptors.device
    bound = kept_tokens(units, per_unit, budget, min_per_unit)
    top = top_number(width, 1 if weights is None else int(weights.max()))
    # Each filled by the device: a copy from memory that is not pinned may wait for what it is doing.
    state = torch.zeros(5, dtype=torch.int32, device=device)
    for place, value in ((LOW, -1), (HIGH, top), (BOUND, bound)):
        state[place.value].fill_(value)
    factors = weights_on(device, weights, units)
    rows = triton.cdiv(units - 1, UNITS) * (UNITS * (UNITS - 1) // 2)
    sums = torch.empty(max(1, rows * per_unit), dtype=torch.int32, device=device)
    counts = torch.zeros(units - 1, dtype=torch.int32, device=device)
    kept = torch.empty((units, per_unit), dtype=torch.uint8, device=device)
    scores = torch.empty((units, per_unit), dtype=torch.int32, device=device)
    clip, shape = (descriptors, factors, sums, state), (units, per_unit, width)
    flags = {"PLACES": PLACES, "SLICE": slice_of(width), "num_warps": 1}
    grid = (triton.cdiv(per_unit, PLACES),)
    with _triton.on_device(descriptors):
        if units > 1:
            sum_kernel[units - 1, *grid](descriptors, factors, sums, *shape, **flags)
            for _ in range(1 + (top - 1).bit_length()):
                price_kernel[grid](*clip, counts, *shape, WRITE=False, **flags)
                step_kernel[(1,)](state, counts, units - 1, per_unit, min_per_unit, BLOCK=BLOCK, num_warps=4)
            price_kernel[grid](*clip, kept, *shape, WRITE=True, **flags)
        places, block = block_of(width)
        state[LEVEL.value].fill_(NEVER.value)
        walk_kernel[(triton.cdiv(per_unit, places),)](
            descriptors,
            factors,
            kept,
            state,
            scores,
            *shape,
            FORCED=True,
            PER_UNIT_COUNTS=False,
            WRITE=True,
            PLACES=places,
            WIDTH=block,
            num_warps=1,
        )
        return select_partial(scores[None], bound, min_per_unit)
