# SPDX-License-Identifier: Apache-2.0
"""Triton selection: exact radix search over order-preserving keys, then ordered compaction; no host wait.

``unit_kernel`` (one program per temporal unit) adds partial scores and marks the reserved tokens. ``select_kernel``
finds the key of the last token to keep and writes the kept indices. Up to `SEARCHED` tokens its programs all search the
whole clip for themselves: that repeats reads of a small array, served from cache, and saves launches. Of more tokens
the whole grid counts the digits in ``digit_kernel``, a launch for each, and ``tally_kernel`` what each unit keeps.
"""

import torch
import triton
import triton.language as tl

from .. import _triton
from .._types import Selection, kept_tokens, reserved_tokens
from ..temporal_score._triton_kernels import sum_slices

UNIT_BLOCK = 512
# Tokens that select_kernel searches and writes at a time. Twice as many of the one, or half as many of the other, spill
# registers when Triton 3.6 compiles it.
SEARCH_BLOCK = 2048
WRITE_BLOCK = 1024
# Programs that share the compaction. More would repeat the search more often without ending sooner.
PROGRAMS = 64
# Tokens up to which every program searches for itself. Four passes over so many take about as long as launching five
# more kernels; estimated from the compiled code, as nothing here was run on a GPU.
SEARCHED = 16384
# Tokens of which a program of digit_kernel counts the digits; and those that select_kernel writes at a time of so large
# a clip (of twice as many Triton 3.6 spills registers here).
DIGIT_BLOCK = 2048
LARGE_WRITE_BLOCK = 512

# Where select_kernel has the key of the last token to keep from.
GIVEN, OWN_SEARCH, DIGITS = (tl.constexpr(i) for i in range(3))


@triton.jit
def to_key(score, FLOAT: tl.constexpr):
    """uint32 that sorts like the score; -0.0 and 0.0 get one key."""
    bits = score.to(tl.uint32, bitcast=True)
    if FLOAT:
        bits = tl.where(bits == 0x80000000, 0, bits)
        return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
    else:
        return bits ^ 0x80000000


@triton.jit
def count_digits(hist, key, candidate, prefix, STEP: tl.constexpr):
    """Adds one block to the histogram of the STEP-th byte (from the top) of keys that begin with ``prefix``."""
    if STEP > 0:
        candidate = candidate & ((key >> (32 - 8 * STEP)) == prefix)
    digit = (key >> (24 - 8 * STEP)) & 255
    return hist + tl.histogram(digit.to(tl.int32), 256, mask=candidate)


@triton.jit
def next_digit(hist, prefix, need):
    """Extends ``prefix`` by the byte that holds the need-th highest key; returns it and the need left there."""
    bins = tl.arange(0, 256)
    at_least = tl.sum(hist) - tl.cumsum(hist) + hist
    digit = tl.sum((at_least >= need).to(tl.int32)) - 1
    need -= tl.sum(tl.where(bins > digit, hist, 0))
    return (prefix << 8) | digit.to(tl.uint32), need


@triton.jit(do_not_specialize=["tokens", "per_unit", "slices", "minimum"])
def unit_kernel(
    partial_ptr,
    scores_ptr,
    reserved_ptr,
    tokens,
    per_unit,
    slices,
    minimum,
    FLOAT: tl.constexpr,
    STORE: tl.constexpr,
    RESERVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * per_unit
    if STORE:
        for first in range(0, per_unit, BLOCK):
            place = first + tl.arange(0, BLOCK)
            score = sum_slices(partial_ptr, start + place, place < per_unit, tokens, slices)
            tl.store(scores_ptr + start + place, score, mask=place < per_unit)
    if RESERVE:
        # The scores are added up again in every pass, because a thread may not read back what another one stored.
        need = minimum
        prefix = tl.zeros([], tl.uint32)
        for STEP in tl.static_range(4):
            hist = tl.zeros([256], tl.int32)
            for first in range(0, per_unit, BLOCK):
                place = first + tl.arange(0, BLOCK)
                inside = place < per_unit
                key = to_key(sum_slices(partial_ptr, start + place, inside, tokens, slices), FLOAT)
                hist = count_digits(hist, key, inside, prefix, STEP)
            prefix, need = next_digit(hist, prefix, need)
        ties = tl.zeros([], tl.int32)
        for first in range(0, per_unit, BLOCK):
            place = first + tl.arange(0, BLOCK)
            inside = place < per_unit
            key = to_key(sum_slices(partial_ptr, start + place, inside, tokens, slices), FLOAT)
            equal = (inside & (key == prefix)).to(tl.int32)
            rank = ties + tl.cumsum(equal) - equal
            ties += tl.sum(equal)
            taken = (start + place < per_unit) | (key > prefix) | ((equal == 1) & (rank < need))
            tl.store(reserved_ptr + start + place, taken.to(tl.uint8), mask=inside)


@triton.jit
def load_clip(scores_ptr, reserved_ptr, offsets, inside, per_unit, FLOAT: tl.constexpr, RESERVE: tl.constexpr):
    """Keys of ``offsets``, and which of them are kept whatever their score."""
    key = to_key(tl.load(scores_ptr + offsets, mask=inside, other=0), FLOAT)
    forced = inside & (offsets < per_unit)
    if RESERVE:
        forced = forced | (tl.load(reserved_ptr + offsets, mask=inside, other=0) != 0)
    return key, forced


@triton.jit
def key_of_digits(digits_ptr, need, STEPS: tl.constexpr):
    """The first STEPS bytes of the need-th highest key, and the need left there, from the counts of those digits."""
    prefix = tl.zeros([], tl.uint32)
    for STEP in tl.static_range(STEPS):
        prefix, need = next_digit(tl.load(digits_ptr + STEP * 256 + tl.arange(0, 256)), prefix, need)
    return prefix, need


@triton.jit(do_not_specialize=["tokens", "per_unit", "need"])
def digit_kernel(
    scores_ptr,
    reserved_ptr,
    digits_ptr,
    tokens,
    per_unit,
    need,
    FLOAT: tl.constexpr,
    RESERVE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the STEP-th bytes of a block of keys, of those that begin as the digits before say, to (4, 256) counts."""
    prefix, _ = key_of_digits(digits_ptr, need, STEP)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < tokens
    key, forced = load_clip(scores_ptr, reserved_ptr, offsets, inside, per_unit, FLOAT, RESERVE)
    hist = count_digits(tl.zeros([256], tl.int32), key, inside & (forced == 0), prefix, STEP)
    tl.atomic_add(digits_ptr + STEP * 256 + tl.arange(0, 256), hist, mask=hist > 0)


@triton.jit(do_not_specialize=["units", "per_unit", "need"])
def tally_kernel(
    scores_ptr,
    reserved_ptr,
    digits_ptr,
    tallies_ptr,
    units,
    per_unit,
    need,
    FLOAT: tl.constexpr,
    RESERVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many tokens of a unit stay whatever the ties, and how many are ties: (2, units)."""
    prefix, _ = key_of_digits(digits_ptr, need, 4)
    start = tl.program_id(0).to(tl.int64) * per_unit
    above = tl.zeros([], tl.int32)
    ties = tl.zeros([], tl.int32)
    for first in range(0, per_unit, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < per_unit
        key, forced = load_clip(scores_ptr, reserved_ptr, start + place, inside, per_unit, FLOAT, RESERVE)
        above += tl.sum((inside & (forced | (key > prefix))).to(tl.int32))
        ties += tl.sum((inside & (forced == 0) & (key == prefix)).to(tl.int32))
    tl.store(tallies_ptr + tl.program_id(0), above)
    tl.store(tallies_ptr + units + tl.program_id(0), ties)


@triton.jit(do_not_specialize=["units", "per_unit", "need", "last_key", "units_each"])
def select_kernel(
    scores_ptr,
    reserved_ptr,
    digits_ptr,
    tallies_ptr,
    indices_ptr,
    counts_ptr,
    units,
    per_unit,
    need,
    last_key,
    units_each,
    FLOAT: tl.constexpr,
    RESERVE: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
    WRITE_BLOCK: tl.constexpr,
):
    tokens = units * per_unit
    first_unit = tl.program_id(0) * units_each
    start = first_unit * per_unit
    if SEARCH == DIGITS:
        prefix, need = key_of_digits(digits_ptr, need, 4)
    elif SEARCH == OWN_SEARCH:
        # ``need`` free tokens are to be kept: find the key of the last one, and how many tokens of that key.
        prefix = tl.zeros([], tl.uint32)
        for STEP in tl.static_range(4):
            hist = tl.zeros([256], tl.int32)
            for first in range(0, tokens, BLOCK):
                offsets = first + tl.arange(0, BLOCK).to(tl.int64)
                inside = offsets < tokens
                key, forced = load_clip(scores_ptr, reserved_ptr, offsets, inside, per_unit, FLOAT, RESERVE)
                hist = count_digits(hist, key, inside & (forced == 0), prefix, STEP)
            prefix, need = next_digit(hist, prefix, need)
    else:
        prefix = to_key(last_key, FLOAT)
    # What the units before this program's own keep: everything above the key, and ties while they last.
    above = tl.zeros([], tl.int32)
    ties = tl.zeros([], tl.int32)
    if SEARCH == DIGITS:
        for first in range(0, first_unit, BLOCK):
            unit = first + tl.arange(0, BLOCK)
            above += tl.sum(tl.load(tallies_ptr + unit, mask=unit < first_unit, other=0))
            ties += tl.sum(tl.load(tallies_ptr + units + unit, mask=unit < first_unit, other=0))
    else:
        for first in range(0, start, BLOCK):
            offsets = first + tl.arange(0, BLOCK).to(tl.int64)
            inside = offsets < start
            key, forced = load_clip(scores_ptr, reserved_ptr, offsets, inside, per_unit, FLOAT, RESERVE)
            above += tl.sum((inside & (forced | (key > prefix))).to(tl.int32))
            ties += tl.sum((inside & (forced == 0) & (key == prefix)).to(tl.int32))
    written = above + tl.minimum(ties, need)
    for unit in range(first_unit, tl.minimum(first_unit + units_each, units)):
        before = written
        for first in range(0, per_unit, WRITE_BLOCK):
            place = first + tl.arange(0, WRITE_BLOCK)
            inside = place < per_unit
            offsets = unit * per_unit.to(tl.int64) + place
            key, forced = load_clip(scores_ptr, reserved_ptr, offsets, inside, per_unit, FLOAT, RESERVE)
            equal = (inside & (forced == 0) & (key == prefix)).to(tl.int32)
            rank = ties + tl.cumsum(equal) - equal
            ties += tl.sum(equal)
            keep = inside & (forced | (key > prefix) | ((equal == 1) & (rank < need)))
            kept = keep.to(tl.int32)
            # Masked stores: ascending order comes from the running count, not from the order of programs.
            tl.store(indices_ptr + written.to(tl.int64) + tl.cumsum(kept) - 1, offsets, mask=keep)
            written += tl.sum(kept)
        tl.store(counts_ptr + unit, written - before)


def launch_units(partial: torch.Tensor, min_per_unit: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Adds (slices, T, P) partial scores and marks reserved tokens, in one launch or none.

    Returns:
        scores (T, P), and reserved (T, P) uint8 or None when nothing is reserved.
    """
    slices, units, per_unit = partial.shape
    scores = torch.empty_like(partial[0]) if slices > 1 else partial[0]
    reserved = torch.empty_like(scores, dtype=torch.uint8) if min_per_unit else None
    if slices > 1 or reserved is not None:
        unit_kernel[(units,)](
            partial,
            scores,
            scores if reserved is None else reserved,
            scores.numel(),
            per_unit,
            slices,
            min(min_per_unit, per_unit),
            FLOAT=scores.is_floating_point(),
            STORE=slices > 1,
            RESERVE=reserved is not None,
            BLOCK=UNIT_BLOCK,
            num_warps=4,
        )
    return scores, reserved


def launch_select(
    scores: torch.Tensor, reserved: torch.Tensor | None, size: int, *, need: int, last_bits: int | None = None
) -> Selection:
    """Writes the kept indices: in one launch, or six where the clip is large and its last key is to be found.

    Args:
        scores: (T, P).
        reserved: (T, P) uint8 or None.
        size: length of the index buffer.
        need: how many tokens to keep beyond unit 0 and the reserved ones.
        last_bits: score bits (as int32) from which all tokens are kept; None to find them from ``need``.
    """
    units, per_unit = scores.shape
    device, tokens = scores.device, scores.numel()
    indices = torch.empty(size, dtype=torch.int64, device=device)
    counts = torch.empty(units, dtype=torch.int32, device=device)
    search = GIVEN if last_bits is not None else OWN_SEARCH if tokens <= SEARCHED else DIGITS
    clip = (scores, scores if reserved is None else reserved)
    flags = {"FLOAT": scores.is_floating_point(), "RESERVE": reserved is not None}
    digits = tallies = counts  # not looked at
    units_each = triton.cdiv(units, PROGRAMS)
    if search is DIGITS:
        digits = torch.zeros((4, 256), dtype=torch.int32, device=device)
        tallies = torch.empty((2, units), dtype=torch.int32, device=device)
        units_each = 1  # nothing is read again by each program
        for step in range(4):
            digit_kernel[(triton.cdiv(tokens, DIGIT_BLOCK),)](
                *clip, digits, tokens, per_unit, need, **flags, STEP=step, BLOCK=DIGIT_BLOCK, num_warps=8
            )
        tally_kernel[(units,)](*clip, digits, tallies, units, per_unit, need, **flags, BLOCK=UNIT_BLOCK, num_warps=8)
    select_kernel[(triton.cdiv(units, units_each),)](
        *clip,
        digits,
        tallies,
        indices,
        counts,
        units,
        per_unit,
        need,
        0 if last_bits is None else last_bits,
        units_each,
        **flags,
        SEARCH=search.value,
        BLOCK=SEARCH_BLOCK,
        WRITE_BLOCK=LARGE_WRITE_BLOCK if search is DIGITS else WRITE_BLOCK,
        num_warps=16,
    )
    return Selection(indices, counts)


def select_partial(partial: torch.Tensor, budget: int, min_per_unit: int) -> Selection:
    """Top-k selection of (slices, T, P) partial scores, in at most two launches, or seven of a large clip."""
    _, units, per_unit = partial.shape
    kept = kept_tokens(units, per_unit, budget, min_per_unit)
    scores, reserved = launch_units(partial, min_per_unit)
    return launch_select(scores, reserved, kept, need=kept - reserved_tokens(units, per_unit, min_per_unit))


def run(scores: torch.Tensor, budget: int, min_per_unit: int) -> Selection:
    """See evs_kernels.select_topk."""
    with _triton.on_device(scores):
        return select_partial(scores[None], budget, min_per_unit)
