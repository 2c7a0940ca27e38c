# SPDX-License-Identifier: Apache-2.0
"""Triton gather_rows: one program per row and slice of it."""

import torch
import triton
import triton.language as tl

from .. import _triton

SLICE_BYTES = 4096

# Bits travel as integers: a copy needs no arithmetic, and the interpreter has no bfloat16.
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["rows"])
def copy_kernel(source_ptr, indices_ptr, out_ptr, rows, width, SLICE: tl.constexpr):
    k = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1).to(tl.int64) * SLICE + tl.arange(0, SLICE)
    inside = offsets < width
    index = tl.load(indices_ptr + k)
    valid = (index >= 0) & (index < rows)
    values = tl.load(source_ptr + index * width + offsets, mask=offsets < tl.where(valid, width, 0), other=0)
    tl.store(out_ptr + k * width + offsets, values, mask=inside)


def slice_width(width: int, element_size: int) -> int:
    """Elements of one row that one program copies."""
    # Rows that do not start on 16 bytes move element by element, each in a register of its own: move fewer.
    return (SLICE_BYTES if width % 16 == 0 else SLICE_BYTES // 2) // element_size


def run(source: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See evs_kernels.gather_rows."""
    out = torch.empty((indices.shape[0], source.shape[1]), dtype=source.dtype, device=source.device)
    if out.numel() == 0:
        return out
    carrier = _CARRIERS.get(source.element_size(), torch.int64)  # complex128 is two int64
    src, dst = source.view(carrier), out.view(carrier)
    width = src.shape[1]
    columns = slice_width(width, src.element_size())
    with _triton.on_device(source):
        grid = (indices.shape[0], triton.cdiv(width, columns))
        copy_kernel[grid](src, indices, dst, source.shape[0], width, SLICE=columns, num_warps=4)
    return out
