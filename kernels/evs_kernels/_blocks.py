# SPDX-License-Identifier: Apache-2.0
"""Walk the token rows of a clip beside those one temporal unit before, on the CPU."""

from collections.abc import Callable

import numpy as np
import torch

from ._parallel import for_ranges

# Rows converted at a time for 16-bit floats, sized to stay in a core's L2 cache beside its predecessor block.
_BLOCK_BYTES = 256 * 1024
# Below this much input a second thread costs more than it saves.
_GRAIN_BYTES = 256 * 1024


def for_token_blocks(
    tokens: torch.Tensor,
    scores: np.ndarray,
    kernel: Callable[[np.ndarray, np.ndarray, np.ndarray], None],
) -> None:
    """Calls ``kernel(now, before, out)`` on all rows of units 1..T-1.

    Args:
        tokens: (T, P, D) CPU tensor.
        scores: (T * P,) output; the entries of unit 0 are left alone.
        kernel: takes two (n, D) arrays, uint8 or float32, and writes (n,) scores.
    """
    units, per_unit, depth = tokens.shape
    rows = tokens.view(units * per_unit, depth)
    # numpy has no bfloat16: carry its bits. (numpy and not torch converts, because torch's OpenMP threads do not
    # survive a fork.)
    array = rows.view(torch.int16).numpy() if tokens.dtype == torch.bfloat16 else rows.numpy()
    narrow = tokens.dtype in (torch.float16, torch.bfloat16)
    step = max(1, _BLOCK_BYTES // (4 * depth)) if narrow else units * per_unit

    def body(lo: int, hi: int) -> None:
        for first in range(lo, hi, step):
            last = min(first + step, hi)
            now, before = array[first:last], array[first - per_unit : last - per_unit]
            if narrow:
                now, before = _to_float32(now), _to_float32(before)
            kernel(now, before, scores[first:last])

    if units > 1:
        for_ranges(body, per_unit, units * per_unit, grain=_GRAIN_BYTES // max(1, depth * tokens.element_size()))


def _to_float32(block: np.ndarray) -> np.ndarray:
    if block.dtype == np.int16:  # the bits of bfloat16, the upper half of a float32
        return (block.astype(np.int32) << 16).view(np.float32)
    return block.astype(np.float32)
