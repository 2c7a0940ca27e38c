# SPDX-License-Identifier: Apache-2.0
"""Triton temporal_score: a program owns one token place and one slice of its depth and walks over time.

The previous unit's slice stays in registers, so every byte is read from memory once. Slices leave partial sums in a
scratch buffer that a second kernel adds in a fixed order: no atomics, so a run can be repeated bit for bit.

Bytes of tokens of whole 16-byte groups are taken as words of four. NVIDIA's GPUs have an instruction for the sum of the
absolute differences of two words; byte by byte it is the arithmetic, not the memory, that sets the time.
"""

import torch
import triton
import triton.language as tl

from .. import _triton

# Bytes of one row a program reads per time step: two 16-byte loads for each thread of its single warp. A narrow slice
# gives enough programs to fill a GPU from a few hundred places.
SLICE_BYTES = 1024
BLOCK = 1024

# How differences are taken: of floats, byte by byte, of words of four bytes in Triton's language (which the interpreter
# runs), of such words in one instruction of NVIDIA's.
FLOATS, BYTES, WORDS, INSTRUCTION = (tl.constexpr(i) for i in range(4))


# Shapes are not specialised on (they change with every clip); D is, because its alignment decides the load width.
@triton.jit(do_not_specialize=["units", "per_unit"])
def slice_kernel(tokens_ptr, partial_ptr, units, per_unit, depth, KIND: tl.constexpr, SLICE: tl.constexpr):
    if KIND >= WORDS:
        depth = depth * 4  # given in groups, so that the compiler sees that rows begin on 16 bytes
    place = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    wide = per_unit.to(tl.int64)
    offsets = part * SLICE + tl.arange(0, SLICE)
    inside = offsets < depth
    row = tokens_ptr + place * depth + offsets
    unit = wide * depth
    out = partial_ptr + part * units * wide + place
    before = tl.load(row, mask=inside, other=0)
    tl.store(out, 0)
    # Four units at a time: their loads are all under way before the first sum waits for one.
    for t in range(1, units, 4):
        row_t = row + t * unit
        out_t = out + t * wide
        x0 = tl.load(row_t, mask=inside, other=0)
        x1 = tl.load(row_t + unit, mask=offsets < tl.where(t + 1 < units, depth, 0), other=0)
        x2 = tl.load(row_t + 2 * unit, mask=offsets < tl.where(t + 2 < units, depth, 0), other=0)
        x3 = tl.load(row_t + 3 * unit, mask=offsets < tl.where(t + 3 < units, depth, 0), other=0)
        tl.store(out_t, l1(before, x0, KIND))
        tl.store(out_t + wide, l1(x0, x1, KIND), mask=t + 1 < units)
        tl.store(out_t + 2 * wide, l1(x1, x2, KIND), mask=t + 2 < units)
        tl.store(out_t + 3 * wide, l1(x2, x3, KIND), mask=t + 3 < units)
        before = x3


@triton.jit
def l1(a, b, KIND: tl.constexpr):
    if KIND == INSTRUCTION:
        return tl.sum(
            tl.inline_asm_elementwise(
                "vabsdiff4.u32.u32.u32.add $0, $1, $2, $3;", "=r,r,r,r", [a, b, tl.zeros_like(a)], tl.int32, True, 1
            )
        )
    elif KIND == WORDS:
        total = tl.zeros_like(a)
        for shift in tl.static_range(0, 32, 8):
            total += tl.abs(((b >> shift) & 255) - ((a >> shift) & 255))
        return tl.sum(total)
    # Widen before subtracting: uint8 would wrap around, 16-bit floats would round.
    elif KIND == BYTES:
        # |b - a| = 2 max(a, b) - a - b. The sum of b comes back as the sum of a in the next step, and abs() of bytes
        # compiles to twice the instructions, more than the memory could hide.
        a32, b32 = a.to(tl.int32), b.to(tl.int32)
        return 2 * tl.sum(tl.maximum(a32, b32)) - tl.sum(a32) - tl.sum(b32)
    else:
        return tl.sum(tl.abs(b.to(tl.float32) - a.to(tl.float32)))


@triton.jit
def sum_slices(partial_ptr, offsets, inside, tokens, slices):
    """Scores of ``offsets``: the partial sums (slices, tokens), added in order."""
    total = tl.load(partial_ptr + offsets, mask=inside, other=0)
    for part in range(1, slices):
        total += tl.load(partial_ptr + part * tokens.to(tl.int64) + offsets, mask=inside, other=0)
    return total


@triton.jit(do_not_specialize=["tokens", "slices"])
def sum_kernel(partial_ptr, scores_ptr, tokens, slices, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < tokens
    tl.store(scores_ptr + offsets, sum_slices(partial_ptr, offsets, inside, tokens, slices), mask=inside)


def slice_width(depth: int, element_size: int) -> int:
    """Elements of one row that one program owns."""
    # Rows that do not start on 16 bytes are read element by element, each in a register of its own: own fewer.
    return (SLICE_BYTES if depth % 16 == 0 else SLICE_BYTES // 4) // element_size


def kind_of(tokens: torch.Tensor) -> tl.constexpr:
    """How the differences of these tokens are taken."""
    if tokens.dtype != torch.uint8:
        return FLOATS
    if tokens.shape[2] % 16 or tokens.data_ptr() % 4:
        return BYTES
    if _triton.interpreting():
        return WORDS
    return BYTES if torch.version.hip else INSTRUCTION


def launch_slices(tokens: torch.Tensor) -> torch.Tensor:
    """Launches the scoring kernel; returns (slices, T, P) partial scores, which sum to the score over axis 0."""
    kind = kind_of(tokens)
    units, per_unit, depth = tokens.shape
    width = slice_width(depth, tokens.element_size())
    slices = triton.cdiv(depth, width)
    if kind in (WORDS, INSTRUCTION):
        tokens, depth, width = tokens.view(torch.int32), depth // 16, width // 4
    dtype = torch.float32 if kind is FLOATS else torch.int32
    partial = torch.empty((slices, units, per_unit), dtype=dtype, device=tokens.device)
    slice_kernel[(per_unit, slices)](tokens, partial, units, per_unit, depth, KIND=kind.value, SLICE=width, num_warps=1)
    return partial


def run(tokens: torch.Tensor) -> torch.Tensor:
    """See evs_kernels.temporal_score."""
    with _triton.on_device(tokens):
        partial = launch_slices(tokens)
        if partial.shape[0] == 1:
            return partial[0]
        scores = torch.empty_like(partial[0])
        sum_kernel[(triton.cdiv(scores.numel(), BLOCK),)](
            partial, scores, scores.numel(), partial.shape[0], BLOCK=BLOCK, num_warps=4
        )
    return scores
