# SPDX-License-Identifier: Apache-2.0
"""Triton select_stale: a program owns one place and walks over time; the bisection stays on the device."""

import torch
import triton
import triton.language as tl

from .. import _triton
from ._sample import SAMPLE

BLOCK = 1024


# Width is specialised on: it is a multiple of 16, which makes the loads of the bytes wide.
@triton.jit(do_not_specialize=["units", "per_unit"])
def scan_kernel(
    packed_ptr,
    stays_ptr,
    bounds_ptr,
    found_ptr,
    stale_ptr,
    units,
    per_unit,
    width,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts what is stale at the level in the middle of the bounds or, with WRITE, marks it at the upper one."""
    place = tl.program_id(0).to(tl.int64)
    low, high = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
    level = high if WRITE else (low + high) // 2
    wide = width.to(tl.int64)
    clip = packed_ptr + place * units * wide
    last = tl.zeros([], tl.int32)
    found = tl.zeros([], tl.int32)
    for t in range(1, units):
        total = tl.zeros([], tl.int32)
        for first in range(0, width, BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            a = tl.load(clip + t * wide + offsets, mask=offsets < width, other=0).to(tl.int32)
            b = tl.load(clip + last * wide + offsets, mask=offsets < width, other=0).to(tl.int32)
            total += tl.sum(tl.abs(a - b))
        at = t * per_unit.to(tl.int64) + place
        stays = tl.load(stays_ptr + at) != 0
        stale = (total >= level) & (stays == 0)
        if WRITE:
            tl.store(stale_ptr + at, stale.to(tl.uint8))
        found += stale.to(tl.int32)
        last = tl.where(stale | stays, t, last)
    if not WRITE:
        tl.atomic_add(found_ptr, found)


@triton.jit(do_not_specialize=["budget"])
def step_kernel(bounds_ptr, found_ptr, budget):
    """Halves the bounds by what was found in their middle."""
    low, high = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
    middle = (low + high) // 2
    too_many = tl.load(found_ptr) > budget
    undecided = high - low > 1
    tl.store(bounds_ptr, tl.where(undecided & too_many, middle, low))
    tl.store(bounds_ptr + 1, tl.where(undecided & (too_many == 0), middle, high))
    tl.store(found_ptr, 0)


def run(tokens: torch.Tensor, kept: torch.Tensor, budget: int) -> torch.Tensor:
    """See evs_kernels.select_stale."""
    units, per_unit, _ = tokens.shape
    samples = tokens[:, :, ::SAMPLE].transpose(0, 1)
    values = samples.shape[2]
    packed = torch.zeros((per_unit, units, triton.cdiv(values, 16) * 16), dtype=torch.uint8, device=tokens.device)
    packed[:, :, :values] = samples
    top = 255 * values + 1
    stays = torch.zeros(units * per_unit, dtype=torch.uint8, device=tokens.device)
    stays[kept] = 1
    stale = torch.zeros_like(stays)
    bounds = torch.zeros(2, dtype=torch.int32, device=tokens.device)
    bounds[1:].fill_(top)
    found = torch.zeros(1, dtype=torch.int32, device=tokens.device)
    args = (packed, stays, bounds, found, stale, units, per_unit, packed.shape[2])
    with _triton.on_device(tokens):
        for _ in range((top - 1).bit_length()):
            scan_kernel[(per_unit,)](*args, WRITE=False, BLOCK=BLOCK, num_warps=1)
            step_kernel[(1,)](bounds, found, min(budget, units * per_unit), num_warps=1)
        scan_kernel[(per_unit,)](*args, WRITE=True, BLOCK=BLOCK, num_warps=1)
    return stale.nonzero().flatten()
