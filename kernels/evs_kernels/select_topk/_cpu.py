# SPDX-License-Identifier: Apache-2.0
"""numba selection: exact radix search over order-preserving keys, O(T*P), single-threaded (far below the score)."""

import numpy as np
import torch

from .._numba import njit
from .._types import Selection, kept_tokens, reserved_tokens


@njit()
def to_keys(bits, is_float, keys):
    """Maps score bits (int32) to uint32 keys that sort like the scores; -0.0 and 0.0 get one key."""
    for i in range(bits.shape[0]):
        value = bits[i]
        if is_float and value < 0:
            # Negative floats sort backwards by their bits; turn them round, and -0.0 (lowest) becomes 0.
            value = np.int32(-(np.int64(value) + 2147483648))
        keys[i] = np.uint32(np.int64(value) + 2147483648)


@njit()
def _nth_key(keys, taken, need):
    """Key of the need-th highest entry not taken (need >= 1), and how many entries with that key are wanted."""
    counts = np.empty(256, np.int64)
    prefix = np.uint64(0)
    for step in range(4):
        shift = np.uint64(24 - 8 * step)
        counts[:] = 0
        for i in range(keys.shape[0]):
            key = np.uint64(keys[i])
            if not taken[i] and (key >> (shift + np.uint64(8))) == prefix:
                counts[(key >> shift) & np.uint64(255)] += 1
        digit = 255
        while counts[digit] < need:
            need -= counts[digit]
            digit -= 1
        prefix = (prefix << np.uint64(8)) | np.uint64(digit)
    return np.uint32(prefix), need


@njit()
def _take(keys, taken, key, ties):
    """Takes every entry above ``key`` and the first ``ties`` entries equal to it."""
    for i in range(keys.shape[0]):
        if not taken[i]:
            if keys[i] > key:
                taken[i] = True
            elif keys[i] == key and ties > 0:
                taken[i] = True
                ties -= 1


@njit()
def reserve(keys, min_per_unit, taken):
    """Takes unit 0 and the min_per_unit highest keys of every other unit; keys and taken are (T, P)."""
    taken[:] = False
    taken[0] = True
    if min_per_unit > 0:
        for unit in range(1, keys.shape[0]):
            key, ties = _nth_key(keys[unit], taken[unit], min(min_per_unit, keys.shape[1]))
            _take(keys[unit], taken[unit], key, ties)


@njit()
def take_highest(keys, taken, need):
    """Takes the ``need`` highest entries not taken yet."""
    if need > 0:
        key, ties = _nth_key(keys, taken, need)
        _take(keys, taken, key, ties)


@njit()
def _emit(taken, indices, counts):
    kept = 0
    for unit in range(taken.shape[0]):
        before = kept
        for place in range(taken.shape[1]):
            if taken[unit, place]:
                indices[kept] = unit * taken.shape[1] + place
                kept += 1
        counts[unit] = kept - before


def keys_of(scores: torch.Tensor) -> np.ndarray:
    """uint32 keys of the scores' shape, sorting like them."""
    keys = np.empty(scores.shape, np.uint32)
    bits = scores.view(torch.int32).numpy().reshape(-1)
    to_keys(bits, scores.is_floating_point(), keys.reshape(-1))
    return keys


def to_selection(taken: np.ndarray, kept: int) -> Selection:
    """Selection of a boolean (T, P) array with ``kept`` entries set."""
    result = Selection(torch.empty(kept, dtype=torch.int64), torch.empty(taken.shape[0], dtype=torch.int32))
    _emit(taken, result.indices.numpy(), result.counts.numpy())
    return result


def run(scores: torch.Tensor, budget: int, min_per_unit: int) -> Selection:
    """See evs_kernels.select_topk."""
    units, per_unit = scores.shape
    keys = keys_of(scores)
    taken = np.empty(keys.shape, np.bool_)
    reserve(keys, min_per_unit, taken)
    kept = kept_tokens(units, per_unit, budget, min_per_unit)
    take_highest(keys.reshape(-1), taken.reshape(-1), kept - reserved_tokens(units, per_unit, min_per_unit))
    return to_selection(taken, kept)
