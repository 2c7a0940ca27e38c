# SPDX-License-Identifier: Apache-2.0
"""Distances between descriptors on the CPU, for every op that has an anchor."""

import numpy as np

from ._numba import njit

KEPT = np.int32(2**31 - 1)
"""The distance of a token that is kept: above every other."""


# Not cut into blocks of constant size: of this loop LLVM makes sums of absolute differences of bytes (4 ns for a token
# of 32 values), of such blocks it does not.
@njit()
def distance(a, b):
    """The L1 distance between two descriptors, which fits 16 bits."""
    total = np.int32(0)
    for i in range(a.shape[0]):
        total = np.int32(total + abs(np.int32(a[i]) - np.int32(b[i])))
    return total


@njit()
def walk(descriptors, weights, forced, level, anchors, scores):
    """Writes the weighted distance of every token from the last kept one of its place, KEPT where it is kept itself.

    Kept are unit 0, forced tokens and those whose distance is `level` or more. `anchors` is (P,) scratch.
    """
    anchors[:] = 0
    scores[0] = KEPT
    for t in range(1, descriptors.shape[0]):
        for p in range(descriptors.shape[1]):
            # Anchors are units and not copies of their values: less to write, and a unit's row is in cache either way.
            far = distance(descriptors[t, p], descriptors[anchors[p], p]) * weights[t]
            if forced[t, p] or far >= level:
                anchors[p] = t
                far = KEPT
            scores[t, p] = far
