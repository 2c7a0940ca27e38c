# SPDX-License-Identifier: Apache-2.0
"""Triton cosine_score: temporal_score's walk over time, with a dot product and a squared norm per step."""

import torch
import triton
import triton.language as tl

from .. import _triton
from ..temporal_score._triton_kernels import BLOCK, slice_width, sum_slices


@triton.jit(do_not_specialize=["units", "per_unit"])
def slice_kernel(features_ptr, dots_ptr, norms_ptr, units, per_unit, depth, SLICE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    wide = per_unit.to(tl.int64)
    offsets = part * SLICE + tl.arange(0, SLICE)
    inside = offsets < depth
    row = features_ptr + place * depth + offsets
    unit = wide * depth
    out = part * units * wide + place
    x0 = tl.load(row, mask=inside, other=0).to(tl.float32)
    tl.store(dots_ptr + out, 0.0)
    tl.store(norms_ptr + out, tl.sum(x0 * x0))
    # Two units at a time: the second load is under way before the first sum waits.
    for t in range(1, units, 2):
        row_t = row + t * unit
        out_t = out + t * wide
        more = t + 1 < units
        x1 = tl.load(row_t, mask=inside, other=0).to(tl.float32)
        x2 = tl.load(row_t + unit, mask=offsets < tl.where(more, depth, 0), other=0).to(tl.float32)
        tl.store(dots_ptr + out_t, tl.sum(x0 * x1))
        tl.store(norms_ptr + out_t, tl.sum(x1 * x1))
        tl.store(dots_ptr + out_t + wide, tl.sum(x1 * x2), mask=more)
        tl.store(norms_ptr + out_t + wide, tl.sum(x2 * x2), mask=more)
        x0 = x2


@triton.jit(do_not_specialize=["tokens", "per_unit", "slices"])
def finish_kernel(dots_ptr, norms_ptr, scores_ptr, tokens, per_unit, slices, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < tokens
    later = inside & (offsets >= per_unit)
    dot = sum_slices(dots_ptr, offsets, later, tokens, slices)
    norm = sum_slices(norms_ptr, offsets, later, tokens, slices)
    norm_before = sum_slices(norms_ptr, offsets - per_unit, later, tokens, slices)
    zero = (norm == 0) | (norm_before == 0)
    length = tl.where(zero, 1.0, tl.sqrt(norm) * tl.sqrt(norm_before))
    cosine = tl.where(zero, 0.0, dot / length)
    distance = 1.0 - tl.minimum(tl.maximum(cosine, -1.0), 1.0)
    # Equal vectors; the division would leave about 1e-7. Unit 0 was masked to zeros and ends here too.
    equal = (dot == norm) & (dot == norm_before)
    tl.store(scores_ptr + offsets, tl.where(equal, 0.0, distance), mask=inside)


def run(features: torch.Tensor) -> torch.Tensor:
    """See evs_kernels.cosine_score."""
    units, per_unit, depth = features.shape
    width = slice_width(depth, features.element_size())
    slices = triton.cdiv(depth, width)
    shape, options = (units, per_unit), {"dtype": torch.float32, "device": features.device}
    scores, dots, norms = torch.empty(shape, **options), *torch.empty((2, slices, *shape), **options)
    with _triton.on_device(features):
        slice_kernel[(per_unit, slices)](features, dots, norms, units, per_unit, depth, SLICE=width, num_warps=1)
        finish_kernel[(triton.cdiv(scores.numel(), BLOCK),)](
            dots, norms, scores, scores.numel(), per_unit, slices, BLOCK=BLOCK, num_warps=4
        )
    return scores
