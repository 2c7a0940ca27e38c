# SPDX-License-Identifier: Apache-2.0
"""Triton select_anchored: a program owns some places and walks over time; the bisection stays on the device."""

import torch
import triton
import triton.language as tl

from .. import _triton
from .._types import Selection, kept_tokens
from ..select_topk._triton_kernels import select_partial

# Bytes of one unit a program reads per time step: a 16-byte load for each thread of its single warp. There are few
# places, so a wider tile would leave most of a GPU idle (and spill registers).
TILE = 512
BLOCK = 1024

KEPT = tl.constexpr(2**31 - 1)  # above every distance

# int32 on the device: the level to walk at, the bisection's bounds (too low; not too low), how many tokens may be kept,
# and how many the first level keeps of these.
LEVEL, LOW, HIGH, BOUND, SIZE = (tl.constexpr(i) for i in range(5))


# Width is specialised on: where it is a multiple of 16, rows of bytes are read in wide loads.
@triton.jit(do_not_specialize=["units", "per_unit"])
def walk_kernel(
    descriptors_ptr,
    weights_ptr,
    forced_ptr,
    state_ptr,
    out_ptr,
    units,
    per_unit,
    width,
    FORCED: tl.constexpr,
    PER_UNIT_COUNTS: tl.constexpr,
    WRITE: tl.constexpr,
    PLACES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adds what the level keeps to one count or one for each later unit or, with WRITE, writes distances and KEPT."""
    level = tl.load(state_ptr + LEVEL)
    # The level is the upper bound once the bisection is over: nothing left to count.
    stop = units if WRITE else tl.where(level == tl.load(state_ptr + HIGH), 1, units)
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    inside = place < per_unit
    value = tl.arange(0, WIDTH)
    mask = inside[:, None] & (value < width)[None, :]
    row = descriptors_ptr + place[:, None].to(tl.int64) * width + value[None, :]
    unit = per_unit.to(tl.int64) * width
    anchors = tl.load(row, mask=mask, other=0)
    upcoming = tl.load(row + unit, mask=mask & (place < tl.where(units > 1, per_unit, 0))[:, None], other=0)
    found = tl.zeros([], tl.int32)
    if WRITE:
        tl.store(out_ptr + place, KEPT, mask=inside)
    for t in range(1, stop):
        values = upcoming
        # Under way before this unit's sum waits for its own.
        more = place < tl.where(t + 1 < units, per_unit, 0)
        upcoming = tl.load(row + (t + 1) * unit, mask=mask & more[:, None], other=0)
        difference = tl.abs(values.to(tl.int32) - anchors.to(tl.int32))
        distance = tl.sum(difference, axis=1) * tl.load(weights_ptr + t)
        kept = distance >= level
        at = t * per_unit.to(tl.int64) + place
        if FORCED:
            kept = kept | (tl.load(forced_ptr + at, mask=inside, other=0) != 0)
        anchors = tl.where(kept[:, None], values, anchors)
        if WRITE:
            tl.store(out_ptr + at, tl.where(kept, KEPT, distance), mask=inside)
        else:
            count = tl.sum((kept & inside).to(tl.int32))
            if PER_UNIT_COUNTS:
                tl.atomic_add(out_ptr + t - 1, count)
            else:
                found += count
    if not WRITE and not PER_UNIT_COUNTS:
        tl.atomic_add(out_ptr, found)


@triton.jit(do_not_specialize=["length", "per_unit", "min_per_unit"])
def step_kernel(state_ptr, counts_ptr, length, per_unit, min_per_unit, BLOCK: tl.constexpr):
    """Moves a bound to the level by what it costs, chooses the next level, and clears the counts."""
    cost = per_unit
    for first in range(0, length, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        inside = offsets < length
        count = tl.load(counts_ptr + offsets, mask=inside, other=0)
        cost += tl.sum(tl.where(inside, tl.maximum(count, min_per_unit), 0))
        tl.store(counts_ptr + offsets, 0, mask=inside)
    level, low, high = tl.load(state_ptr + LEVEL), tl.load(state_ptr + LOW), tl.load(state_ptr + HIGH)
    bound = tl.load(state_ptr + BOUND)
    # Only the first level is the lower bound below the upper.
    tl.store(state_ptr + SIZE, tl.minimum(cost, bound), mask=(level == low) & (low < high))
    # When all is decided, nothing was counted, the level is the upper bound, and both lines change nothing.
    too_low = cost > bound
    low, high = tl.where(too_low, level, low), tl.where(too_low, high, level)
    tl.store(state_ptr + LEVEL, tl.where(high - low > 1, (low + high) // 2, high))
    tl.store(state_ptr + LOW, low)
    tl.store(state_ptr + HIGH, high)


def block_of(width: int) -> tuple[int, int]:
    """How many places a program owns, and the power of two that holds a descriptor."""
    block = max(16, triton.next_power_of_2(width))
    # Rows that do not start on 16 bytes are read byte by byte, each in a register of its own: own fewer.
    return (TILE if width % 16 == 0 else TILE // 2) // block, block


def run(
    descriptors: torch.Tensor,
    budget: int | None,
    threshold: int | None,
    min_per_unit: int,
    weights: torch.Tensor | None,
    forced: torch.Tensor | None,
) -> Selection:
    """See evs_kernels.select_anchored."""
    units, per_unit, width = descriptors.shape
    device = descriptors.device
    top = 255 * width * (1 if weights is None else int(weights.max()))
    low = 1 if threshold is None else min(threshold, top + 1)
    high = max(low, top) + 1  # above `low`, even where no distance reaches that
    state = torch.full((5,), low, dtype=torch.int32, device=device)
    state[HIGH.value :].fill_(high)
    bound = units * per_unit if budget is None else kept_tokens(units, per_unit, budget, min_per_unit)
    state[BOUND.value :].fill_(bound)
    if budget is not None and forced is not None:
        least = per_unit + forced[1:].sum(dim=1).clamp(min=min_per_unit).sum()
        state[BOUND.value :].clamp_(min=least)
    counts = torch.zeros(units - 1 if min_per_unit else 1, dtype=torch.int32, device=device)
    scores = torch.empty((units, per_unit), dtype=torch.int32, device=device)
    places, block = block_of(width)
    grid = (triton.cdiv(per_unit, places),)
    clip = (
        descriptors,
        weights_on(device, weights, units),
        state if forced is None else forced.view(torch.uint8),
        state,
    )
    flags = {"FORCED": forced is not None, "PER_UNIT_COUNTS": min_per_unit > 0, "PLACES": places, "WIDTH": block}
    levels = 1 if budget is None else 1 + (high - low - 1).bit_length()
    with _triton.on_device(descriptors):
        for _ in range(levels):
            walk_kernel[grid](*clip, counts, units, per_unit, width, WRITE=False, **flags, num_warps=1)
            step_kernel[(1,)](state, counts, len(counts), per_unit, min_per_unit, BLOCK=BLOCK, num_warps=4)
        walk_kernel[grid](*clip, scores, units, per_unit, width, WRITE=True, **flags, num_warps=1)
        if threshold is not None:
            bound = int(state[SIZE.value])
        elif forced is not None:
            bound = int(state[BOUND.value])
        return select_partial(scores[None], bound, min_per_unit)


def weights_on(device: torch.device, weights: torch.Tensor | None, units: int) -> torch.Tensor:
    """Weights of units, 1 each when None, on a device, without waiting for it."""
    if weights is None:
        return torch.ones(units, dtype=torch.int32, device=device)
    return _triton.upload(weights, device)
